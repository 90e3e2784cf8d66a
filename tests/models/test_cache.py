"""The four-bit cache: decoding from it equals recomputing everything, a row does not depend on its batch.

Models are in float64: sums in another order then differ in the last bits only, far below what could flip a rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from reqat.models import Fp4Cache, calibrate_static, freeze, kv_quantizers, prepare

Tiny = Callable[..., PreTrainedModel]
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def prepared(tiny: Tiny, family: str, ids: Tensor, global_scale: str, name: str = "NVFP4-W4A4KV4") -> PreTrainedModel:
    model = tiny(family).double()
    prepare(model, name, global_scale=global_scale)
    for kv in kv_quantizers(model):
        kv.set_shift(torch.linspace(-1, 1, 64).view(2, 32))
    calibrate_static(model, [ids])
    return freeze(model)


@torch.no_grad()
def decode(model: PreTrainedModel, ids: Tensor, prompt: int, cache: Cache, mask: Tensor | None = None) -> Tensor:
    """Logits [B, T, V]: the prompt at once, then token by token."""
    logits = []
    for start, end in [(0, prompt), *((t, t + 1) for t in range(prompt, ids.shape[1]))]:
        seen = mask[:, :end] if mask is not None else None
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:end] if mask is not None else None
        out = model(
            ids[:, start:end], past_key_values=cache, attention_mask=seen, position_ids=positions, use_cache=True
        )
        logits.append(out.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("global_scale", ["row", "static"])
@pytest.mark.parametrize("kind", ["fp4", "dynamic"])
def test_decoding_equals_recomputation(tiny: Tiny, family: str, ids: Tensor, global_scale: str, kind: str) -> None:
    model = prepared(tiny, family, ids, global_scale)
    cache = Fp4Cache(model, capacity=14) if kind == "fp4" else DynamicCache(config=model.config)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
    torch.testing.assert_close(decode(model, ids, 5, cache), full, **EXACT)
    assert cache.get_seq_length() == 14


@pytest.mark.parametrize("name", ["BF16", "MXFP4-W4A4:rotation=32", "AMXFP4-W4A4KV4", "INT4-row-W4A4KV4"])
def test_formats_without_a_global_scale_decode_the_same_too(tiny: Tiny, ids: Tensor, name: str) -> None:
    model = prepared(tiny, "qwen3", ids, "row", name)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
    torch.testing.assert_close(decode(model, ids, 5, Fp4Cache(model, 20)), full, **EXACT)


@pytest.mark.parametrize("global_scale", ["row", "static"])
def test_a_row_does_not_depend_on_its_batch(tiny: Tiny, family: str, ids: Tensor, global_scale: str) -> None:
    """Short prompts are padded on the left; neither padding nor neighbours change a row's logits."""
    model = prepared(tiny, family, ids, global_scale)
    padding = [0, 3, 4]
    batch, mask = ids.clone(), torch.ones_like(ids)
    for row, n in enumerate(padding):
        batch[row, :n], mask[row, :n] = 7, 0
    together = decode(model, batch, 6, Fp4Cache(model, 14), mask)
    for row, n in enumerate(padding):
        alone = decode(model, batch[row : row + 1, n:], 6 - n, Fp4Cache(model, 14))
        torch.testing.assert_close(together[row : row + 1, n:], alone, **EXACT)


def test_dynamic_scales_do_depend_on_the_batch(tiny: Tiny, ids: Tensor) -> None:
    """The test above can fail: with the paper's dynamic scale it would."""
    model = prepared(tiny, "llama", ids, "dynamic")
    with torch.no_grad():
        together, alone = model(ids).logits[:1], model(ids[:1]).logits
    assert (together - alone).abs().max() > 1e-3


def test_only_new_tokens_are_quantized(tiny: Tiny, ids: Tensor) -> None:
    model = prepared(tiny, "llama", ids, "row")
    cache = Fp4Cache(model, 14)
    decode(model, ids[:, :9], 8, cache)
    stored = [layer.keys[:, :, :9].clone() for layer in cache.layers]
    decode(model, ids[:, 9:10], 1, cache)
    assert all(torch.equal(layer.keys[:, :, :9], before) for layer, before in zip(cache.layers, stored, strict=True))
    assert all(layer.keys.shape == (3, 2, 14, 32) for layer in cache.layers)


def test_finished_rows_can_be_dropped_and_tokens_cropped(tiny: Tiny, ids: Tensor) -> None:
    model = prepared(tiny, "llama", ids, "row")
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
    cache = Fp4Cache(model, 14)
    cache.select_rows([0])  # nothing stored yet: nothing to do
    decode(model, ids[:, :9], 9, cache)
    cache.select_rows([2, 0])
    rest = decode(model, ids[[2, 0], 9:12], 1, cache)
    torch.testing.assert_close(rest, full[[2, 0], 9:12], **EXACT)
    cache.crop(-2)
    assert cache.get_seq_length() == 10
    again = decode(model, ids[[2, 0], 10:12], 1, cache)
    torch.testing.assert_close(again, full[[2, 0], 10:12], **EXACT)
    cache.reset()
    assert cache.get_seq_length() == 0


def test_generation_by_transformers_takes_it(tiny: Tiny, ids: Tensor) -> None:
    model = prepared(tiny, "qwen2", ids, "static")
    cache = Fp4Cache(model, 12)
    out = model.generate(ids[:, :8], past_key_values=cache, max_new_tokens=4, do_sample=False, pad_token_id=0)
    expected = ids[:, :8]
    for _ in range(4):
        with torch.no_grad():
            expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, expected)


def test_a_full_cache_and_another_batch_are_errors(tiny: Tiny, ids: Tensor) -> None:
    model = prepared(tiny, "llama", ids, "row")
    cache = Fp4Cache(model, 9)
    with torch.no_grad():
        model(ids[:, :9], past_key_values=cache)
        with pytest.raises(ValueError, match="9 tokens.*10"):
            model(ids[:, 9:10], past_key_values=cache)
        cache.crop(-1)
        with pytest.raises(ValueError, match="3 rows, 2 "):
            model(ids[:2, 8:9], past_key_values=cache)
    with pytest.raises(ValueError, match="prepare"):
        Fp4Cache(tiny("llama"), 4)
    with pytest.raises(ValueError, match="at least one token, not 0"):
        Fp4Cache(model, 0)
