"""A linear layer with an int8 weight and a scale for each of its rows (the output head), for few rows of x, on a CPU.

``y = scale * (x @ codes.T)``, with x unrounded (float32 sums: within ``(K + 2) * 2^-24`` of the sum of the products'
magnitudes) or rounded to int8 a row at a time (``"A8"``, as :func:`reqat_kernels.native.gemm.quantize_input` does it):
then sums are integers, exact, and results the same bits from every instruction set and from PyTorch. A row of the
result does not depend on the other rows, up to :data:`~reqat_kernels.native.dense.MOST_ROWS` of them.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from reqat.formats import QuantizedTensor
from reqat.formats.subnormals import subnormals_kept
from reqat_kernels.native import check
from reqat_kernels.native.dense import MOST_ROWS, widened
from reqat_kernels.native.gemm import quantize_input
from reqat_kernels.native.library import OPERATORS, library, threads
from reqat_kernels.native.weights import allocate

#: Columns up to which a sum of products of int8 stays inside 32 bits.
MOST_COLUMNS = 1 << 17
_WORK_PER_THREAD = 1 << 18
_CHUNK_ROWS = 4096  # of the weight, as float32 at a time

OPERATORS.define("dense_int8(Tensor x, Tensor weight, Tensor scale) -> Tensor")
OPERATORS.define("dense_int8_a8(Tensor x, Tensor row_scale, Tensor weight, Tensor scale) -> Tensor")


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """``codes``: int8 [N, K], contiguous; ``scale``: float32 [N]. Raises ValueError (TypeError) for other parts."""

    codes: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        _check_weight(self.codes, self.scale)

    def rows_at(self, ids: Tensor) -> Tensor:
        """The weight's rows ``ids`` (integers, any shape [...]) as numbers, float32 [..., K]. Raises IndexError for a
        row that is not there."""
        check.rows("ids", ids, len(self.codes))
        with subnormals_kept(self.scale):
            return self.codes[ids].float().mul_(self.scale[ids].unsqueeze(-1))


def pack_int8(q: QuantizedTensor) -> Int8Weight:
    """A weight [N, K] in INT8-row, its codes in huge pages. Raises ValueError for another format, TypeError."""
    if not isinstance(q, QuantizedTensor):
        raise TypeError(f"a weight is a QuantizedTensor, as reqat.quantize makes it, not a {type(q).__name__}")
    q.check("weight")
    if q.format.name != "INT8-row" or len(q.shape) != 2 or q.axis != 1:
        raise ValueError(f"a weight [N, K] in INT8-row is needed, got {q.format.name} of shape {list(q.shape)}")
    codes = allocate(q.codes.numel()).view(torch.int8).view(q.codes.shape)
    codes.copy_(q.codes.view(torch.int8))
    return Int8Weight(codes, q.scales.reshape(-1).float().contiguous())


def linear_int8(x: Tensor, w: Int8Weight, *, inputs: Literal["A8"] | None = None) -> Tensor:
    """``x @ w.T`` in float32: x [M, K] of any float type. ``inputs``: unrounded (None) or ``"A8"``.

    Raises ValueError for shapes, types or devices that do not fit, and, rounding x, for NaN and infinity; TypeError.
    """
    if not isinstance(w, Int8Weight):
        raise TypeError(f"w is a {type(w).__name__}, not an Int8Weight; pack_int8() makes one")
    check.floats("x", x, ndim=2)
    if inputs is None:
        result: Tensor = torch.ops.reqat.dense_int8(x, w.codes, w.scale)
        return result
    if inputs != "A8":
        raise ValueError(f"inputs={inputs!r}: None (unrounded) or 'A8'")
    rounded = quantize_input(x, "A8", block=1)
    assert rounded.row_scale is not None
    result = torch.ops.reqat.dense_int8_a8(rounded.x, rounded.row_scale, w.codes, w.scale)
    return result


def _check_weight(weight: Tensor, scale: Tensor) -> None:
    check.tensor("weight", weight)
    if weight.ndim != 2 or weight.shape[1] > MOST_COLUMNS:
        raise ValueError(f"an int8 weight is [N, K] with K up to {MOST_COLUMNS}, got {list(weight.shape)}")
    N, K = weight.shape
    check.exactly("weight", weight, torch.int8, (N, K), weight.device)
    check.exactly("scale", scale, torch.float32, (N,), weight.device)


def _check(x: Tensor, weight: Tensor, scale: Tensor) -> None:
    _check_weight(weight, scale)
    if check.tensor("x", x).ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x of shape {list(x.shape)} does not fit a weight of shape {list(weight.shape)}")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device}, the weight on {weight.device}: move one of them")


def _dense_int8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    _check(x, weight, scale)
    check.floats("x", x, device=weight.device)
    x, lib = x.float().contiguous(), _library()
    y = torch.empty(len(x), len(weight), dtype=torch.float32, device="cpu")
    if not y.numel():
        return y
    if lib is None or len(x) > MOST_ROWS:
        return widened(x, weight, scale)
    n = threads(y.numel() * x.shape[1], _WORK_PER_THREAD)
    where = (check.address(weight), check.address(scale), check.address(x), y.data_ptr())
    lib.reqat_dense_int8(*where, len(x), *weight.shape, n)
    return y


def _check_a8(x: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor) -> None:
    _check(x, weight, scale)
    check.exactly("x", x, torch.int8, tuple(x.shape), weight.device)
    check.exactly("row_scale", row_scale, torch.float32, (len(x),), weight.device)


def _dense_int8_a8(x: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    _check_a8(x, row_scale, weight, scale)
    lib = _library()
    y = torch.empty(len(x), len(weight), dtype=torch.float32, device="cpu")
    if not y.numel():
        return y
    if lib is None:
        with subnormals_kept(scale):
            for low in range(0, len(weight), _CHUNK_ROWS):
                rows = slice(low, low + _CHUNK_ROWS)
                dot = F.linear(x.double(), weight[rows].double()).float()  # float64 holds the integers exactly
                y[:, rows] = dot.mul_(scale[rows] * row_scale[:, None])
        return y
    n = threads(y.numel() * x.shape[1], _WORK_PER_THREAD)
    where = (check.address(weight), check.address(scale), check.address(x), check.address(row_scale), y.data_ptr())
    lib.reqat_dense_int8_a8(*where, len(x), *weight.shape, n)
    return y


def _meta(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    _check(x, weight, scale)
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32)


def _meta_a8(x: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    _check_a8(x, row_scale, weight, scale)
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32)


for _name, _function, _fake in (("dense_int8", _dense_int8, _meta), ("dense_int8_a8", _dense_int8_a8, _meta_a8)):
    OPERATORS.impl(_name, _function, "CPU")
    torch.library.register_fake(f"reqat::{_name}", _fake)


@cache
def _library() -> ctypes.CDLL | None:
    lib = library()
    if lib is not None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        lib.reqat_dense_int8.argtypes = [*[pointer] * 4, *[number] * 3, ctypes.c_int]
        lib.reqat_dense_int8_a8.argtypes = [*[pointer] * 5, *[number] * 3, ctypes.c_int]
    return lib
