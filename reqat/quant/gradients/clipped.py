"""Clipped straight-through estimator: no gradient where the format cuts off (BinaryConnect, PACT).

A number beyond the largest that its block's scale can represent is rounded to that largest one, however far away it
is; moving it changes nothing, so it gets no gradient. Where float32 scales come from the largest magnitude, nothing is
cut off; little is where such scales are rounded to fewer bits; much is with static global scales, with ``floor`` scales
and with TWN's.

A ``limit`` takes the place of the representable range. It decides the gradient alone; what is computed stays the same.
That is half of what ternary BERT does with a limit of 2.5: it also clamps weights and activations to it before they are
quantized, and its scales are those of the clamped numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reqat.config.errors import ReqatError
from reqat.quant.fake import fake_quantize
from reqat.quant.gradients._rule import GradientRule, Rounding, within


class _Masked(torch.autograd.Function):
    """The first argument's values, the second one's gradient where ``inside``."""

    @staticmethod
    def forward(ctx: Any, quantized: Tensor, x: Tensor, inside: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(inside)
        return quantized.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:  # type: ignore[override]
        (inside,) = ctx.saved_tensors
        return None, grad.masked_fill(~inside, 0.0), None


class Clipped(GradientRule):
    """dx = dy where ``|x| <= emax * S`` (S the scale of its block, and of its sign where each sign has one), or
    ``|x| <= limit`` if one is given; else 0."""

    name = "clipped"

    def __init__(self, limit: float | None = None) -> None:
        super().__init__()
        if limit is not None and not limit > 0:
            raise ReqatError(f"gradient rule clipped: limit must be positive, got {limit}; null: the format's range")
        self.limit = limit

    def extra_repr(self) -> str:
        """Its setting."""
        return f"limit={self.limit}"

    def forward(self, x: Tensor, at: Rounding) -> Tensor:
        """``x`` rotated and rounded."""
        x = at.rotate(x)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return fake_quantize(x, at.fmt, global_scale=at.global_scale, name=at.name)
        with torch.no_grad():
            if self.limit is not None:
                rounded = fake_quantize(x, at.fmt, global_scale=at.global_scale, name=at.name)
                inside = x.abs() <= self.limit
            else:  # the range is that of the scales, which codes bring along: x is rounded once
                q = at.codes(x)
                rounded, inside = q.dequantize(), within(x.float(), at.fmt.element_type.emax * q.element_scales(x))
        return _Masked.apply(rounded, x, inside)


RULE = Clipped
