"""A packed model gives what its frozen fake-quantized twin gives, from an eighth of the memory."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.inference import memory, pack
from reqat.inference.packed_cache import PackedCache
from reqat.inference.packed_decoder import NativeDecoder
from reqat.inference.packed_linear import PackedLinear
from reqat.inference.vocabulary import PackedHead
from reqat.models import Fp4Cache, calibrate_static, freeze, kv_quantizers, prepare, save_model
from reqat_kernels.native import instruction_set
from reqat_kernels.native.dense import dense_bf16

Tiny = Callable[..., PreTrainedModel]
NATIVE = instruction_set() != "torch"
PRECISIONS: list[tuple[str, dict[str, Any]]] = [
    ("NVFP4-W4A4KV4", {"global_scale": "static", "kv_element": "E1M2"}),
    ("NVFP4-W4A4KV4", {"kv_element": "E1M2"}),
    ("NVFP4-W4A4KV4", {"global_scale": "dynamic"}),
    ("NVFP4-W4A16KV4", {}),
    ("NVFP4-4/6-W4A4KV4", {}),
    ("MXFP4-W4A4KV4", {"rotation": 32}),
]


def twins(tiny: Tiny, ids: Tensor, family: str, name: str, **options: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same frozen model twice, the second one packed."""
    models = []
    for _ in range(2):
        model = tiny(family)
        prepare(model, name, **options)
        for kv in kv_quantizers(model):
            kv.set_shift(torch.linspace(-1, 1, 64).view(2, 32))
        calibrate_static(model, [ids])
        models.append(freeze(model))
    return models[0], pack(models[1])


def greedy(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: Any = None) -> Tensor:
    return model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=24, do_sample=False, pad_token_id=0
    )


def assert_agree(a: Tensor, b: Tensor) -> None:
    """Logits that differ by float summation alone, but where a sum crossed a rounding threshold and one code with it.

    Such a crossing moves a token's logits, and later ones', by a few percent; a wrong part would move them all.
    """
    largest = a.abs().max()
    moved = ((a - b).abs() > 2e-5 * largest).float().mean()
    assert moved <= 0.5 and (a - b).abs().max() <= 0.3 * largest, (float(moved), float((a - b).abs().max() / largest))


@pytest.mark.parametrize(("name", "options"), [p for p in PRECISIONS if p[1].get("global_scale") != "dynamic"])
def test_generate_gives_the_twins_tokens(
    tiny: Tiny, family: str, ids: Tensor, name: str, options: dict[str, Any]
) -> None:
    options = {"global_scale": "row", **options} if "NVFP4" in name else options  # rows that do not know each other
    plain, packed = twins(tiny, ids, family, name, **options)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0  # left padding
    expected = greedy(plain, ids, mask, Fp4Cache(plain, ids.shape[1] + 24))
    # One row of three may have met a rounding threshold (see assert_agree), from where on it goes its own way.
    assert (greedy(packed, ids, mask) == expected).all(1).sum() >= 2


@pytest.mark.parametrize(("name", "options"), PRECISIONS)
def test_logits_agree_up_to_summation(tiny: Tiny, ids: Tensor, name: str, options: dict[str, Any]) -> None:
    plain, packed = twins(tiny, ids, "llama", name, **options)
    with torch.no_grad():
        assert_agree(plain(ids, use_cache=False).logits, packed(ids, use_cache=False).logits)


@pytest.mark.skipif(not NATIVE, reason="no native library")
@pytest.mark.parametrize(("name", "options"), PRECISIONS)
def test_the_native_call_does_what_the_modules_do(
    tiny: Tiny, family: str, ids: Tensor, name: str, options: dict[str, Any]
) -> None:
    _, packed = twins(tiny, ids, family, name, **options)
    decoder = packed.get_decoder()
    assert isinstance(decoder.forward, NativeDecoder)
    mask = torch.ones(3, 14, dtype=torch.int64)
    mask[1, :3] = 0

    @torch.no_grad()
    def run() -> tuple[Tensor, PackedCache]:
        cache = PackedCache(packed)
        packed(ids[:, :10], attention_mask=mask[:, :10], past_key_values=cache)
        steps = [
            packed(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache).logits
            for t in range(10, 14)
        ]
        return torch.cat(steps, 1), cache

    native, cache = run()
    decoder.forward = decoder.forward.own
    modules, other = run()
    assert cache.get_seq_length() == other.get_seq_length() == 14
    assert_agree(modules, native)


