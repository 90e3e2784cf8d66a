"""Causal decoders of transformers: Llama and what is built like it.

Nothing goes by class names: a layer is supported if it *does* what this package can swap, that is if it has one
self-attention with separate ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj``, causal softmax attention called through
transformers' ``AttentionInterface`` (sliding windows as far as they hide nothing), and otherwise dense ``nn.Linear``
layers or experts of transformers' experts interface.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from reqat.models.adapters._adapter import (
    Attention,
    Block,
    GatedBlock,
    GatedDecoder,
    Site,
    UnsupportedModelError,
    head_shape,
)
from reqat.quant import MeasuredState

_QKV = ("q_proj", "k_proj", "v_proj")
_OUTPUT = "o_proj"
_NORMS = ("q_norm", "k_norm")
_SAME_INPUT = (_QKV, ("gate_proj", "up_proj"))
_GATED = ("down_proj", "up_proj", "gate_proj")
# Attention mixes tokens and never channels, but with fewer values than queries one channel of v makes several of o's.
_VALUES = (_OUTPUT, "v_proj", "v_proj")

# Of a decoder that a fused kernel may take over: its children, and what its layers are made of.
_PARTS = {"layers", "norm", "embed_tokens", "rotary_emb"}
_LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class DecoderAdapter:
    """Adapter of causal decoders."""

    kind: str = "decoder"

    def blocks(self, model: PreTrainedModel) -> list[Block]:
        """Its layers; see the protocol."""
        layers = getattr(model.get_decoder(), "layers", None)
        if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
            raise UnsupportedModelError("it has no list of layers at `.layers`")
        prefix = next(name for name, module in model.named_modules() if module is layers)
        heads = head_shape(model.config)
        found = []
        for index, layer in enumerate(layers):
            name = f"{prefix}.{index}"
            modules = [
                (f"{name}.{at}", m)
                for at, m in layer.named_modules()
                if all(_is_linear(getattr(m, p, None)) for p in (*_QKV, _OUTPUT))
            ]
            if len(modules) != 1:
                raise UnsupportedModelError(
                    f"{name} has {len(modules)} modules with separate {', '.join(_QKV)}, {_OUTPUT} where one is needed "
                    "(fused projections, latent attention and cross-attention are not supported)"
                )
            norms = _NORMS if isinstance(getattr(modules[0][1], _NORMS[0], None), nn.Module) else None
            attention = Attention(*modules[0], heads, _QKV, norms, cached=True)
            makers = (_GATED, _VALUES) if heads.query_heads == heads.kv_heads else (_GATED,)
            found.append(Block(index, name, layer, attention, _SAME_INPUT, makers))
        _check_attention(model, found)
        return found

    def body(self, model: PreTrainedModel) -> nn.Module:
        """The decoder without its head."""
        decoder: nn.Module = model.get_decoder()
        return decoder

    def head(self, model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
        """``lm_head``."""
        head: Any = model.get_output_embeddings()
        if head is None:
            raise UnsupportedModelError(f"{type(model).__name__} has no language-model head")
        return head

    def outside(self, model: PreTrainedModel) -> list[Site]:
        """None."""
        return []

    def gated(self, model: PreTrainedModel) -> GatedDecoder | None:
        """Its parts if it is built like Llama, Qwen2 or Qwen3."""
        decoder: Any = self.body(model)
        if {name for name, _ in decoder.named_children()} != _PARTS:
            return None
        blocks = [_gated_block(block) for block in self.blocks(model)]
        known = [block for block in blocks if block is not None]
        if len(known) != len(blocks):
            return None

        @contextmanager
        def first_block_alone() -> Iterator[None]:
            layers = decoder.layers
            decoder.layers = nn.ModuleList([layers[0]])
            try:
                yield
            finally:
                decoder.layers = layers

        return GatedDecoder(decoder, decoder.rotary_emb, decoder.norm, known, first_block_alone)


def _is_linear(module: object) -> bool:
    # A packed layer is no nn.Linear: it has no weight that one could look at.
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Module) and hasattr(module, "in_features"))


def _check_attention(model: PreTrainedModel, blocks: list[Block]) -> None:
    def refuse(what: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{what}; only full causal softmax attention is supported")

    config = model.config
    # Sliding attention is full attention within the window; beyond it the attention function raises.
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise refuse(f"its attention has layer types {', '.join(sorted(kinds))}")
    if getattr(config, "attn_logit_softcapping", None):
        raise refuse(f"its attention logits have a soft cap of {config.attn_logit_softcapping}")
    for block in blocks:
        assert block.attention is not None
        if hasattr(block.attention.module, "sinks"):
            raise refuse(f"{block.name} has attention sinks")
        if not getattr(block.attention.module, "is_causal", True):
            raise refuse(f"{block.name} attends in both directions")
    if not getattr(type(model), "_supports_attention_backend", False):
        raise refuse("its code does not call transformers' AttentionInterface")


def _gated_block(block: Block) -> GatedBlock | None:
    """The parts of a layer that has these and no others."""
    modules = dict(block.module.named_modules())
    attention = block.attention
    assert attention is not None
    at = attention.name.removeprefix(f"{block.name}.")
    mlp = next((name.rpartition(".")[0] for name in modules if name.endswith(f".{_MLP[0]}")), "mlp")
    linears = [f"{at}.{name}" for name in (*_QKV, _OUTPUT)] + [f"{mlp}.{name}" for name in _MLP]
    norms = [*_LAYER_NORMS, *(f"{at}.{name}" for name in _NORMS)]
    known = {"", at, mlp, f"{mlp}.act_fn", *linears, *norms}
    ours = [*linears, *(name for name, module in modules.items() if isinstance(module, MeasuredState))]
    if any(name not in known and not _within(name, ours) for name in modules):
        return None
    found_norms = [modules.get(name) for name in norms]
    if not modules.keys() >= {*linears, *_LAYER_NORMS} or (found_norms[2] is None) != (found_norms[3] is None):
        return None
    activation = modules.get(f"{mlp}.act_fn")
    return GatedBlock(block.name, attention, [modules[name] for name in linears], found_norms, activation)


def _within(name: str, modules: list[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


ADAPTER = DecoderAdapter()
