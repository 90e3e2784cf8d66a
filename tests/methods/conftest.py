"""Tiny random decoders of the three supported families."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
}
FAMILIES = {
    "llama": lambda shape: LlamaForCausalLM(LlamaConfig(**shape)),
    "qwen2": lambda shape: Qwen2ForCausalLM(Qwen2Config(**shape)),
    "qwen3": lambda shape: Qwen3ForCausalLM(Qwen3Config(**shape)),
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tiny() -> Callable[..., PreTrainedModel]:
    """``tiny(family, seed=0, dtype=float32, **shape)``: random weights, biases and norms, of order one where it
    matters."""

    def make(
        family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **shape: int
    ) -> PreTrainedModel:
        torch.manual_seed(seed)
        model = FAMILIES[family]({**SHAPE, **shape}).to(dtype).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
            elif "norm" in name:
                nn.init.uniform_(parameter, 0.5, 2.0)
            elif name.endswith(("q_proj.weight", "k_proj.weight")):
                nn.init.normal_(parameter, std=0.2)
        return model

    return make


@pytest.fixture
def float64_norms() -> Callable[[PreTrainedModel], PreTrainedModel]:
    """Transformers computes RMSNorm in float32 whatever the model's type; this makes a float64 model float64."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    def patch(model: PreTrainedModel) -> PreTrainedModel:
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = MethodType(forward, module)
        return model

    return patch


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, SHAPE["vocab_size"], (6, 24), generator=torch.Generator().manual_seed(5))
