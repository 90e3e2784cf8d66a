"""PACT (arXiv 1805.06085): activations are cut off at a level ``a`` that is trained with the weights.

After a ReLU a few large numbers stretch the range that a handful of levels must cover. Cutting them off costs clipping
error and buys resolution; PACT lets the loss choose between the two::

    y = clip(x, 0, a),     x^ = round(y / s) s,     s = a / (2^k - 1)
    dL/dx = dL/dx^ where 0 <= x < a, else 0
    dL/da = sum of dL/dx^ where x >= a

The levels are those of an affine format with one scale a tensor (AINT2-tensor) and the zero point 0. Weight decay acts
on ``a``, as the paper's L2 term does (with the weights' coefficient: inferred); a training may ask for it by
``decayed``.

``start`` 8 is where NCE's authors are taken to begin (inferred): with it the level comes down over a long training. For
a short one, :func:`measuring` sets it from the first batch to ``2 mean|x| sqrt(2^k - 1)``, LSQ's rule (arXiv
1902.08153) for a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from reqat.config.errors import ReqatError
from reqat.formats import Format, QuantizedTensor
from reqat.quant.gradients._rule import GradientRule, Rounding

# A level that training drives to zero or below would leave nothing of the activations.
_SMALLEST = 1e-3


class _Pact(torch.autograd.Function):
    """x^ from x of any shape and the level a []."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, fmt: Format) -> Tensor:  # type: ignore[override]
        y = x.float()
        inside = (y >= 0) & (y < a)
        ctx.save_for_backward(inside, y >= a)
        ctx.dtype = a.dtype
        scale = a.float() / fmt.element_type.emax
        y = (y / scale).clamp_(0, fmt.element_type.emax)
        return fmt.element_type.round_(y, torch.empty_like(y), rounding=fmt.rounding).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        inside, above = ctx.saved_tensors
        return grad * inside, (grad * above).sum().to(ctx.dtype), None


class Pact(GradientRule):
    """Activations of one scale a tensor in affine integers; not for weights, which have both signs. Raises ReqatError
    for a ``start`` that is not positive."""

    name = "pact"
    decayed: ClassVar[bool] = True
    level: nn.Parameter

    def __init__(self, start: float = 8.0) -> None:
        super().__init__()
        if not start > 0:
            raise ReqatError(f"gradient rule pact: start must be positive, got {start}; 8 is usual")
        self.start = start
        self.measuring = False

    def extra_repr(self) -> str:
        """Its setting."""
        return f"start={self.start}"

    def prepare(self, fmt: Format, role: str, rows: int | None, where: str) -> None:
        """Make the level, a float32 scalar."""
        if role == "weights":
            raise ReqatError(f"{where}: gradient rule pact is for activations, not weights; set roles=('inputs',)")
        if not (fmt.zero_point and fmt.per_tensor):
            raise ReqatError(
                f"{where}: gradient rule pact needs affine integers with one scale a tensor, as AINT2-tensor, not "
                f"{fmt.name}"
            )
        self.level = nn.Parameter(torch.tensor(float(self.start)))

    @property
    def held(self) -> Tensor:
        """The level, held above zero."""
        return self.level.clamp(min=_SMALLEST)

    def forward(self, x: Tensor, at: Rounding) -> Tensor:
        """``x`` rotated, cut off and rounded."""
        x = at.rotate(x)
        if self.measuring:
            with torch.no_grad():
                self.level.fill_(2 * float(x.float().abs().mean()) * at.fmt.element_type.emax**0.5)
        return _Pact.apply(x, self.held, at.fmt)

    def codes(self, rotated: Tensor, at: Rounding) -> QuantizedTensor:
        """With the level in the scales, and zero points of 0."""
        q = at.codes(rotated)
        scale = (self.held.float() / at.fmt.element_type.emax).to(q.scales)
        scales = torch.stack([scale, torch.zeros_like(scale)]).expand_as(q.scales).contiguous()
        y = (rotated.float() / scale.float()).clamp_(0, at.fmt.element_type.emax)
        v = at.fmt.element_type.round_(y, torch.empty_like(y), rounding=at.fmt.rounding)
        return dataclasses.replace(q, scales=scales, codes=at.fmt.element_type.encode(v, torch.signbit(v)))


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Within this block each forward pass of ``model`` sets the levels of its PACT rules from what they are given,
    layer by layer: each sees what the quantized layers before it made."""
    rules = [module for module in model.modules() if isinstance(module, Pact)]
    for rule in rules:
        rule.measuring = True
    try:
        yield
    finally:
        for rule in rules:
            rule.measuring = False


RULE = Pact
