"""A convolution whose weight and input are quantized: a linear layer over the channels of each patch of its input.

``QuantConv2d`` replaces ``nn.Conv2d`` in place. Blocks of a format run along channels, as engines with channels last
lay tensors out: of the input [B, C, H, W] along C at each pixel, of the weight along its rows [N, kh kw C]. So a block
never crosses pixels, and each input is quantized once, not once a patch. Zeros of the padding stay zeros.

The parameter ``weight`` is that matrix, and everything that :class:`~reqat.models.linear.QuantLinear` does with a
weight [N, K] (freezing, codes, the sidecar) holds for it; state dicts have it as an ordinary convolution would, [N, C,
kh, kw].
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from reqat.models.linear import InputQuantizer, QuantLinear
from reqat.quant import Precision


class ChannelQuantizer(InputQuantizer):
    """An :class:`~reqat.models.linear.InputQuantizer` of tensors [B, C, H, W], which quantizes along C."""

    def compute(self, x: Tensor) -> Tensor:
        """``x`` rotated and fake-quantized."""
        out: Tensor = super().compute(x.permute(0, 2, 3, 1))
        return out.permute(0, 3, 1, 2)


class QuantConv2d(QuantLinear):
    """``nn.Conv2d`` without groups and with zeros for padding; weight [N, kh kw C], input [B, C, H, W]."""

    def __init__(self, conv: nn.Conv2d, precision: Precision, input_quantizer: InputQuantizer, name: str) -> None:
        super().__init__(_as_linear(conv), precision, input_quantizer, name)
        self.kernel = conv.kernel_size
        self.call: dict[str, Any] = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}

    def as_rows(self, weight: Tensor) -> Tensor:
        """A weight [N, C, kh, kw] as the matrix [N, kh kw C]; a matrix as it is."""
        return weight if weight.ndim == 2 else rows_of(weight)

    def as_kernels(self, weight: Tensor) -> Tensor:
        """The inverse: a matrix [N, kh kw C], of any N and C, as [N, C, kh, kw], in the memory that it has."""
        return weight.unflatten(1, (*self.kernel, -1)).permute(0, 3, 1, 2)

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """The convolution of what was quantized already."""
        return F.conv2d(x, self.as_kernels(weight), self.bias, **self.call)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        key = f"{prefix}weight"
        destination[key] = self.as_kernels(destination[key]).contiguous()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = f"{prefix}weight"
        if key in state_dict:
            state_dict[key] = self.as_rows(state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Shape and state, for ``print(model)``."""
        return f"{super().extra_repr()}, kernel={self.kernel}, stride={self.call['stride']}"


def rows_of(weight: Tensor) -> Tensor:
    """A convolution's weight [N, C, kh, kw] as the matrix [N, kh kw C]."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _as_linear(conv: nn.Conv2d) -> nn.Linear:
    """The convolution's matrix and bias as those of a linear layer."""
    rows = rows_of(conv.weight.detach())
    linear = nn.Linear(rows.shape[1], rows.shape[0], device="meta")
    linear.weight = nn.Parameter(rows, requires_grad=conv.weight.requires_grad)
    linear.bias = conv.bias  # type: ignore[assignment]
    return linear.train(conv.training)
