"""The choice of a backend by device."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch

from reqat.config.errors import ReqatError
from reqat.inference.backend import Backend
from reqat.inference.native_backend import NativeBackend

Choice = Literal["auto", "native", "triton"]
CHOICES: tuple[Choice, ...] = ("auto", "native", "triton")

_NATIVE: Backend = NativeBackend()
_BY_DEVICE = {"cpu": "native", "cuda": "triton"}


def backend_for(device: torch.device, choice: str = "auto") -> Backend:
    """The backend for tensors on ``device``; ``choice``: ``native``, ``triton``, or by device (``auto``).

    Raises ReqatError, naming the remedy, for a device without kernels, a choice that cannot run there, or triton
    missing.
    """
    if choice not in CHOICES:
        raise ReqatError(f"backend {choice!r}: choose one of {', '.join(CHOICES)}")
    name = _BY_DEVICE.get(device.type, "none") if choice == "auto" else choice
    if name == "none" or (name == "native" and device.type != "cpu"):
        raise ReqatError(
            f"there are no {'' if name == 'none' else 'native '}kernels for tensors on {device}: move the model with "
            "model.to('cpu'), or model.to('cuda') for the Triton kernels"
        )
    if name == "native":
        return _NATIVE
    from reqat_kernels.triton import runtime  # imports triton, which a CPU has no use for

    if not runtime.AVAILABLE:
        raise ReqatError(
            "packed models on a GPU need the package triton: pip install 'reqat[kernels]', or model.to('cpu')"
        )
    if device.type != "cuda" and not runtime.INTERPRETED:
        raise ReqatError(
            f"Triton kernels need a CUDA device, and this model is on {device}: model.to('cuda'), or leave the "
            "backend out"
        )
    return _triton()


@cache
def _triton() -> Backend:
    from reqat.inference.triton_backend import TritonBackend

    return TritonBackend()
