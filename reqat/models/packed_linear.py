"""Linear layers of a packed model: four-bit codes and scales and no dense weight, inputs rounded to integers.

Layers that read the same tensor share one :class:`PackedInput`, as their fake-quantized twins share one
:class:`~reqat.models.linear.InputQuantizer`.
"""

from __future__ import annotations

from torch import Tensor, nn

from reqat.models.linear import InputQuantizer, QuantLinear
from reqat.quant import Precision, block_hadamard
from reqat_kernels.native import gemm
from reqat_kernels.native.dense import dense_bf16


class PackedInput(InputQuantizer):
    """Rounds the input of packed layers, once for all that read it."""

    def __init__(self, source: InputQuantizer, precision: Precision, block: int) -> None:
        super().__init__(precision, source.consumers, source.name or "input")
        self.global_scale = source.global_scale
        self.block = block

    def compute(self, x: Tensor) -> Tensor | gemm.QuantizedInput:
        """Rotated and rounded to integers, or only rotated where the precision leaves inputs alone."""
        if self.rotation is not None:
            x = block_hadamard(x, self.rotation)
        if self.format is None:
            return x
        return gemm.quantize_input(x, self.format, block=self.block, global_scale=self.global_scale, name=self.name)


class PackedLinear(nn.Module):
    """``y = Q(x) W^T + b`` with W [N, K] packed; x [..., K]. Inference only."""

    def __init__(self, linear: QuantLinear, inputs: PackedInput, room: Tensor | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.name = linear.in_features, linear.out_features, linear.name
        self.packed = gemm.pack_weight(linear.quantize_weight(), room)
        self.register_buffer("data", self.packed.data, persistent=False)
        self.bias = linear.bias
        self.input_quantizer = inputs
        self.train(False)

    def forward(self, x: Tensor) -> Tensor:
        """The product, in x's dtype."""
        return gemm.linear(self.input_quantizer(x), self.packed, self.bias)

    def extra_repr(self) -> str:
        """Shape and size, for ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.packed.nbytes:,} bytes"


class HalfHead(nn.Module):
    """The output head of a packed model in bfloat16: never quantized, read at the speed of memory, float32 logits."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = head.in_features, head.out_features
        self.weight = head.weight
        self.train(False)

    def forward(self, x: Tensor) -> Tensor:
        """``x @ weight.T``, float32: x [..., K]."""
        return dense_bf16(x.reshape(-1, self.in_features), self.weight).view(*x.shape[:-1], self.out_features)
