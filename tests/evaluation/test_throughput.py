"""Timing of decoding: every step once, whoever is wrong is found out, whoever crashes loses its own rows, bytes are
those of storages. On no clock."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import reqat
from reqat.evaluation import decoders, llama_cpp
from reqat.evaluation.decoders import Decoder, Entry, Steps, agrees
from reqat.evaluation.throughput import allocated_bytes, measure_decoding, model_bytes, packed_entry, timed_generate
from reqat.models import load_model, save_model
from reqat_kernels.bench import Wrong
from reqat_kernels.bench.machine import Bandwidth
from reqat_kernels.bench.turns import WORKER_BYTES, Roofline
from reqat_kernels.bench.worker import cpus

IDS = torch.tensor([[1, 5, 9, 7]])


@pytest.fixture
def checkpoint(tiny: Callable[..., LlamaForCausalLM], tmp_path: Path) -> str:
    """A saved tiny model whose sizes any FP4 format divides."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    save_model(tiny(hidden_size=128, intermediate_size=128), tokenizer, tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def probe() -> Iterator[Roofline]:
    probe = Roofline(memory=4096, bandwidth=Bandwidth((1024,), (1e9,), 10**12))
    yield probe
    probe.stop()


def test_steps_count_from_the_first_token() -> None:
    steps = Steps(torch.zeros(1, 4), [9000, 11000, 14000, 18000], [0, 0, 1500, 1500], begun_ns=4000)
    assert steps.prefill_us() == 5.0
    assert steps.durations_us(4) == [2.0, 3.0, 4.0] and steps.durations_us(3) == [2.0, 3.0]
    assert steps.waits(4) == [0.0, 0.5, 0.0]


