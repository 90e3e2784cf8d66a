"""Triton where it is installed, and where its kernels may run.

Importing this package never fails: without triton the names ``triton`` and ``tl`` are stand-ins under which kernels
can be defined, and calling one raises an ImportError with the remedy.

A kernel takes CUDA tensors or, when triton was first imported with ``TRITON_INTERPRET=1`` in the environment, tensors
of any device, element by element in numpy: right for tests, thousands of times too slow for work.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

_REMEDY = "Triton kernels need the package triton: pip install 'reqat[kernels]', or use reqat.quantize and PyTorch"


class _Missing:
    """Stands for a module, a decorator, a kernel that is not there."""

    def __getattr__(self, name: str) -> _Missing:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> _Missing:
        return self

    def __getitem__(self, grid: Any) -> Any:
        raise ImportError(_REMEDY)


try:
    import triton
    import triton.language as tl

    #: Whether kernels run in triton's interpreter; settled when they are defined, whatever the environment says later.
    INTERPRETED: bool = triton.knobs.runtime.interpret
    AVAILABLE = True
except ImportError:
    triton = tl = _Missing()  # type: ignore[assignment]
    INTERPRETED = AVAILABLE = False


def require(*tensors: Tensor | None) -> None:
    """Raise unless a kernel can run on these tensors.

    ImportError without triton, TypeError for what is no tensor, ValueError for the wrong device.
    """
    if not AVAILABLE:
        raise ImportError(_REMEDY)
    for t in tensors:
        if t is not None and not isinstance(t, Tensor):
            raise TypeError(f"{t!r:.80} is a {type(t).__name__}, not a torch tensor")
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        raise ValueError(f"tensors lie on several devices ({', '.join(sorted(map(str, devices)))}): move them to one")
    wrong = [device for device in devices if device.type != "cuda"]
    if any(device.type == "meta" for device in devices):
        raise ValueError("tensors on the device meta have no numbers: move them to a GPU")
    if wrong and not INTERPRETED:
        raise ValueError(
            f"Triton kernels need CUDA tensors, got {wrong[0]}: move them to a GPU, use reqat_kernels.native on a CPU, "
            "or set TRITON_INTERPRET=1 before the first import of triton (slow, for tests)"
        )


def capability(t: Tensor) -> int:
    """Compute capability of the tensor's GPU as 10 * major + minor (90, 100, 120); 0 in the interpreter."""
    return 0 if INTERPRETED or t.device.type != "cuda" else _capability(t.device)


@cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def status() -> str:
    """One line for people: whether Triton kernels can be used here."""
    if not AVAILABLE:
        return "Triton kernels: none (pip install 'reqat[kernels]')"
    if INTERPRETED:
        return f"Triton kernels: interpreted (TRITON_INTERPRET=1), triton {triton.__version__}"
    if not torch.cuda.is_available():
        return f"Triton kernels: no CUDA device, triton {triton.__version__}"
    return f"Triton kernels: {torch.cuda.get_device_name()}, triton {triton.__version__}"
