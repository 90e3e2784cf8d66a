"""bfloat16 autocast that is fast on every CPU.

Where the processor has no instruction for bfloat16 products (x86 with AVX2 alone), torch's own linear layers and
attention take a reference path that is five to ten times slower than float32. There :func:`autocast` computes them in
float32 from operands rounded to bfloat16, and rounds the result to bfloat16: what hardware with such instructions does,
up to the order of the sum. Elsewhere it is ``torch.autocast``.
"""

from __future__ import annotations

import warnings
from typing import Any

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


def resolve(name: str, device_type: str) -> str:
    """``none`` or ``bf16``, as ``name`` says; ``auto`` is bf16 where the device multiplies bfloat16 numbers.

    Where it does not, rounding to bfloat16 costs time and gains nothing.
    """
    if name != "auto":
        return name
    return "bf16" if device_type != "cpu" or cpu_multiplies(torch.bfloat16) else "none"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` as CPU autocast means it: operands and result rounded to its dtype, products and sums in float32.

    x [..., K], weight [N, K], bias [N]; float32 or narrower. Gradients are rounded at the same places.
    """
    dtype = torch.get_autocast_dtype("cpu")
    given = (x, weight) if bias is None else (x, weight, bias)
    with torch.autocast("cpu", enabled=False):
        if not _ours(dtype, *given):
            return F.linear(x, weight, bias)
        return F.linear(*(t.to(dtype).float() for t in given)).to(dtype)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``scaled_dot_product_attention`` as :func:`linear` is a linear layer; the probabilities stay in float32, where
    torch's own rounds them, too. query [..., H, T, D], key and value [..., H or fewer, S, D]."""
    dtype = torch.get_autocast_dtype("cpu")
    # A mask that is added is rounded as the operands are; one that chooses holds booleans.
    added = [attn_mask] if attn_mask is not None and attn_mask.dtype != torch.bool else []
    given = [query, key, value, *added]
    options: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    with torch.autocast("cpu", enabled=False):
        if not _ours(dtype, *given):
            return F.scaled_dot_product_attention(query, key, value, attn_mask, **options)
        q, k, v, *mask = (t.to(dtype).float() for t in given)
        return F.scaled_dot_product_attention(q, k, v, mask[0] if mask else attn_mask, **options).to(dtype)


def _ours(dtype: torch.dtype, *given: Tensor) -> bool:
    return dtype in _ROUNDED and all(t.dtype in (torch.float32, *_ROUNDED) and t.is_cpu for t in given)


def _install() -> None:
    """Let linear layers and attention under CPU autocast be computed by the functions above, from now on in this
    process."""
    global _library
    if _library is None:
        _library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that torch's own is replaced is the point
            _library.impl("linear", linear, "AutocastCPU", allow_override=True)
            _library.impl("scaled_dot_product_attention", attention, "AutocastCPU", allow_override=True)
