"""Linear layers: weights quantized when they are loaded, inputs whenever they are read.

vLLM joins layers that read the same input (q, k and v; gate and up). Each of the joined weights is quantized by itself,
as reqat does, since each has a global scale of its own. Codes of a frozen model are taken from the sidecar and never
computed a second time. Under tensor parallelism a rank holds a share of each weight; scales are those of the whole one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)

from reqat.config.errors import ReqatError
from reqat.formats import Format, global_scale_for, quantize_dequantize
from reqat.formats.hadamard import block_hadamard
from reqat.formats.stored import read_weight
from reqat.vllm.operators import fake_quantize, largest_of_ranks, spelled

if TYPE_CHECKING:
    from reqat.vllm.config import Folder


@register_weight_loader_v2_supported_method
class ReqatLinearMethod(UnquantizedLinearMethod):
    """The method of a layer that stands for the layers ``names`` of the folder."""

    supports_pre_processed_weights = False

    def __init__(self, folder: Folder, names: tuple[str, ...]) -> None:
        super().__init__()
        self.folder, self.names = folder, names
        self.inputs, self.rotation = spelled(folder.precision.inputs), folder.precision.rotation
        self.split = False

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Make room for the dense weight, and take the static scale of the input from the folder."""
        super().create_weights(layer, input_size_per_partition, output_partition_sizes, input_size, *args, **kwargs)
        self.widths = list(output_partition_sizes)
        self.shards = _shards(layer, self.names)
        self.split = isinstance(layer, RowParallelLinear) and layer.tp_size > 1
        self._check_blocks(layer, input_size_per_partition)
        layer.register_buffer("reqat_input_scale", self._input_scale(), persistent=False)

    def _check_blocks(self, layer: Any, columns: int) -> None:
        """Raise ReqatError where a rank's share of a row cuts a block, or a scale would need the other ranks' share."""
        precision, ranks = self.folder.precision, layer.tp_size
        for role, fmt in (("weights", precision.weights), ("inputs", precision.inputs)):
            if fmt is None:
                continue
            if self.split and fmt.block is None:
                raise ReqatError(
                    f"{self.names[0]}: {role} of {fmt} have one scale a row, and tensor parallelism of {ranks} splits "
                    "rows: serve it with tensor_parallel_size=1"
                )
            if columns % (fmt.block or columns):
                raise ReqatError(
                    f"{self.names[0]}: {columns} columns on each of {ranks} ranks are no multiple of {fmt}'s block of "
                    f"{fmt.block}: choose a smaller tensor_parallel_size"
                )
            if fmt.per_tensor and ranks > 1:
                raise ReqatError(
                    f"{self.names[0]}: {role} of {fmt} have one scale for all, and tensor parallelism of {ranks} "
                    "splits them: serve it with tensor_parallel_size=1"
                )
        if precision.rotation and columns % precision.rotation:
            raise ReqatError(
                f"{self.names[0]}: {columns} columns on each of {ranks} ranks are no multiple of the rotation's "
                f"{precision.rotation}: choose a smaller tensor_parallel_size"
            )

    def _input_scale(self) -> Tensor | None:
        fmt = self.folder.precision.inputs
        if fmt is None or fmt.global_scale != "static":
            return None
        scales = [self.folder.measured(f"{name}.input_global_scale") for name in self.names]
        if any(float(scale) != float(scales[0]) for scale in scales):
            raise ReqatError(f"{', '.join(self.names)} read one input, and their static scales of it differ")
        return scales[0].reshape(()).to(torch.empty(0).device)  # where vLLM makes its parameters

    @torch.no_grad()
    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Put the weight into four bits."""
        tp_size: Any = layer.tp_size
        shared = bool(tp_size > 1)
        weight: Any = layer.weight  # a parameter of vLLM's, which knows how to load its shards
        parts = weight.data.split(self.widths)
        for name, shard, part in zip(self.names, self.shards, parts, strict=True):
            if name in self.folder.about.layers:
                dense = read_weight(self.folder.about, name).dequantize(torch.float32).to(part.dtype)
                given = () if shard is None else (shard,)
                weight.weight_loader(weight, dense.to(part.device), *given)
            else:
                part.copy_(self._quantized(part.contiguous(), name, shared))
        super().process_weights_after_loading(layer)

    def _quantized(self, weight: Tensor, name: str, shared: bool) -> Tensor:
        fmt = self.folder.precision.weights
        if self.rotation is not None:
            weight = block_hadamard(weight, self.rotation)
        if fmt is None:
            return weight
        scale = self._whole_scale(weight, fmt) if shared else None
        return quantize_dequantize(weight, fmt, global_scale=scale, name=f"{name}.weight")

    def _whole_scale(self, weight: Tensor, fmt: Format) -> Tensor | None:
        """The global scale of a weight of which this rank has a share; None where the share's own is that."""
        if fmt.global_scale == "dynamic":
            return global_scale_for(largest_of_ranks(weight.abs().amax().float().reshape(1)), fmt)
        if fmt.global_scale == "row" and self.split:
            return global_scale_for(largest_of_ranks(weight.abs().amax(-1, keepdim=True).float()), fmt)
        return None

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``Q(x) Q(W)^T + b``, x [T, K]."""
        if self.inputs or self.rotation:
            scale: Any = layer.reqat_input_scale
            x = fake_quantize(x, self.inputs, rotation=self.rotation, global_scale=scale, split=self.split)
        return super().apply(layer, x, bias)


def _shards(layer: torch.nn.Module, names: tuple[str, ...]) -> tuple[str | int | None, ...]:
    """By what name vLLM's own loader takes each of the joined weights. Raises ReqatError for a layer that joins weights
    in a way that is not known here."""
    if isinstance(layer, QKVParallelLinear) and len(names) == 3:
        return ("q", "k", "v")
    if isinstance(layer, MergedColumnParallelLinear) and len(names) == len(layer.output_sizes):
        return tuple(range(len(names)))
    if isinstance(layer, LinearBase) and len(names) == 1:
        return (None,)
    raise ReqatError(f"{', '.join(names)}: joined in a {type(layer).__name__}, whose weights cannot be told apart here")
