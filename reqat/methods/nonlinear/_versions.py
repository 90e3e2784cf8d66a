"""A table in the arithmetic of hardware: FP32, FP16, or 32-bit integers.

FP32 runs in the native kernel. What the other two do in detail is inferred, since the paper says only that there are
such versions:

- FP16: input, breakpoints, slopes and intercepts are FP16 numbers (an input saturates at the largest); the product is
  rounded to FP16, then the sum.
- INT32: ``x = q 2^-e`` with q an integer; a slope is ``p 2^-f``, an intercept a multiple of ``2^-(e + f)``. Products
  and sums are exact and stay below 2^31, so q and p share 30 bits. ``e`` is the one of least mean error over the
  samples that networks are trained on. An input beyond the function's reach saturates; NaN, which no integer is,
  becomes 0.
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
_BITS = 30  # of the product of an input and a slope; its sum with an intercept fits in 31 and a sign
_LEAST_BITS = 6


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
    """Integers throughout, between a rounded input and a scaled output; takes any float dtype and gives it back."""

    def __init__(self, table: Table, function: Function) -> None:
        reach = math.log2(function.reach)
        x = function.samples(4096)
        best = math.inf
        for bits in range(_LEAST_BITS, _BITS - _LEAST_BITS + 1):
            codes = _codes(table, bits, bits - int(reach))
            off = float((_evaluate(codes, x) - function(x)).abs().mean())
            if off < best:
                best, self.codes = off, codes

    def __call__(self, x: Tensor) -> Tensor:
        """Values at ``x``."""
        return _evaluate(self.codes, x).to(x.dtype)


# bits of an input; e; f; breakpoints, slopes and intercepts as int64 tensors that hold 32-bit numbers.
_Codes = tuple[int, int, int, Tensor, Tensor, Tensor]


def _codes(table: Table, bits: int, e: int) -> _Codes:
    def exponent(largest: float, room: int) -> int:
        return room - math.ceil(math.log2(largest)) if largest > 0 else 60

    slope, intercept = float(table.slopes.abs().max()), float(table.intercepts.abs().max())
    f = min(exponent(slope, _BITS - bits), exponent(intercept, _BITS) - e)

    def scaled(x: Tensor, by: int) -> Tensor:
        return (x * 2.0**by).round().long()

    limit = 2**31 - 1
    # x >= d for a code q is q 2^-e >= d, that is q >= ceil(d 2^e).
    breakpoints = (table.breakpoints * 2.0**e).ceil().clamp(-limit, limit).long()
    return bits, e, f, breakpoints, scaled(table.slopes, f), scaled(table.intercepts, e + f)


def _evaluate(codes: _Codes, x: Tensor) -> Tensor:
    bits, e, f, breakpoints, slopes, intercepts = codes
    limit = 2**bits
    q = (x.double() * 2.0**e).round().clamp(-limit, limit).nan_to_num(0.0).long()
    at = torch.bucketize(q, breakpoints, right=True)
    total = slopes[at] * q + intercepts[at]
    assert int(total.abs().max() if total.numel() else 0) < 2**31
    return total.double() * 2.0 ** -(e + f)


VERSIONS: dict[str, Callable[[Table, Function], Evaluate]] = {"fp32": FP32, "fp16": FP16, "int32": INT32}
