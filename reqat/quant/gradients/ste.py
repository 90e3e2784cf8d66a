"""STE, the straight-through estimator: the gradient of rounding is that of the identity (ReQAT section 1)."""

from __future__ import annotations

from torch import Tensor

from reqat.quant.fake import fake_quantize
from reqat.quant.gradients._rule import GradientRule, Rounding


class STE(GradientRule):
    """dx = dy, whatever was rounded and clipped."""

    name = "ste"
    straight = True

    def forward(self, x: Tensor, at: Rounding) -> Tensor:
        """See :func:`reqat.quant.fake_quantize`."""
        return fake_quantize(x, at.fmt, global_scale=at.global_scale, rotation=at.rotation, name=at.name)


RULE = STE
