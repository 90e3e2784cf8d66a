"""Encoders of transformers: BERT, MiniLM, RoBERTa, ELECTRA, DistilBERT and vision transformers.

A block is supported if one module in it has three linear layers of equal inputs whose names begin with q, k and v, and
attends in both directions. Attention itself is left as it is: an encoder keeps no keys and values for later tokens, so
there is no cache to quantize.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from reqat.models.adapters._adapter import Attention, Block, UnsupportedModelError, head_shape


@dataclass(frozen=True)
class EncoderAdapter:
    """Adapter of encoders."""

    kind: str = "encoder"

    def blocks(self, model: PreTrainedModel) -> list[Block]:
        """Its layers; see the protocol."""
        if getattr(model.config, "is_encoder_decoder", False):
            raise UnsupportedModelError("it has a decoder as well")
        lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
        looked_at = [(name, [_attentions(layer) for layer in layers]) for name, layers in lists.items()]
        stacks = [(name, found) for name, found in looked_at if all(len(of_layer) == 1 for of_layer in found)]
        if len(stacks) != 1:
            raise UnsupportedModelError(
                f"it has {len(stacks)} lists of layers with one attention each that has separate linear layers for "
                "query, key and value, where one is needed"
            )
        (prefix, attentions), heads = stacks[0], head_shape(model.config)
        blocks = []
        for index, (layer, [(at, module, names)]) in enumerate(zip(lists[prefix], attentions, strict=True)):
            name = f"{prefix}.{index}"
            if getattr(module, "is_causal", None) is not False:
                raise UnsupportedModelError(f"{name} does not say that it attends in both directions")
            attention = Attention(f"{name}.{at}", module, heads, names)
            blocks.append(Block(index, name, layer, attention, (names,)))
        return blocks

    def body(self, model: PreTrainedModel) -> nn.Module:
        """The encoder without its head."""
        return model.base_model

    def gated(self, model: PreTrainedModel) -> None:
        """An encoder is no decoder."""


def _attentions(layer: nn.Module) -> list[tuple[str, nn.Module, tuple[str, str, str]]]:
    """Name and module of what in ``layer`` has a layer each for queries, keys and values, and those layers' names."""
    found = []
    for at, module in layer.named_modules():
        linears = {n: m.in_features for n, m in module.named_children() if hasattr(m, "in_features")}
        names = [[n for n in linears if n.startswith(letter)] for letter in "qkv"]
        if all(len(some) == 1 for some in names) and len({linears[some[0]] for some in names}) == 1:
            found.append((at, module, (names[0][0], names[1][0], names[2][0])))
    return found


ADAPTER = EncoderAdapter()
