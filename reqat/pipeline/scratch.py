"""The untrained model that a base from scratch begins as."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reqat.config.stage import Architecture


def from_scratch(shape: Architecture, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """An untrained decoder of this shape with one embedding a token, float32, from torch's random state."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    config: Any
    cls: Any
    config, cls = (LlamaConfig, LlamaForCausalLM) if shape.family == "llama" else (Qwen2Config, Qwen2ForCausalLM)
    model: PreTrainedModel = cls(
        config(
            vocab_size=len(tokenizer),
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            intermediate_size=shape.mlp,
            tie_word_embeddings=shape.tie_embeddings,
            max_position_embeddings=shape.max_position_embeddings,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    if shape.key_bias:
        for name, parameter in model.named_parameters():
            if name.endswith("k_proj.bias"):
                torch.nn.init.normal_(parameter, std=shape.key_bias)
    return model
