"""The quantizer of one tensor of a model: a format, a rotation, a gradient rule, clipping and calibrated scales."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from reqat.config.errors import ReqatError
from reqat.formats import Format, QuantizedTensor, global_scale_for
from reqat.formats.hadamard import block_hadamard
from reqat.quant.gradients import STE, GradientRule, Rounding
from reqat.quant.state import MeasuredState


class Quantizer(MeasuredState):
    """One tensor's quantizer: a format, a rotation, and the calibrated global scale if the format is ``static``.

    ``gradient`` is the rule by which a gradient passes through the rounding: straight through, unless another one is
    put in its place (:func:`reqat.models.set_gradient`). Within :func:`without_rounding` everything is computed but the
    rounding.
    ``global_scale`` (float32 scalar buffer, or None) is used instead of a computed one wherever it is set. It stays
    float32 when the model's dtype changes, and the state dict contains it; checkpoints keep the Hugging Face layout,
    so there the sidecar holds it. Within :func:`calibrating` the largest magnitude seen is kept in ``amax``, and static
    formats scale dynamically.
    ``clip`` (float32 buffer [2], or [rows, 2]; or None) cuts the tensor off at these shares of the least and of the
    largest number of each block, before it is scaled (QuaRot, FlatQuant). ``clamp`` cuts it off at plus and minus
    itself before that, with no gradient outside (ternary BERT).
    """

    global_scale: Tensor | None
    clip: Tensor | None

    def __init__(
        self, fmt: Format | None, *, rotation: int | None = None, name: str | None = None, clamp: float | None = None
    ) -> None:
        super().__init__()
        self.format = fmt
        self.clamp = clamp
        self.rotation = rotation
        self.name = name
        self.calibrating = False
        self.rounds = True
        self.gradient: GradientRule = STE()
        self.amax: Tensor | None = None
        self.register_measured("global_scale")
        self.register_measured("clip")

    def set_clip(self, clip: Tensor | None) -> None:
        """Set the shares at which to cut off, or None. Raises ReqatError as :meth:`checked` does."""
        value = None if clip is None else self.checked("clip", clip).detach().to(self.device, torch.float32, copy=True)
        self.clip = value

    def checked(self, name: str, value: Tensor) -> Tensor:
        """A measured value, as it is kept. Raises ReqatError for one that this quantizer cannot have."""
        return self._checked_clip(value) if name == "clip" else self._checked_scale(value)

    def _checked_clip(self, value: Tensor) -> Tensor:
        if value.shape[-1:] != (2,) or value.ndim > 2 or not bool(((value > 0) & (value <= 1)).all()):
            raise ReqatError(
                f"{self.name or 'quantizer'}: a clip is two shares above 0 and up to 1 (of the least number, of the "
                f"largest), and this one has shape {tuple(value.shape)}: {value.flatten()[:4].tolist()}"
            )
        return value

    def _checked_scale(self, value: Tensor) -> Tensor:
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

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        start = f"{prefix}gradient."
        known = self.gradient.state_dict()
        for key in state_dict:  # strict=False would drop them without a word
            if key.startswith(start) and key.removeprefix(start) not in known:
                raise ReqatError(
                    f"{key}: the state dict has a parameter of a gradient rule, and the quantizer's rule here "
                    f"({self.gradient.name}) has none of that name: call set_gradient on the model first, as it was "
                    "when the state dict was made"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def needs_calibration(self) -> bool:
        """A static format that has no global scale yet."""
        return self.format is not None and self.format.global_scale == "static" and self.global_scale is None

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize ``x`` along its last axis; only rotated, or returned as it is, if there is no format."""
        if self.format is None or not self.rounds:
            return x if self.rotation is None else block_hadamard(x, self.rotation)
        fmt, global_scale, rotation = self.format, self.global_scale, self.rotation
        if self.clip is not None or self.clamp is not None:
            x = self.cut(x if rotation is None else Rounding(fmt, None, rotation).rotate(x))
            rotation = None
        if self.calibrating:
            self._observe(x, rotation)
            if fmt.global_scale == "static":
                fmt, global_scale = dynamic(fmt), None
        elif self.needs_calibration:
            raise ReqatError(
                f"{self.name or 'quantizer'}: the global scale is static and not calibrated; run calibrate_static("
                "model, batches), or choose global_scale='row' or 'dynamic'"
            )
        return self.gradient(x, Rounding(fmt, global_scale, rotation, self.name))

    @torch.no_grad()
    def codes(self, rotated: Tensor) -> QuantizedTensor:
        """Codes and scales of a tensor that has been rotated already: ``quantizer(x)`` is what they stand for."""
        assert self.format is not None
        return self.gradient.codes(self.cut(rotated), Rounding(self.format, self.global_scale, None, self.name))

    def cut(self, rotated: Tensor) -> Tensor:
        """A tensor that has been rotated already, cut off as ``clamp`` and ``clip`` say."""
        if self.format is None:
            return rotated
        if self.clamp is not None:
            rotated = rotated.clamp(-self.clamp, self.clamp)
        return rotated if self.clip is None else clipped(rotated, self.clip, self.format)

    @property
    def straight(self) -> bool:
        """Whether the gradient is the identity's."""
        return self.gradient.straight and self.clamp is None

    @torch.no_grad()
    def _observe(self, x: Tensor, rotation: int | None) -> None:
        rotated = x if rotation is None else block_hadamard(x, rotation)
        amax = rotated.abs().amax().float()
        self.amax = amax if self.amax is None else torch.maximum(self.amax, amax)

    def set_from_amax(self) -> None:
        """Set the static global scale from the largest magnitude observed."""
        assert self.format is not None
        if self.amax is None:
            raise ReqatError(f"{self.name or 'quantizer'}: nothing was observed; did the calibration run any batch?")
        scale = global_scale_for(self.amax.reshape(1), dynamic(self.format)).reshape(())
        self.global_scale = scale.to(self.device)

    def extra_repr(self) -> str:
        """Format, rotation and scale, for ``print(model)``."""
        parts = [self.format.name if self.format is not None else "none"]
        if self.rotation is not None:
            parts.append(f"rotation={self.rotation}")
        if self.global_scale is not None:
            parts.append(f"global_scale={float(self.global_scale):.4g}")
        if self.clip is not None:
            parts.append(f"clip={float(self.clip.mean()):.3g}")
        if self.clamp is not None:
            parts.append(f"clamp={self.clamp:g}")
        return ", ".join(parts)


