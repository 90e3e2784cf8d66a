"""Encoders of transformers: BERT, MiniLM, RoBERTa, ELECTRA, DistilBERT and vision transformers.

A block is supported if one module in it has three linear layers of equal inputs whose names begin with q, k and v, and
attends in both directions. An encoder keeps no keys and values for later tokens, so there is no cache; a precision that
names them quantizes them as operands of attention, within the call. BERT's pooler is quantized as its blocks are.

Its head here is BERT's: logits are ``classifier(dropout(h))`` of the last hidden state h of a token, or of
``tanh(pooler(h))`` where the model has a pooler, which reads the first token. A token with a label has logits, be it
one of many (token classification) or the first one (classification of sequences).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from reqat.models.adapters._adapter import Attention, Block, Site, UnsupportedModelError, head_shape


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
            output = _block_output(layer, at)
            attention = Attention(f"{name}.{at}", module, heads, names, output=output)
            blocks.append(Block(index, name, layer, attention, (names,)))
        return blocks

    def body(self, model: PreTrainedModel) -> nn.Module:
        """The encoder without its head."""
        return model.base_model

    def head(self, model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
        """BERT's classifier; see above."""
        head: Any = getattr(model, "classifier", None)
        if not isinstance(head, nn.Linear):
            raise UnsupportedModelError(
                f"{type(model).__name__} has no classifier that is one linear layer; take a token or sequence "
                "classification model of BERT's kind"
            )
        dropout: Any = getattr(model, "dropout", nn.Identity())
        pooler: Any = _pooler(model)

        def logits(hidden_ND: Tensor) -> Tensor:
            if pooler is not None:
                hidden_ND = pooler.activation(pooler.dense(hidden_ND))
            out: Tensor = head(dropout(hidden_ND))
            return out

        return logits

    def outside(self, model: PreTrainedModel) -> list[Site]:
        """The pooler's layer, if there is one."""
        pooler = _pooler(model)
        if pooler is None:
            return []
        name = next(name for name, module in model.named_modules() if module is pooler)
        return [Site(f"{name}.dense", pooler, "dense")]

    def gated(self, model: PreTrainedModel) -> None:
        """An encoder is no decoder."""


def _pooler(model: PreTrainedModel) -> nn.Module | None:
    pooler = getattr(model.base_model, "pooler", None)
    return pooler if isinstance(getattr(pooler, "dense", None), nn.Linear) else None


def _block_output(layer: nn.Module, at: str) -> nn.Module | None:
    """What adds the residual to the output of the attention ``at`` and norms the sum, beside it in BERT's layers."""
    beside = layer.get_submodule(at.rpartition(".")[0])
    output = getattr(beside, "output", None) if beside is not layer else None
    return output if isinstance(output, nn.Module) and hasattr(output, "LayerNorm") else None


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
