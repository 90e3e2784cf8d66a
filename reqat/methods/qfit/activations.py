"""What a layer's attention works on, taken from a full-precision model.

Shapes: n sequences, T tokens, H query heads, G key/value heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.methods.layerwise import Step, hooked, on_output, walk
from reqat.models import QuantLinear
from reqat.models.adapters import Attention, Block


@dataclass(frozen=True)
class Activations:
    """Full-precision attention inputs of one layer, float32: ``query`` [n, H, T, D], ``key``, ``value`` [n, G, T, D].

    Queries and keys are taken before RoPE (after QK norm); ``cos``, ``sin`` [T, D] are RoPE's.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    cos: Tensor
    sin: Tensor


def activations(model: PreTrainedModel, input_ids: Tensor) -> list[Activations]:
    """What every layer's attention works on for ``input_ids`` [n, T] (whole sequences without padding): what
    :func:`calibrate` searches on, for looking at keys.

    Raises ``ReqatError`` for ids that the model does not know, and models without rotary embeddings.
    """
    return [capture(step) for step in walk(model, input_ids)]


def check_full_precision(layers: list[tuple[Block, Attention]], *, frozen_only: bool = False) -> None:
    """Raise ReqatError, naming it, for a layer that is quantized; ``frozen_only``: whose codes are chosen."""
    for layer, attention in layers:
        for name, module in layer.module.named_modules():
            if not isinstance(module, QuantLinear):
                continue
            if module.frozen:
                raise ReqatError(f"{layer.name}.{name} is frozen: calibrate before quantizing, on the model as loaded")
            quantized = module.weight_quantizer.format or module.input_quantizer.format
            if quantized is not None and not frozen_only:
                raise ReqatError(
                    f"Q-FIT calibrates on the full-precision model, but {layer.name}.{name} is quantized to "
                    f"{quantized}: calibrate before prepare(model, precision)"
                )
        kv: Any = getattr(attention.module, "reqat_kv", None)
        if kv is not None and not frozen_only and (kv.key.format or kv.value.format):
            raise ReqatError(
                f"Q-FIT calibrates on the full-precision model, but the KV cache of {layer.name} is quantized: "
                "calibrate before prepare(model, precision)"
            )


def capture(step: Step) -> Activations:
    """Run ``step`` once and keep what its attention works on."""
    attention = step.block.attention
    assert attention is not None
    heads = attention.heads
    normed = attention.norms is not None
    query_from = attention.query_norm if normed else attention.query
    key_from = attention.key_norm if normed else attention.key
    kept: dict[str, list[Tensor]] = {"query": [], "key": [], "value": []}

    def keep(role: str, count: int) -> Any:
        def look(out: Tensor) -> None:
            split = out.reshape(*out.shape[:2], count, heads.head_dim)
            kept[role].append(split.transpose(1, 2).to(torch.float32, copy=True))

        return look

    handles = [
        on_output(query_from, keep("query", heads.query_heads)),
        on_output(key_from, keep("key", heads.kv_heads)),
        on_output(attention.value, keep("value", heads.kv_heads)),
    ]
    with hooked(handles):
        step.outputs = step.run()
    position = step.kwargs[0].get("position_embeddings")
    if position is None or position[0].shape[-1] != heads.head_dim:
        found = None if position is None else tuple(position[0].shape)
        raise ReqatError(
            f"{step.block.name}: Q-FIT needs rotary position embeddings over the whole head_dim of {heads.head_dim}, "
            f"found {found}"
        )
    query, key, value = (torch.cat(kept[role]) for role in ("query", "key", "value"))
    return Activations(query, key, value, position[0][0].float(), position[1][0].float())


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``x`` [..., T, D], pairs (r, r + D/2), by ``cos`` and ``sin`` [T, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
