"""The functions that tables stand for: their ranges, their samples for training, and how far a table is off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from reqat.config.errors import ReqatError, unknown

#: Below this magnitude a relative error is taken relative to it: the smallest normal number of FP16 (NLI).
RELATIVE_FLOOR = 2.0**-14
_UNIFORM_POINTS = 2**16

Evaluate = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Function:
    """A function of one number, approximated on ``[low, high]``.

    ``tails``: slopes to the left and right of the range, for tables that are made of values within it; None where the
    outermost segment goes on. ``start``: how a network's neurons begin (see :mod:`.nn_lut`). ``dense``: its training
    samples are spread like FP16 numbers, that is evenly over binades, not evenly over the range.
    """

    name: str
    exact: Evaluate
    low: float
    high: float
    tails: tuple[float | None, float | None]
    start: Literal["normal", "rising", "falling"]
    dense: bool = False

    def uniform(self, points: int = _UNIFORM_POINTS) -> Tensor:
        """``points`` numbers at equal distances over the range, float64."""
        return torch.linspace(self.low, self.high, points, dtype=torch.float64)

    def half(self, points: int | None = None) -> Tensor:
        """The FP16 numbers in the range, float64, in order; of more than ``points`` every so many-th, ends included."""
        x = _half_numbers()
        x = x[(x >= self.low) & (x <= self.high)]
        if points is None or len(x) <= points:
            return x
        return x[torch.linspace(0, len(x) - 1, points, dtype=torch.float64).round().long()]

    def samples(self, points: int) -> Tensor:
        """Numbers of the range as training sees them, float64: :meth:`half` where dense, else :meth:`uniform`."""
        return self.half(points) if self.dense else self.uniform(points)

    def __call__(self, x: Tensor) -> Tensor:
        """The exact values."""
        return self.exact(x)

    def errors(self, evaluate: Evaluate) -> dict[str, float]:
        """How far ``evaluate`` is off on the range.

        ``mean_abs`` and ``max_abs`` over equally spaced points; ``mean_rel`` over all FP16 numbers, relative to the
        value's magnitude or :data:`RELATIVE_FLOOR` (the measure of NLI).
        """
        x = self.uniform()
        off = (evaluate(x.float()).double() - self(x.float().double())).abs()
        return {
            "mean_abs": float(off.mean()),
            "max_abs": float(off.max()),
            "mean_rel": float(relative(evaluate, self, self.half()).mean()),
        }


def relative(evaluate: Evaluate, function: Function, x: Tensor) -> Tensor:
    """Relative error at each ``x`` (float64), with :data:`RELATIVE_FLOOR`."""
    y = function(x)
    return (evaluate(x.float()).double() - y).abs() / y.abs().clamp(min=RELATIVE_FLOOR)


@cache
def _half_numbers() -> Tensor:
    """All finite FP16 numbers in order, zero once."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).double()
    return torch.unique(x[x.isfinite()])


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x)


# Ranges of exp, 1/x and 1/sqrt: Table 1 of NN-LUT as the public replication quotes it. The range of GELU, that of SiLU
# (which the paper does not have; it is the replication's), and the tails are inferred.
FUNCTIONS: dict[str, Function] = {
    function.name: function
    for function in (
        Function("gelu", _gelu, -5.0, 5.0, (0.0, 1.0), "normal"),
        Function("silu", F.silu, -10.0, 10.0, (0.0, 1.0), "normal"),
        Function("exp", torch.exp, -256.0, 0.0, (0.0, None), "rising"),
        Function("reciprocal", torch.reciprocal, 1.0, 1024.0, (None, 0.0), "falling", dense=True),
        Function("rsqrt", torch.rsqrt, 0.1, 1024.0, (None, 0.0), "falling", dense=True),
    )
}


def function_named(name: str) -> Function:
    """One of :data:`FUNCTIONS`. Raises ReqatError for another name."""
    if name not in FUNCTIONS:
        raise unknown("function", name, FUNCTIONS)
    return FUNCTIONS[name]


def check_entries(function: Function, entries: int, least: int) -> None:
    """Raise ReqatError unless a table of ``function`` may have this many entries."""
    if isinstance(entries, bool) or not isinstance(entries, int) or entries < least:
        raise ReqatError(f"a table of {function.name} with {entries!r} entries: {least} at least are needed")
