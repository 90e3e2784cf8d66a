"""Model adapters: what a model's blocks, linear layers and attention are. A new family of models is one file here that
defines ``ADAPTER``.
"""

from __future__ import annotations

import importlib

from torch import nn
from transformers import PreTrainedModel

from reqat.config.catalogue import MODEL_ADAPTERS
from reqat.models.adapters._adapter import (
    PEFT_ADDED,
    Attention,
    Block,
    GatedBlock,
    GatedDecoder,
    Group,
    HeadShape,
    ModelAdapter,
    Nonlinearity,
    Site,
    UnsupportedModelError,
)

__all__ = [
    "ADAPTERS",
    "PEFT_ADDED",
    "Attention",
    "Block",
    "GatedBlock",
    "GatedDecoder",
    "Group",
    "HeadShape",
    "ModelAdapter",
    "Nonlinearity",
    "Site",
    "UnsupportedModelError",
    "adapter_of",
    "blocks_of",
    "cached_attentions",
]

ADAPTERS: dict[str, ModelAdapter] = {
    name: importlib.import_module(f"{__name__}.{name}").ADAPTER for name in MODEL_ADAPTERS
}


def adapter_of(model: nn.Module) -> ModelAdapter:
    """The first adapter that knows ``model``. Raises UnsupportedModelError as :func:`blocks_of`."""
    return _found(model)[0]


def blocks_of(model: nn.Module) -> list[Block]:
    """The blocks of ``model``, in order.

    Raises UnsupportedModelError, naming the model's type and what each adapter missed, if none knows it.
    """
    return _found(model)[1]


def cached_attentions(model: nn.Module) -> list[tuple[Block, Attention]]:
    """The blocks of ``model`` that keep keys and values for later tokens, with their attention; none of an encoder."""
    return [(b, b.attention) for b in blocks_of(model) if b.attention is not None and b.attention.cached]


def _found(model: nn.Module) -> tuple[ModelAdapter, list[Block]]:
    if not isinstance(model, PreTrainedModel):
        inside = "; prepare what it wraps: get_base_model()" if hasattr(model, "get_base_model") else ""
        raise UnsupportedModelError(f"{type(model).__name__} is not a transformers PreTrainedModel{inside}")
    reasons = []
    for adapter in ADAPTERS.values():
        try:
            return adapter, adapter.blocks(model)
        except UnsupportedModelError as error:
            reasons.append(f"not as {adapter.kind}: {error}")
    raise UnsupportedModelError(f"model type {model.config.model_type!r} is not supported, {'; '.join(reasons)}")
