"""Folders of tiny random decoders, as transformers writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

FAMILIES = ("llama", "qwen2", "qwen3")
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """``folder(family, **config changes)``: of a model with weights large enough for attention to choose."""

    def make(family: str = "llama", dtype: torch.dtype = torch.float32, shard: str = "50GB", **changes: Any) -> Path:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SHAPE, **changes}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
                elif "embed" not in name:
                    parameter.mul_(4)
        path = tmp_path / f"{family}-dense"
        model.to(dtype).save_pretrained(path, max_shard_size=shard)
        return path

    return make


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 61, (4, 14), generator=torch.Generator().manual_seed(1))
