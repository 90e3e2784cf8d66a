"""Clipped straight-through estimator: no gradient where the format cuts off (BinaryConnect, PACT).

A number beyond the largest that its block's scale can represent is rounded to that largest one, however far away it
is; moving it changes nothing, so it gets no gradient. Where scales come from the largest magnitude little is cut off;
much is with static global scales, with ``floor`` scales and with TWN's.

A ``limit`` takes the place of the representable range (2.5 for weights and activations of ternary BERT). What is
computed stays the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reqat.config.errors import ReqatError
from reqat.quant.fake import fake_quantize
from reqat.quant.gradients._rule import GradientRule, Rounding


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
    """dx = dy where ``|x| <= emax * S`` (S the scale of its block), or ``|x| <= limit`` if one is given; else 0."""

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
        rounded = fake_quantize(x.detach(), at.fmt, global_scale=at.global_scale, name=at.name)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return rounded
        with torch.no_grad():
            if self.limit is not None:
                inside = x.abs() <= self.limit
            else:
                inside = x.float().abs() <= at.fmt.element_type.emax * at.codes(x).element_scales()
        return _Masked.apply(rounded, x, inside)


RULE = Clipped
