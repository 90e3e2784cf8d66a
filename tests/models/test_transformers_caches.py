"""Caches, assistants and attention functions that transformers puts around a model on its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache, Fp8QuantizedLayer

from reqat.config.errors import ReqatError
from reqat.inference import pack
from reqat.models import freeze, kv_quantizers, prepare

Tiny = Callable[..., PreTrainedModel]
KV4 = "NVFP4-W4A4KV4"


@pytest.fixture(scope="module")
def asked() -> Tensor:
    return torch.randint(0, 61, (2, 11), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("global_scale", ["row", "dynamic"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_every_cache_gives_the_dynamic_caches_tokens(
    tiny: Tiny, asked: Tensor, packed: bool, padded: bool, global_scale: str
) -> None:
    model = tiny("llama")
    prepare(model, KV4, global_scale=global_scale)
    for kv in kv_quantizers(model):
        kv.set_shift(torch.randn(2, 32, generator=torch.Generator().manual_seed(4)) * 20)
    freeze(model)
    if packed:
        pack(model)
    mask = torch.ones_like(asked)
    mask[1, :3] = 0 if padded else 1
    how: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 6,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    expected = model.generate(asked, **how)
    found = model.generate(asked, cache_implementation="static", **how)
    assert torch.equal(found.sequences, expected.sequences)
    for a, b in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    if not padded and not packed:
        assisted = model.generate(asked[:1], **{**how, "attention_mask": mask[:1]}, assistant_model=tiny("llama"))
        alone = model.generate(asked[:1], **{**how, "attention_mask": mask[:1]})
        if global_scale == "row":  # a dynamic scale is of all tokens at hand, and an assistant adds guesses to them
            assert torch.equal(assisted.sequences, alone.sequences)


@pytest.mark.parametrize("precision", ["INT8-tensor-KV8", "NVFP4-KV4:global_scale=dynamic"])
def test_keys_that_were_never_written_do_not_set_a_scale_of_all_tokens(
    tiny: Tiny, asked: Tensor, precision: str
) -> None:
    """A static cache's zeros become the shift, which is larger than any key here."""
    model = tiny("llama")
    prepare(model, precision)
    for kv in kv_quantizers(model):
        kv.set_shift(torch.full((2, 32), 500.0))
    how: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    how |= {"output_logits": True, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(asked, **how)
    found = model.generate(asked, cache_implementation="static", **how)
    for a, b in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_what_would_skip_or_repeat_quantization_is_refused(tiny: Tiny, asked: Tensor) -> None:
    model = tiny("llama")
    prepare(model, KV4, global_scale="row")
    model.set_attn_implementation("sdpa")
    with pytest.raises(ReqatError, match="set_attn_implementation"):
        model(asked)
    model.set_attn_implementation("reqat")
    cache = Cache(layers=[Fp8QuantizedLayer() for _ in range(2)])  # quanto and HQQ have the same base
    with pytest.raises(ReqatError, match="second time"):
        model(asked, past_key_values=cache)
    with pytest.raises(ReqatError, match="second time"):
        pack(model)(asked, past_key_values=cache)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_that_a_packed_model_replaced_is_not_taken_for_empty(tiny: Tiny, asked: Tensor, kind: str) -> None:
    """The tokens are in the cache that the output has, and the caller's own object stays empty."""
    model = tiny("llama")
    prepare(model, KV4, global_scale="row")
    expected = model(asked).logits
    pack(model)

    def cache() -> Cache:
        return DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=32)

    with torch.no_grad():
        held = cache()
        first = model(asked[:, :6], past_key_values=held)
        torch.testing.assert_close(first.logits, expected[:, :6], rtol=1e-4, atol=1e-4)
        second = model(asked[:, 6:], past_key_values=first.past_key_values)
        torch.testing.assert_close(second.logits, expected[:, 6:], rtol=1e-4, atol=1e-4)
        with pytest.raises(ReqatError, match="output.past_key_values"):
            model(asked[:, 6:], past_key_values=held)