def test_generation_on_the_clock_is_the_ordinary_one(tiny: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny()
    steps = timed_generate(model, IDS.repeat(2, 1), 6)
    plain = model.generate(  # type: ignore[operator]
        IDS, max_new_tokens=6, min_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(IDS)
    )
    assert torch.equal(steps.tokens, plain[:, 4:].repeat(2, 1))
    assert len(steps.stamps_ns) == len(steps.waits_ns) == 6 and steps.stamps_ns == sorted(steps.stamps_ns)
    # Two layers, keys and values, 2 rows, 2 heads, 4 + 6 - 1 tokens, 32 wide, float32
    assert allocated_bytes(steps.cache) == 2 * 2 * 2 * 2 * 9 * 32 * 4


def test_who_chooses_what_the_reference_would_not_is_found_out(tiny: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny()
    tokens = timed_generate(model, IDS, 5).tokens
    agrees(model, IDS, tokens, "itself")
    with torch.no_grad():
        worst = model(torch.cat([IDS, tokens[:, :-1]], 1)).logits[0, -1].argmin()
    with pytest.raises(Wrong, match="somebody.*standard deviations"):
        agrees(model, IDS, torch.cat([tokens[:, :-1], worst.reshape(1, 1)], 1), "somebody")


def test_bytes_are_those_of_storages_each_once() -> None:
    x = torch.zeros(100)
    assert allocated_bytes([x, x[:3]], {"a": (x.view(10, 10),)}, None, "text") == 400
    layer = torch.nn.Linear(4, 4)
    assert allocated_bytes(*layer.parameters()) == 4 * 20


def test_every_batch_and_length_has_a_row_of_every_decoder(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, probe: Roofline
) -> None:
    monkeypatch.setattr(decoders, "MARGIN", 3.0)  # random weights: four bits of them choose other tokens
    said: list[str] = []
    result = measure_decoding(
        checkpoint,
        "NVFP4-W4A4KV4",
        batches=[1, 2],
        prompt_tokens=4,
        output_tokens=[3, 5],
        prefill_tokens=[6],
        rounds=2,
        probe=probe,
        scratch=Path("unused"),
        say=said.append,
    )
    names = ["transformers, sdpa", "transformers, eager", "reqat.pack"]
    decoded = [row for row in result.rows if row.kernel == "decode"]
    assert [(r.provider, r.m, r.output_tokens) for r in decoded] == [
        (name, batch, tokens) for batch in (1, 2) for name in names for tokens in (3, 5)
    ]
    # In turns: who came first in one round comes last in the next.
    turns = [line.split(": ")[1].rpartition(" ")[0] for line in said if "batch 1" in line]
    assert turns == [*names, *names[1:], names[0]]
    for row in decoded:
        assert row.n + row.set_aside == 2 * (row.output_tokens - 1)
        assert row.ours == (row.provider == "reqat.pack")
        assert row.tokens_per_s > 0 and row.cache_bytes > 0 and not row.cold
    prompts = [row for row in result.rows if row.kernel == "prefill"]
    assert [(r.provider, r.shape, r.n) for r in prompts] == [(name, "B=1 P=6", 3) for name in names]
    assert all(row.tokens_per_s == pytest.approx(6e6 / row.median_us) for row in prompts)
    weights = {row.provider: row.weight_bytes for row in result.rows}
    assert weights["reqat.pack"] < 0.6 * weights["transformers, sdpa"] == 0.6 * weights["transformers, eager"]
    assert len(result.skipped) == 1 and result.skipped[0].startswith("decode, llama.cpp: ") and not result.refused


@pytest.mark.skipif(len(cpus()) < 2, reason="one CPU")
def test_every_number_of_threads_has_rows(checkpoint: str, monkeypatch: pytest.MonkeyPatch, probe: Roofline) -> None:
    monkeypatch.setattr(decoders, "MARGIN", 3.0)
    result = measure_decoding(
        checkpoint, "NVFP4-W4A4KV4", batches=[1], prompt_tokens=2, output_tokens=[2], threads=[1, 2], probe=probe
    )
    assert [(row.provider, row.threads) for row in result.rows] == [
        (name, n) for name in ("transformers, sdpa", "transformers, eager", "reqat.pack") for n in (1, 2)
    ]
    with pytest.raises(ValueError, match="threads on"):
        measure_decoding(
            checkpoint, "BF16", batches=[1], prompt_tokens=2, output_tokens=[2], threads=[10**4], probe=probe
        )


def test_a_decoder_that_crashes_or_is_wrong_loses_its_own_rows(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, probe: Roofline
) -> None:
    monkeypatch.setattr(decoders, "MARGIN", 3.0)

    def entry(name: str, generate: Callable[[Any, torch.Tensor, int], Steps]) -> Entry:
        def make(ids: torch.Tensor) -> Decoder:
            model: Any = load_model(checkpoint)
            return Decoder(lambda ids, tokens: generate(model, ids, tokens), 10, lambda cache: None)

        return Entry(name, "FP32", make, batches=(1,))

    def crashes(model: Any, ids: torch.Tensor, tokens: int) -> Steps:
        if tokens == 3:  # not in its check
            os.kill(os.getpid(), signal.SIGSEGV)
        return timed_generate(model, ids, tokens)

    def wrong(model: Any, ids: torch.Tensor, tokens: int) -> Steps:
        steps = timed_generate(model, ids, tokens)
        with torch.no_grad():
            steps.tokens[:] = model(ids).logits[0, -1].argmin()
        return steps

    more = [entry("crashes", crashes), entry("honest", timed_generate), entry("wrong", wrong)]
    result = measure_decoding(
        checkpoint, "NVFP4-W4A4KV4", batches=[1, 2], prompt_tokens=4, output_tokens=[3], prefill_tokens=[4],
        probe=probe, more=more,
    )  # fmt: skip
    failures = {(r.provider, r.kernel, r.m): r.failure for r in result.rows}
    lost = {key: reason for key, reason in failures.items() if reason is not None}
    assert set(lost) == {(name, kernel, 1) for name in ("crashes", "wrong") for kernel in ("decode", "prefill")}
    assert "SIGSEGV" in lost["crashes", "decode", 1] and "standard deviations" in lost["wrong", "decode", 1]
    assert {key[0] for key in failures if key[2] == 2} == {"transformers, sdpa", "transformers, eager", "reqat.pack"}
    assert ("honest", "decode", 1) in failures and len(result.refused) == 2


@pytest.mark.parametrize("head", ["NVFP4", "INT8-A8", "BF16"])
def test_a_packed_head_is_held_to_one_that_is_rounded_likewise(checkpoint: str, head: str) -> None:
    ids = torch.arange(3, 3 + 12).view(1, -1)
    plain, found = (packed_entry(checkpoint, "NVFP4-W4A4KV4", name).held_to(None, ids) for name in (None, head))
    weight, rounded = (model.get_output_embeddings().weight.float() for model in (plain, found))
    codes = rounded.unique().numel()
    if head == "BF16":
        assert torch.equal(weight, rounded)
    else:
        fmt = "INT8-row" if head == "INT8-A8" else "NVFP4"
        assert codes < weight.unique().numel()
        assert torch.equal(rounded, reqat.quantize_dequantize(weight, fmt).bfloat16().float())


def test_planned_memory_follows_from_the_headers_of_the_weights(checkpoint: str) -> None:
    parameters = sum(p.numel() for p in load_model(checkpoint).parameters())
    bare, cached = model_bytes(checkpoint, 0), model_bytes(checkpoint, 1000)
    # The reference alone is 4 bytes a parameter; the cache of one decoder is 2 layers of 128 bfloat16 keys and values.
    own = (3 + len(llama_cpp.TYPES)) * WORKER_BYTES  # a process of the reference, transformers, ours, each file
    assert bare - 30 * parameters < own < bare - 10 * parameters and cached - bare >= 1000 * 2 * 2 * 128 * 2
    assert model_bytes(checkpoint, 0, packed=3) == bare + 2 * (model_bytes(checkpoint, 0, packed=2) - bare) > bare


def test_weights_for_llama_cpp_round_like_its_types(tiny: Callable[..., LlamaForCausalLM]) -> None:
    model: Any = tiny()
    rounded = llama_cpp.rounded(model, "Q4_0")
    w, q = (m.model.layers[0].mlp.up_proj.weight.detach().view(-1, 32) for m in (model, rounded))
    step = w.abs().amax(1, keepdim=True) / 8  # signed maximum / -8, stored in float16
    assert not torch.equal(w, q) and ((q - w).abs() <= step * (1 + 2**-10)).all()
    assert max(len(row.unique()) for row in q) <= 16
    head, rounded_head = model.lm_head.weight.detach(), rounded.lm_head.weight.detach()
    assert (head - rounded_head).abs().max() <= head.abs().max() / 127  # Q8_0
    assert torch.equal(model.model.norm.weight, rounded.model.norm.weight)
    bf16 = llama_cpp.rounded(model, "BF16").model.layers[0].mlp.up_proj.weight
    assert torch.equal(bf16, model.model.layers[0].mlp.up_proj.weight.to(torch.bfloat16).float())
