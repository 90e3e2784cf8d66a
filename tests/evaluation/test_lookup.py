"""Prompt lookup gives the response that one token a step gives, in fewer passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from reqat.config.errors import ReqatError
from reqat.generation import Decoding, generate, generate_with_lookup
from reqat.generation.lookup import Table
from reqat.inference import pack
from reqat.models import calibrate_static, prepare
from reqat_kernels.native import instruction_set

Tiny = Callable[..., LlamaForCausalLM]
PROMPT = [1, 5, 9, 7, 5, 9, 7, 5, 9, 4, 11, 30, 5, 9]
NATIVE = instruction_set() != "torch"
#: name, options, type, options of pack (None: prepared, not packed)
MODELS: dict[str, tuple[str, dict[str, Any], torch.dtype, dict[str, Any] | None]] = {
    "packed": ("NVFP4-W4A4KV4", {"global_scale": "row"}, torch.float32, {}),
    "packed, static": ("NVFP4-W4A4KV4", {"global_scale": "static"}, torch.float32, {}),
    "packed, E1M2 cache": ("NVFP4-W4A4KV4", {"kv_element": "E1M2"}, torch.float32, {}),
    "packed, MXFP4": ("MXFP4-W4A4KV4", {"rotation": 32}, torch.float32, {}),
    "packed, inputs at 16 bits": ("NVFP4-W4A16KV4", {}, torch.float32, {}),
    "packed, bfloat16": ("NVFP4-W4A4KV4", {"global_scale": "row"}, torch.bfloat16, {}),
    "packed, head in four bits": ("NVFP4-W4A4KV4", {"global_scale": "row"}, torch.bfloat16, {"head": "NVFP4-A8"}),
    "packed, head in int8": ("NVFP4-W4A4KV4", {"global_scale": "row"}, torch.float32, {"head": "INT8"}),
    "packed, cache at 16 bits": ("NVFP4-W4A4", {"global_scale": "row"}, torch.float32, {}),
    "fake-quantized": ("NVFP4-W4A4KV4", {"global_scale": "row"}, torch.float32, None),
    "BF16": ("BF16", {}, torch.float32, None),
}


def loaded(tiny: Tiny, what: str, **changes: Any) -> LlamaForCausalLM:
    name, options, dtype, packing = MODELS[what]
    model = tiny(**changes).to(dtype)
    prepare(model, name, **options)
    if name != "BF16":
        calibrate_static(model, [torch.tensor([PROMPT])])
    return model if packing is None else pack(model, **packing)


SAME = {"seed": 3, "row_key": "p", "max_new_tokens": 48, "eos_id": ()}


@pytest.mark.parametrize(
    "decoding", [Decoding.greedy(), Decoding.parse("sample(temperature=0.3, top_p=0.95)")], ids=str
)
@pytest.mark.parametrize("what", MODELS)
def test_the_response_is_that_of_one_token_a_step(tiny: Tiny, what: str, decoding: Decoding) -> None:
    model = loaded(tiny, what)
    (expected,) = generate(
        model, None, [PROMPT], seeds=[3], row_keys=["p"], decoding=decoding, max_new_tokens=48, eos_id=()
    )
    for guesses in (1, 7):
        found = generate_with_lookup(model, None, PROMPT, guesses=guesses, decoding=decoding, **SAME)
        assert found.generation == expected
        assert found.steps + found.accepted == 48 - 1 and found.accepted <= found.guesses <= guesses * found.steps
        # A response that repeats itself: greedily every tiny model comes to a cycle.
        assert not decoding.is_greedy or found.accepted > 0


def test_it_ends_where_generation_ends(tiny: Tiny) -> None:
    model = loaded(tiny, "packed")
    greedy = Decoding.greedy()
    free = generate_with_lookup(model, None, PROMPT, guesses=5, decoding=greedy, **SAME).generation.token_ids
    for end in set(free):
        same = {"decoding": greedy, "max_new_tokens": 40, "eos_id": end}
        (expected,) = generate(model, None, [PROMPT], seeds=[3], row_keys=["p"], **same)
        assert generate_with_lookup(model, None, PROMPT, guesses=5, seed=3, row_key="p", **same).generation == expected


@pytest.mark.skipif(not NATIVE, reason="no native library")
@pytest.mark.parametrize("what", ["packed", "packed, static", "packed, MXFP4", "packed, cache at 16 bits"])
def test_transformers_own_prompt_lookup_runs_on_a_packed_model(tiny: Tiny, what: str) -> None:
    model, ids = loaded(tiny, what), torch.tensor([PROMPT])
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 48, "do_sample": False, "pad_token_id": 0}
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    expected = model.generate(ids, eos_token_id=None, **asked)
    alone = len(passes)
    found = model.generate(ids, eos_token_id=None, prompt_lookup_num_tokens=5, **asked)
    assert torch.equal(found, expected)
    assert len(passes) - alone < alone


def test_what_was_guessed_leaves_the_cache_again(tiny: Tiny) -> None:
    """After a crop in the middle of a tile, keys, values and their scales are those of a cache that never had more."""
    model = loaded(tiny, "packed")
    from reqat.generation.batches import RunningBatch

    with torch.no_grad():
        a, b = (RunningBatch(model, [PROMPT], 40, None) for _ in range(2))
        a.step_tokens([5, 9, 7, 30, 31, 32])
        a.forget(3)
        left = a.step_tokens([4, 11])
        right = [b.step_tokens([token]) for token in (5, 9, 7, 4, 11)]
    assert a.length == b.length == a.past.get_seq_length() == len(PROMPT) + 5
    torch.testing.assert_close(left, torch.cat(right[-2:]), rtol=1e-5, atol=1e-5)
    for mine, other in zip(a.past.layers, b.past.layers, strict=True):
        pairs = zip(mine.dequantized(a.length), other.dequantized(a.length), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs) or not NATIVE


def test_a_table_follows_the_longest_and_latest() -> None:
    table = Table([1, 2, 3, 4, 9, 2, 3, 7, 8, 2, 3])
    assert table.guess(3) == [7, 8, 2]  # (8, 2, 3) is new; (2, 3) was last followed by 7
    table.extend([4])
    assert table.guess(2) == [9, 2]  # (2, 3, 4) was followed by 9
    table.extend([50])
    assert table.guess(2) == []
    assert Table([1]).guess(4) == [] and Table([7, 7, 7]).guess(9) == [7]


def test_what_does_not_go_is_refused(tiny: Tiny) -> None:
    model = loaded(tiny, "BF16")
    for guesses in (0, 64):
        with pytest.raises(ReqatError, match=f"{guesses}.*1 to 63"):
            generate_with_lookup(model, None, PROMPT, guesses=guesses, decoding=Decoding.greedy(), **SAME)
    policy = Decoding.parse("reset(t_low=0.3, tau0=0.5)")
    with pytest.raises(ReqatError, match="reset"):
        generate_with_lookup(model, None, PROMPT, guesses=3, decoding=policy, **SAME)
