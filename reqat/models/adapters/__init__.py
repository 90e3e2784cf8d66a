"""Model adapters: what a model's blocks, linear layers and attention are. A new family of models is one file here that
defines ``ADAPTER``.

Adapters go by what modules do, so models that stand in no list may work as well; :func:`blocks_of` says why one does
not. Tried are, with random weights and the real architecture's parts (NVFP4 and MXFP4, W4A4 and for decoders KV4:
forward, backward, save and reload; for decoders generation with and without a cache, RTN and GPTQ):

| family | model type | adapter | with |
|---|---|---|---|
| Llama 3, SmolLM2, R1-Distill-Llama | `llama` | decoder | RoPE scaling |
| Mistral without a sliding layer | `mistral` | decoder | - |
| Qwen2, Qwen2.5, R1-Distill-Qwen | `qwen2` | decoder | RoPE scaling, biases, tied head |
| Qwen3 | `qwen3` | decoder | QK norm, tied head |
| Gemma | `gemma` | decoder | tied head |
| OLMo 2 | `olmo2` | decoder | QK norm |
| Granite 3 | `granite` | decoder | tied head |
| SmolLM3 | `smollm3` | decoder | tied head |
| Mixtral | `mixtral` | decoder | experts |
| Qwen2-MoE | `qwen2_moe` | decoder | biases, experts |
| Qwen3-MoE | `qwen3_moe` | decoder | QK norm, experts |
| BERT, MiniLM | `bert` | encoder | biases |
| RoBERTa | `roberta` | encoder | biases |
| DistilBERT | `distilbert` | encoder | biases |
| ViT | `vit` | encoder | biases |
| ResNet | `resnet`, `reqat_resnet` | cnn | convolutions; no decoder |

Refused are fused projections (`gpt2`, `phi3`), attention sinks (`gpt_oss`), soft caps on attention logits (`gemma2` as
published), latent attention (`deepseek_v3`), and encoders with a decoder (`bart`).
"""

from __future__ import annotations

import importlib

from torch import nn
from transformers import PreTrainedModel

from reqat.config.catalogue import MODEL_ADAPTERS
from reqat.models.adapters._adapter import (
    DOWN,
    KEY,
    OUT,
    PEFT_ADDED,
    QUERY,
    VALUE,
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
    nonlinearities_in,
)

__all__ = [
    "ADAPTERS",
    "DOWN",
    "KEY",
    "OUT",
    "PEFT_ADDED",
    "QUERY",
    "VALUE",
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
    "nonlinearities_of",
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


def nonlinearities_of(model: nn.Module) -> list[Nonlinearity]:
    """Those of each block of ``model``, in order, then those outside of its blocks (the last norm of a decoder; the
    norm of an encoder's embeddings, activations of its pooler and head). Raises UnsupportedModelError as
    :func:`blocks_of`."""
    blocks = blocks_of(model)
    inside = [entry for block in blocks for entry in block.nonlinearities()]
    return inside + nonlinearities_in(model, beside=[block.module for block in blocks])


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
