"""A tiny random decoder, and outcomes out of thin air."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reqat.evaluation import Outcomes

EOS = 2


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., LlamaForCausalLM]:
    """``tiny(**config changes)``: two layers, grouped heads, weights large enough for peaked and flat distributions."""

    def make(**changes: Any) -> LlamaForCausalLM:
        shape: dict[str, Any] = {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "vocab_size": 41,
            "max_position_embeddings": 96,
        }
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**shape, **changes}))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(6)  # transformers' initialization is so small that every distribution would be flat
        return model.eval()

    return make


@pytest.fixture
def prompts() -> list[list[int]]:
    """Twenty-four prompts of 1 to 9 tokens, some of them equal, none with the end-of-sequence id."""
    rng = np.random.default_rng(3)
    found = [[1, *rng.integers(3, 41, size=rng.integers(0, 9)).tolist()] for _ in range(20)]
    return [*found, found[3], found[3], found[7], [1]]


@pytest.fixture(scope="session")
def outcomes() -> Callable[..., Outcomes]:
    """``outcomes(correct [P, S])``: rows ordered by problem, then seed; problems in two families by turns."""

    def make(correct: Any, **changes: Any) -> Outcomes:
        correct_PS = np.asarray(correct, dtype=bool)
        P, S = correct_PS.shape
        columns: dict[str, Any] = {
            "problem_id": [f"p{i}" for i in range(P) for _ in range(S)],
            "family": ["even" if i % 2 == 0 else "odd" for i in range(P) for _ in range(S)],
            "seed": [s for _ in range(P) for s in range(S)],
            "correct": correct_PS.ravel(),
            "n_tokens": np.arange(P * S) + 1,
            "finished": np.ones(P * S, dtype=bool),
        }
        return Outcomes(**{**columns, **changes})

    return make
