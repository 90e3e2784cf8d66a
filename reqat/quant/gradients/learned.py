"""Learned scale: a factor on the format's scale, one a row of a weight, trained with the weights.

LSQ (arXiv 1902.08153) learns the step of the quantizer; TSLD's option ``learned_scale`` (arXiv 2308.06744) learns a
factor gamma, from 1 on, of a scale that follows the weights, which needs no initialization. Here S is the scale that
the format computes, Q the largest code::

    s = gamma S,     v = clip(round(w / s), -Q, Q),     w^ = v s
    dL/dw = dL/dw^ where |w / s| <= Q, else 0
    dL/dgamma = sum over the row of  dL/dw^ S (v - w / s) where |w / s| <= Q,  dL/dw^ S v elsewhere

the gradient that LSQ gives the step, times S; S itself is a constant for it. ``|w / s| <= Q`` holds for a block's
largest magnitude whatever the rounding of S (:func:`reqat.quant.gradients._rule.within`). LSQ's factor 1 / sqrt(N Q) on
the step's gradient is left out: Adam's update depends on it only by its epsilon and by clipping of the gradient's norm.

``base="mean"`` is TSLD's option: S is mean|w| of the row, whose gradient to w counts too, so that a ternary weight has
the levels 0 and +-gamma mean|w|. With ``base="scale"`` they are 0 and +-gamma S with S TWN's alpha, the mean of the
``|w|`` above 0.7 mean|w|, which is larger. Either way rounding is to the nearest level: the threshold is gamma S / 2,
where TWN, and with it the format under other rules, has 0.7 mean|w|. So at gamma 1 the codes may differ from the
format's.

Frozen, the codes have gamma in their scales, which therefore must be float32: integers, ternary, FP8.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from reqat.config.errors import ReqatError, unknown
from reqat.formats import Format, QuantizedTensor
from reqat.quant.gradients._rule import GradientRule, Rounding, within

_BASES = ("scale", "mean")
# A factor that training drives to zero or below would divide by nothing.
_SMALLEST = 1e-3


class _Learned(torch.autograd.Function):
    """w^ from w [N, K] and s, float32, which broadcasts to it."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, s: Tensor, fmt: Format) -> Tensor:  # type: ignore[override]
        u = w.float() / s
        v = fmt.element_type.round_(u.clone(), torch.empty_like(u), rounding=fmt.rounding)
        inside = within(u, fmt.element_type.emax)
        ctx.save_for_backward(inside, torch.where(inside, v - u, v))
        ctx.scale = s.shape
        return (v * s).to(w.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        inside, slope = ctx.saved_tensors
        return grad.masked_fill(~inside, 0.0), (grad.float() * slope).sum_to_size(ctx.scale), None


class Learned(GradientRule):
    """Weights only: a factor of an activation's scale would have to be stored beside the codes. Raises ReqatError for
    an unknown ``base``."""

    name = "learned"
    gamma: nn.Parameter

    def __init__(self, base: str = "scale") -> None:
        super().__init__()
        if base not in _BASES:
            raise unknown("base of a learned scale", base, _BASES, where="gradient rule learned")
        self.base = base

    def extra_repr(self) -> str:
        """Its setting, where it is not the default."""
        return "" if self.base == "scale" else f"base={self.base}"

    def prepare(self, fmt: Format, role: str, rows: int | None, where: str) -> None:
        """Make gamma: one a row, or one for a format with one scale a tensor."""
        if role != "weights" or rows is None:
            raise ReqatError(f"{where}: gradient rule learned is for weights, not {role}; set roles=('weights',)")
        if fmt.scale != "FP32":
            raise ReqatError(
                f"{where}: gradient rule learned needs scales that are stored as FP32, and those of {fmt.name} are "
                f"{fmt.scale}; take an INT, TERNARY or FP8 format"
            )
        if self.base == "mean" and (fmt.block is not None or fmt.zero_point):
            raise ReqatError(
                f"{where}: gradient rule learned with base 'mean' has one scale a row or tensor, and {fmt.name} has "
                "blocks or zero points; take TERNARY-row, TERNARY-tensor or another -row format"
            )
        self.gamma = nn.Parameter(torch.ones(()) if fmt.per_tensor else torch.ones(rows, 1))

    @property
    def _factor(self) -> Tensor:
        return self.gamma.clamp(min=_SMALLEST)

    def forward(self, x: Tensor, at: Rounding) -> Tensor:
        """The weight rotated and rounded at the learned scale."""
        x = at.rotate(x)
        S = self._mean(x, at) if self.base == "mean" else at.codes(x.detach()).element_scales()
        return _Learned.apply(x, self._factor.float() * S, at.fmt)

    def _mean(self, x: Tensor, at: Rounding) -> Tensor:
        """mean |w| [N, 1] of each row, or of all, [1, 1]; zeros, which every scale suits, get 1."""
        magnitude = x.float().abs()
        mean = magnitude.mean().reshape(1, 1) if at.fmt.per_tensor else magnitude.mean(-1, keepdim=True)
        return torch.where(mean > 0, mean, 1.0)

    def codes(self, rotated: Tensor, at: Rounding) -> QuantizedTensor:
        """With gamma in the scales."""
        q = at.codes(rotated)
        own = q.scales if self.base == "scale" else self._mean(rotated, at).expand_as(q.scales)
        scales = own * self._factor.float()
        scaled = dataclasses.replace(q, scales=scales)
        u = rotated.float() / scaled.element_scales()
        v = at.fmt.element_type.round_(u.clone(), torch.empty_like(u), rounding=at.fmt.rounding)
        return dataclasses.replace(scaled, codes=at.fmt.element_type.encode(v, torch.signbit(rotated)))


RULE = Learned
