"""What a gradient rule is, and what rules share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from reqat.formats import Format, QuantizedTensor
from reqat.formats import quantize as quantize_codes
from reqat.formats.hadamard import block_hadamard


@dataclass(frozen=True)
class Rounding:
    """How a quantizer rounds a tensor along its last axis: the format, a given global scale, the size of the Hadamard
    blocks that rotate it before, and what to call it in an error."""

    fmt: Format
    global_scale: Tensor | None = None
    rotation: int | None = None
    name: str | None = None

    def rotate(self, x: Tensor) -> Tensor:
        """``x`` rotated, or itself; the gradient is rotated back."""
        return x if self.rotation is None else _Rotate.apply(x, self.rotation)

    def codes(self, rotated: Tensor) -> QuantizedTensor:
        """Codes and scales of what was rotated."""
        return quantize_codes(rotated, self.fmt, global_scale=self.global_scale, name=self.name)


class _Rotate(torch.autograd.Function):
    """y = x R, dx = dy R, with R the block Hadamard rotation, which is symmetric."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: int) -> Tensor:  # type: ignore[override]
        ctx.rotation = rotation
        return block_hadamard(x, rotation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return block_hadamard(grad, ctx.rotation), None


def within(x: Tensor, bound: Tensor | float) -> Tensor:
    """Where ``|x| <= bound``, both float32, for a bound that is made of a scale.

    A scale that is the float32 quotient of a block's largest magnitude and the largest code puts that magnitude up to
    2 ulp beyond the bound, though nothing is cut off there: hence a tolerance of 2^-20.
    """
    return x.abs() <= bound * (1 + 2**-20)


class GradientRule(nn.Module):
    """Fake quantization of one tensor, with a gradient.

    What it computes is what :func:`reqat.quant.fake_quantize` does, or it has parameters, which are trained with the
    model's and which :meth:`codes` respects: what training saw is what is frozen and exported.
    """

    name: ClassVar[str]
    #: Whether the result is that of :func:`reqat.quant.fake_quantize` and the gradient the identity's: a quantized
    #: weight may then be kept for further micro-batches.
    straight: ClassVar[bool] = False
    #: Whether weight decay acts on its parameters. Factors around 1 it would pull to 0.
    decayed: ClassVar[bool] = False

    def prepare(self, fmt: Format, role: str, rows: int | None, where: str) -> None:
        """Called once with what the quantizer rounds: its format, the tensor's role (weights, inputs, keys, values),
        its rows if their number is fixed (a weight's output channels), and its name. Raises ReqatError for what the
        rule does not do."""

    def forward(self, x: Tensor, at: Rounding) -> Tensor:
        """``x`` rotated and rounded, in its shape and dtype."""
        raise NotImplementedError

    def codes(self, rotated: Tensor, at: Rounding) -> QuantizedTensor:
        """What :meth:`forward` gives for a tensor that has been rotated, as codes and scales."""
        return at.codes(rotated)
