"""A table in the arithmetic of hardware: FP32, FP16, or 32-bit integers.

FP32 runs in the native kernel. What the other two do in detail is inferred, since the paper says only that there are
such versions:

- FP16: input, breakpoints, slopes and intercepts are FP16 numbers (an input saturates at the largest); the product is
  rounded to FP16, then the sum.
- INT32: an input is ``q 2^-e``, a slope ``p 2^-f``, an intercept ``c 2^-h``, with q, p and c integers of 32 bits, one
  e, f and h for a table. Product and sum are exact in 64 bits, as those of an integer multiply-accumulate unit. Were
  they held to 32 bits, q and p would share 30, and no division of 30 bits serves 1/sqrt, whose inputs and slopes
  span five powers of ten (docs/companions/nnlut.md has the error of that). An input beyond :data:`REACH` saturates;
  NaN, which no integer is, becomes 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from reqat.config.errors import ReqatError
from reqat.methods.nonlinear._function import Evaluate, Function
from reqat.methods.nonlinear._table import Table
from reqat_kernels.native.table import piecewise_linear

_HALF_MAX = 65504.0
_BITS = 30  # of an integer's magnitude: with a sign it is well within 32
#: Magnitude of the largest input that the integers cover: the upper end of the ranges of 1/x and 1/sqrt.
REACH = 1024.0


class FP32:
    """Float32 throughout. ``__call__`` takes any float dtype and gives it back."""

    def __init__(self, table: Table, function: Function) -> None:
        self.parts = tuple(x.float() for x in (table.breakpoints, table.slopes, table.intercepts))

    def __call__(self, x: Tensor) -> Tensor:
        """Values at ``x``."""
        return piecewise_linear(x, *self.parts)


class FP16:
    """FP16 throughout; takes any float dtype and gives it back.

    Raises ReqatError for a table with an entry beyond FP16's range.
    """

    def __init__(self, table: Table, function: Function) -> None:
        parts = (table.breakpoints, table.slopes, table.intercepts)
        largest = max((float(x.abs().max()) for x in parts if x.numel()), default=0.0)
        if largest > _HALF_MAX:
            raise ReqatError(
                f"a table of {function.name} holds {largest:g}, beyond FP16's {_HALF_MAX:g}: take another version"
            )
        self.breakpoints, self.slopes, self.intercepts = (x.half().float() for x in parts)

    def __call__(self, x: Tensor) -> Tensor:
        """Values at ``x``."""
        h = x.float().clamp(-_HALF_MAX, _HALF_MAX).half().float()
        at = torch.bucketize(h, self.breakpoints, right=True)
        # A product of two FP16 numbers is exact in float32, so it is rounded once.
        product = (self.slopes[at] * h).half().float()
        return (product + self.intercepts[at]).half().to(x.dtype)


class INT32:
    """Integers throughout, between a rounded input and a scaled output; takes any float dtype and gives it back.

    On the range of the table's function it is within :attr:`bound` of the table.
    """

    def __init__(self, table: Table, function: Function) -> None:
        slope, intercept = float(table.slopes.abs().max()), float(table.intercepts.abs().max())
        self.e = _room(REACH)
        # A sum of 2^60 and 2^61 at most fits into 64 bits.
        self.f = min(_room(slope), _room(intercept) + 31 - self.e)
        self.h = min(_room(intercept), self.e + self.f)
        # x >= d for an integer q is q 2^-e >= d, that is q >= ceil(d 2^e).
        breakpoints = (table.breakpoints * 2.0**self.e).ceil()
        self.breakpoints = breakpoints.clamp(-(2**31), 2**31 - 1).long()
        self.slopes = (table.slopes * 2.0**self.f).round().long()
        self.intercepts = (table.intercepts * 2.0**self.h).round().long()
        #: How far an input up to REACH may be off a continuous table: roundings of input, slope and intercept.
        self.bound = slope * 2.0 ** -(self.e + 1) + REACH * 2.0**-self.f + 2.0 ** -(self.h + 1)

    def __call__(self, x: Tensor) -> Tensor:
        """Values at ``x``."""
        limit = 2**_BITS
        q = (x.double() * 2.0**self.e).round().clamp(-limit, limit).nan_to_num(0.0).long()
        at = torch.bucketize(q, self.breakpoints, right=True)
        total = self.slopes[at] * q + (self.intercepts[at] << (self.e + self.f - self.h))
        return (total.double() * 2.0 ** -(self.e + self.f)).to(x.dtype)


def _room(largest: float) -> int:
    """The power of two that numbers up to ``largest`` are multiplied by to become 32-bit integers."""
    return _BITS - math.ceil(math.log2(largest)) if largest > 0 else _BITS


VERSIONS: dict[str, Callable[[Table, Function], Evaluate]] = {"fp32": FP32, "fp16": FP16, "int32": INT32}