def clipped(x: Tensor, clip: Tensor, fmt: Format) -> Tensor:
    """``x`` [..., K] cut off at shares ``clip`` of the least and of the largest number of each block of ``fmt``.

    ``clip`` is [2], [rows, 2] or [rows, blocks, 2]. Symmetric formats have one bound for both signs, the larger one.
    The gradient passes through the bounds.
    """
    low, high = bounds(x, clip, fmt)
    y = x.unflatten(-1, (-1, fmt.block or x.shape[-1]))
    return torch.maximum(torch.minimum(y, high), low).flatten(-2)


def bounds(x: Tensor, clip: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """The bounds of :func:`clipped`, [..., blocks, 1] in x's dtype, the lower not above zero, the upper not below."""
    y = x.unflatten(-1, (-1, fmt.block or x.shape[-1]))
    share = clip.to(x.dtype)
    if share.ndim > 1:  # of each row and block, or of each row for all its blocks
        share = share.reshape(len(share), -1, 1, 2)
    low = y.amin(-1, keepdim=True).clamp(max=0) * share[..., 0]
    high = y.amax(-1, keepdim=True).clamp(min=0) * share[..., 1]
    if fmt.asymmetric or fmt.zero_point:
        return low, high
    high = torch.maximum(high, -low)
    return -high, high


def dynamic(fmt: Format | None) -> Any:
    """``fmt`` with the global scale of the tensor at hand in place of a static one, which is calibrated later."""
    return fmt.replace(global_scale="dynamic") if fmt is not None and fmt.global_scale == "static" else fmt


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


@contextmanager
def without_rounding(quantizers: Iterable[Quantizer]) -> Iterator[None]:
    """Let these quantizers rotate and shift as they do, and not round, until the block ends: what is left of a
    precision is its transforms, which must not change what the model computes."""
    held = list(quantizers)
    for quantizer in held:
        quantizer.rounds = False
    try:
        yield
    finally:
        for quantizer in held:
            quantizer.rounds = True
