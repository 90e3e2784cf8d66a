"""What a supported decoder looks like, and where its linear layers are.

Nothing here goes by class names: a decoder layer is supported if it *does* what this package can swap, that is if it
has one self-attention with separate ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj``, causal softmax attention called
through transformers' ``AttentionInterface`` (sliding windows as far as they hide nothing), and dense ``nn.Linear``
layers otherwise. Llama, Mistral, Qwen2 and Qwen3 do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from reqat.config.errors import ReqatError

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
# Layers that read the same input tensor: its quantization is shared, and engines that fuse them want one global scale.
_SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

#: Names under which adapter libraries keep the layer that they wrap.
WRAPPED = ("base_layer", "original_module")


class UnsupportedModelError(ReqatError):
    """The model's attention or layers are of a kind that this package does not quantize."""


@dataclass(frozen=True)
class DecoderLayer:
    """One decoder layer: its index, its name in the model, and its self-attention module."""

    index: int
    name: str
    module: nn.Module
    attention: nn.Module


@dataclass(frozen=True)
class HeadShape:
    """Attention geometry, from the config."""

    query_heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class LinearSite:
    """Where an ``nn.Linear`` sits: ``getattr(parent, attribute)``, called ``name`` in the model."""

    name: str
    parent: nn.Module
    attribute: str

    @property
    def plain_name(self) -> str:
        """Its name without what an adapter around it adds: ``...q_proj`` of ``...q_proj.base_layer``."""
        return plain_name(self.name)

    @property
    def module(self) -> nn.Linear:
        """The layer that sits there now."""
        layer = getattr(self.parent, self.attribute)
        assert isinstance(layer, nn.Linear)
        return layer


def plain_name(name: str) -> str:
    """A module's name without what adapters around it add, which is its name in a checkpoint."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def head_shape(model: Any) -> HeadShape:
    """Heads and head_dim of ``model``, or of anything else that has its ``config``."""
    config = model.config
    query_heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or query_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // query_heads
    return HeadShape(query_heads, kv_heads, head_dim)


def decoder_layers(model: nn.Module) -> list[DecoderLayer]:
    """The decoder layers of ``model``, in order.

    Raises UnsupportedModelError, naming layer and reason, if the model is no decoder of the supported kind.
    """
    if not isinstance(model, PreTrainedModel):
        inside = "; prepare what it wraps: get_base_model()" if hasattr(model, "get_base_model") else ""
        raise UnsupportedModelError(f"{type(model).__name__} is not a transformers PreTrainedModel{inside}")
    model_type = model.config.model_type
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise UnsupportedModelError(
            f"model type {model_type!r} has no list of decoder layers at `.layers`, so its attention is not supported: "
            "supported are decoders of the Llama, Qwen2 and Qwen3 kind"
        )
    prefix = next(name for name, module in model.named_modules() if module is layers)
    found = []
    for index, layer in enumerate(layers):
        name = f"{prefix}.{index}"
        attentions = [m for m in layer.modules() if all(_is_linear(getattr(m, p, None)) for p in _PROJECTIONS)]
        if len(attentions) != 1:
            raise UnsupportedModelError(
                f"model type {model_type!r}, layer {name}: unsupported attention, found {len(attentions)} modules with "
                f"separate {', '.join(_PROJECTIONS)} where one is needed (fused projections, latent attention and "
                "cross-attention are not supported)"
            )
        found.append(DecoderLayer(index, name, layer, attentions[0]))
    _check_attention(model, found)
    return found


def _is_linear(module: object) -> bool:
    # A packed layer is no nn.Linear: it has no weight that one could look at.
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Module) and hasattr(module, "in_features"))


def _check_attention(model: PreTrainedModel, layers: list[DecoderLayer]) -> None:
    config = model.config

    def refuse(what: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"model type {config.model_type!r}: unsupported attention ({what}); only full causal softmax attention is "
            "supported"
        )

    # Sliding attention is full attention within the window; beyond it the attention function raises.
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise refuse(f"layer types {', '.join(sorted(kinds))}")
    if getattr(config, "attn_logit_softcapping", None):
        raise refuse(f"soft cap {config.attn_logit_softcapping} on the attention logits")
    for layer in layers:
        if hasattr(layer.attention, "sinks"):
            raise refuse(f"attention sinks in {layer.name}")
        if not getattr(layer.attention, "is_causal", True):
            raise refuse(f"bidirectional attention in {layer.name}")
    if not getattr(type(model), "_supports_attention_backend", False):
        raise refuse("its code does not call transformers' AttentionInterface")


def linear_sites(layer: DecoderLayer) -> list[LinearSite]:
    """Every ``nn.Linear`` in a decoder layer, whatever its name, in the order of the module tree; adapters left out."""
    beside = adapters(layer.module)
    sites = []
    for name, parent in layer.module.named_modules():
        for attribute, child in parent.named_children():
            if isinstance(child, nn.Linear) and child not in beside:
                sites.append(LinearSite(".".join(filter(None, (layer.name, name, attribute))), parent, attribute))
    return sites


def adapters(module: nn.Module) -> set[nn.Module]:
    """All modules in ``module`` that adapters brought along: whatever stands beside a layer that one wraps.

    PEFT keeps the wrapped layer as ``base_layer`` (LoRA and its kin) or ``original_module`` (``modules_to_save``).
    """
    return {
        inner
        for wrapper in module.modules()
        for name, child in wrapper.named_children()
        if name not in WRAPPED and any(isinstance(getattr(wrapper, w, None), nn.Module) for w in WRAPPED)
        for inner in child.modules()
    }


def sharing_groups(layer: DecoderLayer) -> list[list[LinearSite]]:
    """The layer's linear sites, those that read the same input tensor together: [q, k, v], [o], [gate, up], [down]."""
    groups: dict[tuple[str, str], list[LinearSite]] = {}
    for site in linear_sites(layer):
        parent, _, attribute = site.plain_name.rpartition(".")
        shared = next((g[0] for g in _SHARED_INPUT if attribute in g), attribute)
        groups.setdefault((parent, shared), []).append(site)
    return list(groups.values())
