"""Fake quantization: round to four bits, carry on in float, pass the gradient straight through.

``quantize_dequantize`` of :mod:`reqat.formats` is the arithmetic, shared with packing and export, so what training
sees is what the packed model computes; on a CPU the native operator stands in for it, equal to the last bit. Rounding
has no useful gradient; the straight-through estimator takes the identity for it (ReQAT section 1), so nothing is kept
for the backward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from reqat.config.errors import ReqatError
from reqat.formats import Format, get_format, global_scale_for, quantize_dequantize
from reqat.quant.hadamard import block_hadamard
from reqat.quant.state import MeasuredState
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
    if rotation is not None:
        x = block_hadamard(x, rotation)
    if x.device.type == "cpu":
        return native.fake_quantize(x, fmt, global_scale, name)
    return quantize_dequantize(x, fmt, global_scale=global_scale, name=name)


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


class Quantizer(MeasuredState):
    """One tensor's quantizer: a format, a rotation, and the calibrated global scale if the format is ``static``.

    ``global_scale`` (float32 scalar buffer, or None) is used instead of a computed one wherever it is set. It stays
    float32 when the model's dtype changes, and the state dict contains it; checkpoints keep the Hugging Face layout,
    so there the sidecar holds it. Within :func:`calibrating` the largest magnitude seen is kept in ``amax``, and static
    formats scale dynamically.
    """

    global_scale: Tensor | None

    def __init__(self, fmt: Format | None, *, rotation: int | None = None, name: str | None = None) -> None:
        super().__init__()
        self.format = fmt
        self.rotation = rotation
        self.name = name
        self.calibrating = False
        self.amax: Tensor | None = None
        self.register_measured("global_scale")

    def checked(self, name: str, value: Tensor) -> Tensor:
        """A stored global scale, as a scalar. Raises ReqatError for one that is not positive and finite, or where the
        format computes its own."""
        if self.format is None or self.format.global_scale != "static":
            own = "quantizes nothing here" if self.format is None else f"has {self.format.global_scale} global scales"
            raise ReqatError(
                f"{self.name or 'quantizer'}: the state dict has a static global scale, and the model's precision "
                f"{own}: prepare the model with global_scale='static' first"
            )
        if value.numel() != 1 or not bool(torch.isfinite(value).all()) or not bool((value > 0).all()):
            raise ReqatError(
                f"{self.name or 'quantizer'}: a global scale is one positive number, and the state dict has "
                f"{value.flatten()[:4].tolist()}: calibrate again"
            )
        return value.reshape(())

    @property
    def needs_calibration(self) -> bool:
        """A static format that has no global scale yet."""
        return self.format is not None and self.format.global_scale == "static" and self.global_scale is None

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize ``x`` along its last axis; only rotated, or returned as it is, if there is no format."""
        if self.format is None:
            return x if self.rotation is None else block_hadamard(x, self.rotation)
        fmt, global_scale = self.format, self.global_scale
        if self.calibrating:
            self._observe(x)
            if fmt.global_scale == "static":
                fmt, global_scale = _dynamic(fmt), None
        elif self.needs_calibration:
            raise ReqatError(
                f"{self.name or 'quantizer'}: the global scale is static and not calibrated; run calibrate_static("
                "model, batches), or choose global_scale='row' or 'dynamic'"
            )
        return fake_quantize(x, fmt, global_scale=global_scale, rotation=self.rotation, name=self.name)

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        rotated = x if self.rotation is None else block_hadamard(x, self.rotation)
        amax = rotated.abs().amax().float()
        self.amax = amax if self.amax is None else torch.maximum(self.amax, amax)

    def set_from_amax(self) -> None:
        """Set the static global scale from the largest magnitude observed."""
        assert self.format is not None
        if self.amax is None:
            raise ReqatError(f"{self.name or 'quantizer'}: nothing was observed; did the calibration run any batch?")
        scale = global_scale_for(self.amax.reshape(1), _dynamic(self.format)).reshape(())
        self.global_scale = scale.to(self.device)

    def extra_repr(self) -> str:
        """Format, rotation and scale, for ``print(model)``."""
        parts = [self.format.name if self.format is not None else "none"]
        if self.rotation is not None:
            parts.append(f"rotation={self.rotation}")
        if self.global_scale is not None:
            parts.append(f"global_scale={float(self.global_scale):.4g}")
        return ", ".join(parts)


def _dynamic(fmt: Format) -> Format:
    return dataclasses.replace(fmt, global_scale="dynamic")


@contextmanager
def calibrating(quantizers: list[Quantizer]) -> Iterator[None]:
    """Let these quantizers record the magnitudes they see, from nothing, until the block ends."""
    for quantizer in quantizers:
        quantizer.calibrating, quantizer.amax = True, None
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.calibrating = False
