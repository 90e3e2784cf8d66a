"""Decoders of norms, attention and gated MLPs, as transforms of whole models rewrite them (QuaRot, FlatQuant)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.models.adapters import GatedDecoder, adapter_of
from reqat.quant import kronecker


def gated_parts(model: PreTrainedModel, what: str) -> GatedDecoder:
    """The parts of a decoder of norms, attention and gated MLPs. Raises ReqatError for any other."""
    parts = adapter_of(model).gated(model)
    if parts is None:
        raise ReqatError(
            f"{what} transforms decoders built like Llama, Qwen2 or Qwen3 (norm, attention, norm, gated MLP); model "
            f"type {model.config.model_type!r} has other parts: take another method (gptq, awq, smoothquant)"
        )
    return parts


@torch.no_grad()
def turn_values(value: Any, out: Any, P: Tensor, of_weight: Tensor) -> None:
    """Multiply each head's values by P [D, D], in the rows of ``value``, and the columns of ``out`` by ``of_weight``,
    P's inverse transposed. In place, computed in float64."""
    P, of_weight = P.double().to(value.weight.device), of_weight.double().to(out.weight.device)
    value.weight.copy_(kronecker(value.weight.double().T, None, P).T)
    if value.bias is not None:
        value.bias.copy_(kronecker(value.bias.double(), None, P))
    out.weight.copy_(kronecker(out.weight.double(), None, of_weight))
