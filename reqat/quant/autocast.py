"""bfloat16 autocast that is fast on every CPU.

Where the processor has no instruction for bfloat16 products (x86 with AVX2 alone), torch's own linear layers fall to a
reference path that is five to ten times slower than float32. There :func:`autocast` computes them in float32 from
operands rounded to bfloat16, and rounds the result to bfloat16: what hardware with such instructions does, up to the
order of the sum. Elsewhere it is ``torch.autocast``.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from reqat_kernels.products import cpu_multiplies

_ROUNDED = (torch.bfloat16, torch.float16)
_library: torch.library.Library | None = None


def autocast(device_type: str, dtype: torch.dtype | None, enabled: bool = True) -> torch.autocast:
    """``torch.autocast`` for a kind of device (``cpu``, ``cuda``); ``dtype`` None or ``enabled`` False: none at all."""
    enabled = enabled and dtype is not None
    if enabled and device_type == "cpu" and dtype is not None and not cpu_multiplies(dtype):
        _install()
    return torch.autocast(device_type, dtype, enabled=enabled)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` as CPU autocast means it: operands and result rounded to its dtype, products and sums in float32.

    x [..., K], weight [N, K], bias [N]; float32 or narrower. Gradients are rounded at the same places.
    """
    dtype = torch.get_autocast_dtype("cpu")
    given = (x, weight) if bias is None else (x, weight, bias)
    with torch.autocast("cpu", enabled=False):
        if dtype not in _ROUNDED or any(t.dtype not in (torch.float32, *_ROUNDED) or not t.is_cpu for t in given):
            return F.linear(x, weight, bias)
        return F.linear(*(t.to(dtype).float() for t in given)).to(dtype)


def _install() -> None:
    """Let linear layers under CPU autocast be computed by :func:`linear`, in this process from now on."""
    global _library
    if _library is None:
        _library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that torch's own is replaced is the point
            _library.impl("linear", linear, "AutocastCPU", allow_override=True)
