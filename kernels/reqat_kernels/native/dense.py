"""A linear layer with a bfloat16 or float32 weight that is not quantized (the output head), for few rows, on a CPU.

One row of float32 against a bfloat16 weight runs at the speed of memory here, two to three times as fast as torch's
own product, whose kernel is made for many rows. A row of the result does not depend on the other rows, which torch's
float32 product does not promise: tokens that are read together get the logits that they get one by one.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from reqat.formats.subnormals import subnormals_kept
from reqat_kernels.native import check
from reqat_kernels.native.library import OPERATORS, library, threads

#: Up to so many rows the native kernel is the faster one.
MOST_ROWS = 8
_WORK_PER_THREAD = 1 << 18
_CHUNK_ROWS = 4096

OPERATORS.define("dense_bf16(Tensor x, Tensor weight) -> Tensor")
OPERATORS.define("dense_f32(Tensor x, Tensor weight) -> Tensor")


def dense_bf16(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` in float32: x [M, K], converted to float32; weight bfloat16 [N, K]. Not differentiable.

    Raises ValueError for other shapes, types or devices, TypeError for what is no tensor.
    """
    check.tensor("x", x)  # the dispatcher calls nothing for arguments without a tensor
    check.tensor("weight", weight)
    result: Tensor = torch.ops.reqat.dense_bf16(x, weight)
    return result


def dense_f32(x: Tensor, weight: Tensor) -> Tensor:
    """The same with a float32 weight."""
    check.tensor("x", x)
    check.tensor("weight", weight)
    result: Tensor = torch.ops.reqat.dense_f32(x, weight)
    return result


def widened(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """``x @ weight.T`` [M, N], times the ``scale`` [N] of the weight's rows: float32 x [M, K], products in float32.

    The weight, of any type, is converted some thousands of rows at a time.
    """
    y = x.new_empty(len(x), len(weight))
    with subnormals_kept(weight):
        for low in range(0, len(weight), _CHUNK_ROWS):
            rows = slice(low, low + _CHUNK_ROWS)
            product = F.linear(x, weight[rows].float())
            y[:, rows] = product if scale is None else product.mul_(scale[rows])
    return y


def _check(x: Tensor, weight: Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
    check.tensor("x", x)
    check.tensor("weight", weight)
    if weight.dtype != dtype or weight.ndim != 2 or x.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x [M, K] and a {dtype} weight [N, K] are needed, got {tuple(x.shape)} and {weight.dtype} "
            f"{tuple(weight.shape)}"
        )
    check.floats("x", x, device=weight.device)


def _dense_bf16(x: Tensor, weight: Tensor) -> Tensor:
    _check(x, weight)
    x = x.float()
    lib = _library()
    if lib is None or len(x) > MOST_ROWS:
        with subnormals_kept(weight):
            return F.linear(x.bfloat16(), weight).float() if len(x) > MOST_ROWS else F.linear(x, weight.float())
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty(len(x), len(weight), dtype=torch.float32, device="cpu")
    if y.numel():
        n = threads(y.numel() * x.shape[1], _WORK_PER_THREAD)
        where = (check.address(weight), check.address(x), y.data_ptr())
        lib.reqat_dense_bf16(*where, len(x), len(weight), x.shape[1], n)
    return y


def _meta(x: Tensor, weight: Tensor) -> Tensor:
    _check(x, weight)
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32)


def _dense_f32(x: Tensor, weight: Tensor) -> Tensor:
    _check(x, weight, torch.float32)
    lib = _library()
    if lib is None or len(x) > MOST_ROWS:
        with subnormals_kept(weight):
            return F.linear(x.float(), weight)
    x, weight = x.float().contiguous(), weight.contiguous()
    y = torch.empty(len(x), len(weight), dtype=torch.float32, device="cpu")
    if y.numel():
        n = threads(y.numel() * x.shape[1], _WORK_PER_THREAD)
        where = (check.address(weight), check.address(x), y.data_ptr())
        lib.reqat_dense_f32(*where, len(x), len(weight), x.shape[1], n)
    return y


def _meta_f32(x: Tensor, weight: Tensor) -> Tensor:
    _check(x, weight, torch.float32)
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32)


for _name, _function, _fake in (("dense_bf16", _dense_bf16, _meta), ("dense_f32", _dense_f32, _meta_f32)):
    OPERATORS.impl(_name, _function, "CPU")
    torch.library.register_fake(f"reqat::{_name}", _fake)


@cache
def _library() -> ctypes.CDLL | None:
    lib = library()
    if lib is not None:
        for call in (lib.reqat_dense_bf16, lib.reqat_dense_f32):
            call.argtypes = [*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 3, ctypes.c_int]
    return lib