@pytest.mark.skipif(not NATIVE, reason="no native library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "options"), [p for p in PRECISIONS if p[1].get("global_scale") != "dynamic"])
def test_several_tokens_get_the_bits_of_single_ones(
    tiny: Tiny, family: str, ids: Tensor, name: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    model = tiny(family).to(dtype)
    prepare(model, name, **({"global_scale": "row"} | options if "NVFP4" in name else options))
    calibrate_static(model, [ids])
    decoder = pack(model).get_decoder()
    mask = torch.ones(3, 14, dtype=torch.int64)
    mask[1, :3] = 0

    @torch.no_grad()
    def run(sizes: list[int]) -> tuple[Tensor, PackedCache]:
        cache, at, out = PackedCache(model), 6, []
        decoder(ids[:, :at], attention_mask=mask[:, :at], past_key_values=cache)
        decoder.forward.own, own = None, decoder.forward.own  # the rest must not go through the modules
        for size in sizes:
            given = {"input_ids": ids[:, at : at + size], "attention_mask": mask[:, : at + size]}
            at += size
            # As generate() gives them; without, positions are counted by the cache, padding and all.
            positions = (mask[:, :at].cumsum(1) - 1).clamp(min=0)[:, -size:]
            out.append(decoder(**given, position_ids=positions, past_key_values=cache).last_hidden_state)
        decoder.forward.own = own
        return torch.cat(out, 1), cache

    single, one = run([1] * 8)
    several, other = run([2, 5, 1])
    assert torch.equal(single, several)
    for a, b in zip(one.layers, other.layers, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.dequantized(14), b.dequantized(14), strict=True))


@pytest.mark.skipif(not NATIVE, reason="no native library")
def test_a_bfloat16_model_decodes_natively_as_close_as_by_modules(tiny: Tiny, ids: Tensor) -> None:
    def logits(dtype: torch.dtype, native: bool) -> Tensor:
        model = tiny("llama").to(dtype)
        prepare(model, "NVFP4-W4A16KV4", global_scale="row")
        pack(model)
        decoder = model.get_decoder()
        decoder.forward = decoder.forward if native else decoder.forward.own
        cache = PackedCache(model)
        with torch.no_grad():
            model(ids[:, :10], past_key_values=cache)
            steps = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(10, 14)]
        return torch.cat(steps, 1).double()

    exact = logits(torch.float32, native=True)
    by_modules, natively = (float((logits(torch.bfloat16, n) - exact).square().mean().sqrt()) for n in (False, True))
    assert 0 < natively <= 1.5 * by_modules


@pytest.mark.skipif(not NATIVE, reason="no native library")
def test_a_packed_model_keeps_no_cache_alive_and_cannot_be_copied(tiny: Tiny, ids: Tensor) -> None:
    _, packed = twins(tiny, ids, "llama", "NVFP4-W4A4KV4", global_scale="row")
    cache = PackedCache(packed)
    with torch.no_grad():
        packed(ids, past_key_values=cache)
        packed(ids[:, :1], past_key_values=cache)
        assert isinstance(packed.get_decoder()(ids[:, :1], past_key_values=cache, return_dict=False), tuple)
    keys = weakref.ref(cache.layers[0].packed_keys)
    del cache
    gc.collect()
    assert keys() is None
    with pytest.raises(ReqatError, match="copy the frozen model"):
        copy.deepcopy(packed)


def test_memory_is_four_and_a_half_bits_a_weight(tiny: Tiny, ids: Tensor) -> None:
    plain, packed = twins(tiny, ids, "llama", "NVFP4-W4A4KV4", global_scale="static")
    before, after = memory(plain), memory(packed)
    weights = before.linear_bytes // 4
    # Rows in tiles of 16 all fit here; what is allocated beyond 4.5 bits aligns each layer's bytes to a cache line.
    assert 4.5 * weights <= 8 * after.linear_bytes <= 4.5 * weights + 8 * 64 * 14
    assert after.other_bytes == before.other_bytes + 64 * NATIVE  # the head moves to where a cache line begins
    assert not any(isinstance(module, nn.Linear) for layer in packed.get_decoder().layers for module in layer.modules())
    cache = PackedCache(packed, 64)
    with torch.no_grad():
        packed(ids, past_key_values=cache)
    bf16 = 2 * 2 * 3 * 2 * 64 * 32 * 2  # keys and values, layers, rows, heads, tokens, channels, bytes
    assert memory(packed, cache).cache_bytes == cache.nbytes <= bf16 / 3.5


