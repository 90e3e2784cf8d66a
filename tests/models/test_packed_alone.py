"""A packed model refuses copies, pickles and state dicts, and conversions that mean nothing leave it whole."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.inference import pack
from reqat.inference.packed_cache import PackedCache
from reqat.models import freeze, prepare

Tiny = Callable[..., PreTrainedModel]


def packed(tiny: Tiny, name: str = "NVFP4-W4A4KV4") -> PreTrainedModel:
    model = tiny("llama")
    prepare(model, name, **({"global_scale": "row"} if "NVFP4" in name else {}))
    return pack(freeze(model))


@torch.no_grad()
def steps(model: Any, ids: Tensor) -> list[Tensor]:
    cache = PackedCache(model)
    mask = torch.ones(len(ids), ids.shape[1] + 4, dtype=torch.int64, device="cpu")
    mask[0, :2] = 0
    out = []
    for last in range(ids.shape[1], ids.shape[1] + 4):
        logits = model(ids, attention_mask=mask[:, :last], past_key_values=cache, use_cache=True).logits[:, -1]
        out.append(logits)
        ids = logits.argmax(-1, keepdim=True)
    return out


def test_copies_and_pickles_are_refused_and_conversions_leave_it_whole(tiny: Tiny, ids: Tensor) -> None:
    model = packed(tiny)
    expected = steps(model, ids)
    layer = model.model.layers[0].self_attn.q_proj
    for attempt in (
        lambda: copy.deepcopy(model),
        lambda: copy.deepcopy(layer),
        lambda: torch.save(model, io.BytesIO()),
        lambda: model.state_dict(),
        lambda: model.to("meta"),
    ):
        with pytest.raises(ReqatError, match="pack"):
            attempt()
    assert model.to("cpu") is model and model.float() is model
    assert all(torch.equal(a, b) for a, b in zip(expected, steps(model, ids), strict=True))
