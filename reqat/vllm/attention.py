"""Keys and values: quantized on their way into vLLM's cache, which holds numbers of the model's type.

They arrive after RoPE, where reqat quantizes them. Q-FIT's shift is subtracted and never added back; where keys are
rotated, so are queries. Keys and values are computed in float32, whatever the model's type; the cache then rounds to
that, as rotated queries are at once.

Shapes: T tokens, G key/value heads of this rank, H query heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import set_default_quant_scales
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backend import AttentionType

from reqat.config.errors import ReqatError
from reqat.formats.precision import Precision
from reqat.vllm.operators import fake_quantize, spelled

if TYPE_CHECKING:
    from reqat.vllm.config import Folder


class ReqatKVMethod(BaseKVCacheMethod):
    """The method of the attention of layer ``index``."""

    supports_pre_processed_weights = False

    def __init__(self, folder: Folder, name: str, index: int) -> None:
        self.folder, self.name, self.index = folder, name, index

    def create_weights(self, layer: Any) -> None:
        """Take shift and static scales from the folder, and let ``layer`` quantize before it attends. vLLM calls this
        when the layer is otherwise complete."""
        self._check(layer)
        precision, device = self.folder.precision, torch.empty(0).device
        shift = self.folder.tensors.get(f"layers.{self.index}.kv_shift") if precision.keys is not None else None
        if shift is not None:
            shift = _of_rank(shift, layer, self.name).to(device)
        layer.register_buffer("reqat_shift", shift, persistent=False)
        for role, fmt in (("keys", precision.keys), ("values", precision.values)):
            scale = None
            if fmt is not None and fmt.global_scale == "static":
                scale = self.folder.measured(f"layers.{self.index}.{role}_global_scale").reshape(()).to(device)
            layer.register_buffer(f"reqat_{role}_scale", scale, persistent=False)
        layer.forward = _quantizing(layer, precision)

    def _check(self, layer: Any) -> None:
        """Raise ReqatError for attention that a shift would change, or that stores numbers of another kind."""
        if layer.attn_type != AttentionType.DECODER:
            raise ReqatError(f"{self.name}: attention of type {layer.attn_type!r} is not supported, causal alone is")
        if is_quantized_kv_cache(layer.kv_cache_dtype):
            raise ReqatError(
                f"{self.name}: kv_cache_dtype={layer.kv_cache_dtype!r} would quantize keys and values a second time: "
                "leave it out"
            )
        if layer.has_sink or getattr(layer.impl, "logits_soft_cap", None) or getattr(layer.impl, "alibi_slopes", None):
            raise ReqatError(f"{self.name}: attention with sinks, soft caps or ALiBi is not supported")
        if layer.kv_sharing_target_layer_name is not None:
            raise ReqatError(f"{self.name}: layers that share keys and values are not supported")

    def apply(self, layer: nn.Module) -> Tensor:
        """Never called: vLLM computes attention."""
        raise RuntimeError(f"{type(self).__name__}.apply is not called")

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """No scales of vLLM's own: the numbers are in their own units."""
        set_default_quant_scales(layer, register_buffer=False)


def _quantizing(layer: Any, precision: Precision) -> Callable[..., Tensor]:
    """The forward pass of an attention layer, with keys and values quantized first."""
    inner, heads, groups = layer.forward, layer.num_heads, layer.num_kv_heads
    key_size, value_size = layer.head_size, layer.head_size_v
    keys, values = spelled(precision.keys), spelled(precision.values)
    signs, rotation = precision.kv_signs, precision.kv_rotation

    def forward(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if keys and rotation is not None:
            query_THD = query.view(-1, heads, key_size)
            query = fake_quantize(query_THD, "", signs=signs, rotation=rotation).view(query.shape)
        if keys:
            key_TGD = key.view(-1, groups, key_size).float()
            shift, scale = layer.reqat_shift, layer.reqat_keys_scale
            key_TGD = fake_quantize(key_TGD, keys, shift=shift, signs=signs, rotation=rotation, global_scale=scale)
            key = key_TGD.to(key.dtype).view(key.shape)
        if values:
            value_TGD = value.view(-1, groups, value_size).float()
            value_TGD = fake_quantize(value_TGD, values, global_scale=layer.reqat_values_scale)
            value = value_TGD.to(value.dtype).view(value.shape)
        return inner(query, key, value, *args, **kwargs)

    return forward


def _of_rank(shift: Tensor, layer: Attention, name: str) -> Tensor:
    """This rank's heads [G, D] of a shift of all of them; ranks that are more than heads share one."""
    ranks, rank, heads = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank(), len(shift)
    first = rank * layer.num_kv_heads if heads >= ranks else rank * heads // ranks
    share = shift[first : first + layer.num_kv_heads]
    if tuple(share.shape) != (layer.num_kv_heads, layer.head_size):
        raise ReqatError(
            f"{name}: the folder has a shift of {tuple(shift.shape)}, and the layer {layer.num_kv_heads} heads of "
            f"{layer.head_size} on each of {ranks} ranks: it is of another model"
        )
    return share.contiguous()