def test_a_bfloat16_head_keeps_its_weight(tiny: Tiny, ids: Tensor) -> None:
    model = tiny("llama", tie_word_embeddings=True).bfloat16()
    prepare(model, "NVFP4-W4A4KV4", global_scale="row")
    embedding = model.get_input_embeddings().weight
    pack(model)
    head = model.get_output_embeddings()
    assert isinstance(head, PackedHead) and head.stored == "BF16"
    assert model.get_input_embeddings().weight is embedding and embedding.data_ptr() == head.weight.data_ptr()
    x = torch.randn(5, 64)
    exact = x.double() @ embedding.double().T
    bound = 64 * 2.0**-24 * (x.double().abs() @ embedding.double().abs().T)
    assert ((dense_bf16(x, embedding).double() - exact).abs() <= bound).all()
    assert model(ids).logits.dtype == torch.float32


def test_layers_of_another_build_go_through_their_modules(tiny: Tiny, ids: Tensor) -> None:
    model = tiny("llama", hidden_act="gelu")
    prepare(model, "NVFP4-W4A4KV4", global_scale="row")
    pack(model)
    assert not isinstance(model.get_decoder().forward, NativeDecoder)
    assert isinstance(model.get_decoder().layers[0].mlp.up_proj, PackedLinear)
    assert greedy(model, ids, torch.ones_like(ids)).shape == (3, 38)


@pytest.mark.skipif(not NATIVE, reason="no native library")
def test_what_the_native_call_does_not_give_comes_from_the_modules(tiny: Tiny, ids: Tensor) -> None:
    _, packed = twins(tiny, ids, "llama", "NVFP4-W4A4KV4", global_scale="row")
    cache = PackedCache(packed)
    with torch.no_grad():
        packed(ids, past_key_values=cache)
        hidden = packed(ids[:, :1], past_key_values=cache, output_hidden_states=True).hidden_states
        assert len(hidden) == 3  # the embeddings and each layer's output
        embedded = packed.get_input_embeddings()(ids[:, :1])
        by_ids = packed(ids[:, :1], past_key_values=cache).logits
        cache = PackedCache(packed)
        packed(ids, past_key_values=cache)
        packed(ids[:, :1], past_key_values=cache)
        assert torch.equal(packed(inputs_embeds=embedded, past_key_values=cache).logits, by_ids)
        with pytest.raises(ReqatError, match="3 rows, 2 "):
            packed(ids[:2, :1], past_key_values=cache)


def test_what_has_no_kernel_stays_frozen(tiny: Tiny, ids: Tensor) -> None:
    model = tiny("llama", hidden_size=128, intermediate_size=128)
    prepare(model, "INT4-row-W4A4KV4")
    pack(model)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    assert greedy(model, ids, torch.ones_like(ids)).shape == (3, 38)


def test_packing_twice_saving_and_errors(tiny: Tiny, ids: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ReqatError, match="call prepare"):
        pack(tiny("llama"))
    model = tiny("llama")
    prepare(model, "NVFP4-W4A4KV4", global_scale="static")
    with pytest.raises(ReqatError, match="calibrate_static"):
        pack(model)
    calibrate_static(model, [ids])
    assert pack(pack(model)) is model
    with pytest.raises(ReqatError, match="before pack"):
        save_model(model, None, tmp_path / "model")


@pytest.mark.skipif(not NATIVE, reason="no native library")
def test_a_diverged_input_is_named(tiny: Tiny, ids: Tensor) -> None:
    _, packed = twins(tiny, ids, "llama", "NVFP4-W4A4KV4", global_scale="row")
    cache = PackedCache(packed)
    with torch.no_grad():
        packed(ids, past_key_values=cache)
        packed.get_decoder().layers[1].input_layernorm.weight[3] = float("inf")
        packed.get_decoder().forward.stack._alive[1][1][0][3] = float("inf")
        with pytest.raises(ValueError, match=r"layers\.1.* input .*NaN"):
            packed(ids[:, :1], past_key_values=cache)


@pytest.mark.slow
@pytest.mark.long
def test_without_the_library_it_is_the_same_model() -> None:
    script = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from reqat import pack, prepare
torch.manual_seed(0)
shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
model = LlamaForCausalLM(LlamaConfig(vocab_size=61, **shape)).eval()
prepare(model, "NVFP4-W4A4KV4", global_scale="row")
pack(model)
ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))
print(model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0).tolist())
"""
    results = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "REQAT_ISA": isa},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for isa in ("", "torch", "portable")
    ]
    assert results[0] == results[1] == results[2] and results[0].count("[") == 3
