"""Fake quantization: round to a format, carry on in float, pass the gradient straight through.

``quantize_dequantize`` of :mod:`reqat.formats` is the arithmetic, shared with packing and export, so what training
sees is what the packed model computes. Fused kernels stand in for it, equal to the last bit: the native operator on a
CPU, Triton's on a GPU, each for the formats that it has; :data:`BY_DEVICE` is where that is decided. Rounding has no
useful gradient; the straight-through estimator takes the identity for it (ReQAT section 1), so nothing is kept for the
backward pass. Other gradients are rules of :mod:`reqat.quant.gradients`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from reqat.formats import Format, get_format, quantize_dequantize
from reqat.formats.hadamard import block_hadamard
from reqat_kernels.native import quantize as native


class _FakeQuantize(torch.autograd.Function):
    """y = Q(x R), dx = dy R^T, with R the (symmetric) block Hadamard rotation or the identity."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, fmt: Format, global_scale: Tensor | None, rotation: int | None, name: str | None
    ) -> Tensor:
        ctx.rotation = rotation
        return _quantized(x, fmt, global_scale, rotation, name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.rotation is not None:
            grad = block_hadamard(grad, ctx.rotation)
        return grad, None, None, None, None


def _quantized(x: Tensor, fmt: Format, global_scale: Tensor | None, rotation: int | None, name: str | None) -> Tensor:
    if rotation is not None:  # the product with the matrix, whose order of summation the kernels' rotation has not
        x = block_hadamard(x, rotation)
    return BY_DEVICE.get(x.device.type, eager)(x, fmt, global_scale, name)


def eager(x: Tensor, fmt: Format, global_scale: Tensor | None, name: str | None) -> Tensor:
    """``reqat.formats``, operation by operation, on any device."""
    return quantize_dequantize(x, fmt, global_scale=global_scale, name=name)


def on_a_gpu(x: Tensor, fmt: Format, global_scale: Tensor | None, name: str | None) -> Tensor:
    """Triton's kernel where it has the format; what it has not, or refuses, goes to ``reqat.formats``, whose errors
    name more."""
    kernel = _triton_kernel()
    if kernel is None or not kernel.takes(x, fmt, global_scale):
        return eager(x, fmt, global_scale, name)
    try:
        fused: Tensor = kernel.fake_quantize(x, fmt, global_scale=global_scale, name=name)
    except ValueError:
        return eager(x, fmt, global_scale, name)
    return fused


@cache
def _triton_kernel() -> Any:
    """The module of Triton's quantizer, or None without triton: imported by those who have a GPU."""
    from reqat_kernels.triton import quantize, runtime

    return quantize if runtime.AVAILABLE else None


#: Fake quantization of a tensor that has been rotated already, by the kind of device it lies on; others are ``eager``.
BY_DEVICE: dict[str, Callable[[Tensor, Format, Tensor | None, str | None], Tensor]] = {
    "cpu": native.fake_quantize,
    "cuda": on_a_gpu,
}


class _StraightThrough(torch.autograd.Function):
    """The gradient of :class:`_FakeQuantize` for a result that is at hand, and may be narrower than ``x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor, rotation: int | None) -> Tensor:  # type: ignore[override]
        ctx.rotation, ctx.dtype = rotation, x.dtype
        return quantized.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad = grad.to(ctx.dtype)
        return (grad if ctx.rotation is None else block_hadamard(grad, ctx.rotation)), None, None


def straight_through(x: Tensor, quantized: Tensor, *, rotation: int | None = None) -> Tensor:
    """``quantized``, which :func:`fake_quantize` made of ``x`` before, as if it were made of it now: same memory, and
    the gradient (converted to ``x``'s dtype, rotated back) passes straight through to ``x``.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _StraightThrough.apply(x, quantized, rotation)
    return quantized


def fake_quantize(
    x: Tensor,
    fmt: Format | str,
    *,
    global_scale: Tensor | None = None,
    rotation: int | None = None,
    name: str | None = None,
) -> Tensor:
    """``x`` rounded to ``fmt`` along its last axis; same shape and dtype, gradient passed straight through.

    With ``rotation``, ``x`` is first rotated in Hadamard blocks of that size (and stays rotated). ``global_scale``
    overrides the one that the format would compute. Raises ValueError for NaN or infinity, naming ``name``, and for a
    last axis that the format's block does not divide.
    """
    fmt = get_format(fmt) if isinstance(fmt, str) else fmt
    if torch.is_grad_enabled() and x.requires_grad:
        return _FakeQuantize.apply(x, fmt, global_scale, rotation, name)
    return _quantized(x, fmt, global_scale, rotation, name)
