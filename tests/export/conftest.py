"""Tiny decoders, as in tests/models, wide enough for every format; and their plain weights."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from reqat.models import quant_linears
from tests.models.conftest import _one_thread, family, ids, tiny  # noqa: F401

#: GGUF's NVFP4 has blocks of 64 columns; llama.cpp's Qwen2 has heads that are as wide together as the model.
WIDE = {"hidden_size": 128, "intermediate_size": 128}


@pytest.fixture
def dense() -> object:
    """``dense(model)``: name -> dequantized weight [N, K] float32 of each quantized layer of a frozen model."""

    def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
        found = {}
        for name, layer in quant_linears(model).items():
            assert layer.quantized is not None
            found[name] = layer.quantized.dequantize(torch.float32)
        return found

    return weights
