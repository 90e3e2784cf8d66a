"""Tiny random decoders of each supported family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import reqat.models  # noqa: F401  (registers the attention function)

FAMILIES = ("llama", "qwen2", "qwen3")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tiny() -> Callable[..., PreTrainedModel]:
    """``tiny(family, **config changes)``: two layers, grouped heads, biases and norm weights that are not trivial."""

    def make(family: str = "llama", **changes: Any) -> PreTrainedModel:
        shape: dict[str, Any] = {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "vocab_size": 61,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
        }
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**shape, **changes}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
                elif "embed" not in name:
                    parameter.mul_(4)  # transformers' initialization is so small that attention would be uniform
        return model.eval()

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 61, (3, 14), generator=torch.Generator().manual_seed(1))
