"""The packed cache holds Fp4Cache's numbers bit for bit in a quarter of the memory, and decodes to the same tokens.

In float64 both caches are attended to by the same code, so results are equal; in float32 the packed one is read by the
decode kernel, whose sums run in another order.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from reqat.inference.packed_cache import PackedCache
from reqat.models import Fp4Cache, calibrate_static, freeze, kv_quantizers, prepare

Tiny = Callable[..., PreTrainedModel]
SCALES = ("static", "row", "dynamic")


def prepared(
    tiny: Tiny, ids: Tensor, name: str = "NVFP4-W4A4KV4", family: str = "llama", **options: object
) -> PreTrainedModel:
    model = tiny(family)
    prepare(model, name, **options)
    for kv in kv_quantizers(model):
        kv.set_shift(torch.linspace(-1, 1, 64).view(2, 32))
    calibrate_static(model, [ids])
    return freeze(model)


@torch.no_grad()
def decode(model: PreTrainedModel, ids: Tensor, cache: Cache, steps: list[int], mask: Tensor | None = None) -> Tensor:
    """Logits [B, T, V] of all tokens, given to the model ``steps`` at a time."""
    logits, start = [], cache.get_seq_length()
    for step in steps:
        end = start + step
        seen = mask[:, :end] if mask is not None else None
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:end] if mask is not None else None
        out = model(ids[:, start:end], past_key_values=cache, attention_mask=seen, position_ids=positions)
        logits.append(out.logits)
        start = end
    return torch.cat(logits, 1)


def assert_same_numbers(packed: PackedCache, fake: Fp4Cache) -> None:
    length = fake.get_seq_length()
    assert packed.get_seq_length() == length
    for layer, other in zip(packed.layers, fake.layers, strict=True):
        keys, values = layer.dequantized(length)
        assert torch.equal(keys, other.keys[:, :, :length]) and torch.equal(values, other.values[:, :, :length])


@pytest.mark.parametrize("global_scale", SCALES)
def test_it_holds_the_numbers_of_the_fake_quantized_cache(
    tiny: Tiny, family: str, ids: Tensor, global_scale: str
) -> None:
    """In float64 the numbers read back are the same, and so everything computed from them."""
    model = prepared(tiny, ids, family=family, global_scale=global_scale).double()
    packed, fake = PackedCache(model, 14), Fp4Cache(model, 14)
    steps = [6, 1, 1, 3, 1]
    assert torch.equal(decode(model, ids, packed, steps), decode(model, ids, fake, steps))
    assert_same_numbers(packed, fake)


@pytest.mark.parametrize(
    "options",
    [{"name": "MXFP4-W4A4+MXFP4-KV4"}, {"kv_rotation": 32}, {"kv_rotation": 16, "kv_signs": 2}, {"kv_element": "E1M2"}],
)
def test_other_formats_and_rotated_keys(tiny: Tiny, ids: Tensor, options: dict[str, object]) -> None:
    model = prepared(tiny, ids, **options).double()  # type: ignore[arg-type]
    packed, fake = PackedCache(model, 14), Fp4Cache(model, 14)
    assert torch.equal(decode(model, ids, packed, [5, 1, 1]), decode(model, ids, fake, [5, 1, 1]))
    assert_same_numbers(packed, fake)


@pytest.mark.parametrize("global_scale", SCALES)
def test_the_kernel_gives_the_same_attention(tiny: Tiny, ids: Tensor, global_scale: str) -> None:
    """Weights and inputs in float32, so that no rounding of activations lies between the sums and the logits.

    The first layer's cache holds the same bits; logits differ by the order of float32 sums alone, amplified by two
    layers: 1e-5 of the largest is forty times float32's unit roundoff at 6 bits.
    """
    model = prepared(tiny, ids, "NVFP4-KV4", global_scale=global_scale)
    packed, fake = PackedCache(model, 14), Fp4Cache(model, 14)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    steps = [6, 1, 1, 2, 1, 1]
    ours, theirs = (decode(model, ids, cache, steps, mask) for cache in (packed, fake))
    visible = mask[:, : ours.shape[1]].bool()
    assert (ours - theirs)[visible].abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("capacity", [30, None])
@pytest.mark.parametrize("global_scale", SCALES)
def test_generate_gives_the_same_greedy_tokens(
    tiny: Tiny, ids: Tensor, global_scale: str, capacity: int | None
) -> None:
    model = prepared(tiny, ids, global_scale=global_scale)
    mask = torch.ones_like(ids[:, :8])
    mask[0, :3] = 0  # left padding
    tokens = [
        model.generate(
            ids[:, :8],
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=20,
            min_new_tokens=20,
            do_sample=False,
            pad_token_id=0,
        )
        for cache in (PackedCache(model, capacity), Fp4Cache(model, 30))
    ]
    assert torch.equal(*tokens)


def test_beam_search_reorders_it(tiny: Tiny, ids: Tensor) -> None:
    model = prepared(tiny, ids, global_scale="row").double()
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    tokens = [
        model.generate(ids[:, :8], past_key_values=cache, **options)
        for cache in (PackedCache(model), Fp4Cache(model, 20))
    ]
    assert torch.equal(*tokens)


def test_it_grows_by_tiles_and_keeps_its_tokens(tiny: Tiny, ids: Tensor) -> None:
    model = prepared(tiny, ids, global_scale="row").double()
    packed, fake = PackedCache(model), Fp4Cache(model, 140)
    assert packed.nbytes == 0 and packed.get_max_length() == -1
    long = ids.repeat(1, 10)
    decode(model, long, packed, [10])
    assert packed.capacity == 16
    first = packed.nbytes
    decode(model, long, packed, [50, 1, 1, 1, 1, 1])
    grown = packed.capacity
    assert 65 <= grown <= 128 and grown % 16 == 0 and packed.nbytes == grown // 16 * first
    decode(model, long, packed, [75])
    assert 140 <= packed.capacity <= 204 and packed.capacity % 16 == 0
    decode(model, long, fake, [10, 50, 1, 1, 1, 1, 1, 75])
    assert_same_numbers(packed, fake)


def test_rows_can_be_chosen_and_tokens_cropped(tiny: Tiny, ids: Tensor) -> None:
    model = prepared(tiny, ids, global_scale="row").double()
    packed, fake = PackedCache(model, 14), Fp4Cache(model, 14)
    packed.select_rows([0])  # nothing stored yet: nothing to do
    for cache in (packed, fake):
        decode(model, ids, cache, [9])
        cache.select_rows([2, 0])
        cache.crop(-2)
        decode(model, ids[[2, 0]], cache, [1, 1, 1])
        cache.batch_repeat_interleave(2)
    assert_same_numbers(packed, fake)
    packed.reorder_cache(torch.tensor([3, 0]))
    fake.reorder_cache(torch.tensor([3, 0]))
    assert_same_numbers(packed, fake)
    with pytest.raises(ValueError, match="crop takes"):
        packed.crop(1)
    packed.reset()
    assert packed.get_seq_length() == 0


def test_memory_as_allocated(tiny: Tiny, ids: Tensor) -> None:
    # A dynamic scale costs 8 bytes a token, shared by batch and heads (here 6 of 144 bytes); one a row 8 bytes each.
    for global_scale, least in (("static", 3.55), ("dynamic", 3.49), ("row", 3.2)):
        model = tiny("llama", head_dim=64)
        prepare(model, "NVFP4-KV4", global_scale=global_scale)
        calibrate_static(model, [ids])
        freeze(model)
        packed = PackedCache(model, 1024)
        decode(model, ids, packed, [4])
        bf16 = 2 * 2 * 2 * ids.shape[0] * 2 * 1024 * 64  # bytes, layers, keys and values
        assert bf16 / packed.nbytes >= least
        allocated = {
            part.untyped_storage().data_ptr(): part.untyped_storage().nbytes()
            for layer in packed.layers
            for states in (layer.packed_keys, layer.packed_values)
            for part in (states.codes, states.scales, states.global_scale)
        }
        assert packed.nbytes == sum(allocated.values())


def test_stand_ins_do_not_pass_unnoticed(tiny: Tiny, ids: Tensor) -> None:
    """Another attention function reads NaN, not garbage that looks like an answer."""
    model = prepared(tiny, ids, global_scale="row")
    packed = PackedCache(model, 14)
    keys, values = packed.layers[0].update(*torch.randn(2, 3, 2, 4, 32))
    assert keys.shape == values.shape == (3, 2, 4, 32)
    assert keys.untyped_storage().nbytes() == 4 and keys.isnan().all() and values.isnan().all()


def test_errors(tiny: Tiny, ids: Tensor) -> None:
    model = prepared(tiny, ids, global_scale="row")
    packed = PackedCache(model, 9)
    with torch.no_grad():
        model(ids[:, :9], past_key_values=packed)
        with pytest.raises(ValueError, match="9 tokens.*10"):
            model(ids[:, 9:10], past_key_values=packed)
        packed.crop(-1)
        with pytest.raises(ValueError, match="3 rows, 2 "):
            model(ids[:2, 8:9], past_key_values=packed)
        with pytest.raises(ValueError, match="self_attn values.*holds 1 NaN"):
            states = torch.randn(2, 3, 2, 1, 32)
            states[1, 0, 0, 0, 5] = torch.nan
            packed.layers[0].update(*states)
    with pytest.raises(ValueError, match="passes no gradient on"):
        packed.layers[0].update(*torch.randn(2, 3, 2, 1, 32, requires_grad=True))
    with pytest.raises(ValueError, match="prepare"):
        PackedCache(tiny("llama"), 4)
    with pytest.raises(ValueError, match="at least one token, not 0"):
        PackedCache(model, 0)
    for name, reason in (("AMXFP4-W4A4KV4", "format is AMXFP4"), ("BF16", "not quantized"), ("NVFP4-K4", "values")):
        other = tiny("llama")
        prepare(other, name)
        with pytest.raises(ValueError, match=f"{reason}.*use Fp4Cache"):
            PackedCache(other, 4)
    uncalibrated = tiny("llama")
    prepare(uncalibrated, "NVFP4-KV4", global_scale="static")
    with torch.no_grad(), pytest.raises(ValueError, match="static and not calibrated"):
        uncalibrated(ids, past_key_values=PackedCache(uncalibrated, 20))
