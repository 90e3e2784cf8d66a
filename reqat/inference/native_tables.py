"""Matrices of the vocabulary [N, K] as the native kernels read them; see :class:`reqat.inference.backend.Table`."""

from __future__ import annotations

import torch
from torch import Tensor

from reqat.formats import get_format, quantize
from reqat_kernels.native.dense import MOST_ROWS, dense_bf16, dense_f32, widened
from reqat_kernels.native.gemm import PackedWeight, allocate, linear, pack_weight
from reqat_kernels.native.int8 import linear_int8, pack_int8


class Bf16Table:
    """bfloat16, in huge pages, where it takes two thirds of the time to read."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = allocate(2 * weight.numel()).view(torch.bfloat16).view(weight.shape).copy_(weight)

    def rows_at(self, ids: Tensor) -> Tensor:
        """As they are."""
        return self.weight[ids].float()

    def times(self, x: Tensor, rounded: bool) -> Tensor:
        """In float32; more than eight rows of bfloat16 in that type, which PyTorch multiplies faster."""
        assert not rounded
        many = len(x) > MOST_ROWS and x.dtype != torch.bfloat16
        return widened(x.float(), self.weight) if many else dense_bf16(x, self.weight)

    def tensors(self) -> dict[str, Tensor]:
        """One piece."""
        return {"weight": self.weight}


class Float32Table:
    """float32, in huge pages: the own head of a float32 model."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = allocate(4 * weight.numel()).view(torch.float32).view(weight.shape).copy_(weight)

    def rows_at(self, ids: Tensor) -> Tensor:
        """As they are."""
        return self.weight[ids]

    def times(self, x: Tensor, rounded: bool) -> Tensor:
        """In float32."""
        assert not rounded
        return dense_f32(x, self.weight)

    def tensors(self) -> dict[str, Tensor]:
        """One piece."""
        return {"weight": self.weight}


class Int8Table:
    """Symmetric, a scale for each row (the largest magnitude is 127)."""

    def __init__(self, weight: Tensor) -> None:
        self.packed = pack_int8(quantize(weight.float(), get_format("INT8-row")))

    def rows_at(self, ids: Tensor) -> Tensor:
        """Dequantized."""
        return self.packed.rows_at(ids)

    def times(self, x: Tensor, rounded: bool) -> Tensor:
        """In float32, or in integers where x is rounded."""
        return linear_int8(x, self.packed, inputs="A8" if rounded else None)

    def tensors(self) -> dict[str, Tensor]:
        """Codes and scales."""
        return {"codes": self.packed.codes, "scale": self.packed.scale}


class Fp4Table:
    """NVFP4 or MXFP4, each number rounded to the nearest, in the order of the matrix product of linear layers."""

    def __init__(self, weight: Tensor, name: str) -> None:
        self.packed: PackedWeight = pack_weight(quantize(weight.float(), get_format(name)))

    def rows_at(self, ids: Tensor) -> Tensor:
        """Dequantized."""
        return self.packed.rows_at(ids)

    def times(self, x: Tensor, rounded: bool) -> Tensor:
        """Exact within a block where x is rounded, float32 across blocks."""
        # The kernel takes bfloat16 as it is but gives back x's type, and logits are float32.
        if rounded:
            return linear(x.float(), self.packed, inputs="A8")
        y: Tensor = torch.ops.reqat.fp4_linear(x, self.packed.data, None, *self.packed.layout)
        return y

    def tensors(self) -> dict[str, Tensor]:
        """Codes and scales are one piece."""
        return {"data": self.packed.data}
