"""Heads in fewer bits against the same packed model's in BF16; and prompt lookup timed. On no clock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from reqat.config.errors import ReqatError
from reqat.config.throughput import Throughput, load_throughput
from reqat.data import encode_prompt
from reqat.data.text import running_text
from reqat.evaluation import llama_cpp
from reqat.evaluation.heads import _ratio_error, compare_heads, metrics
from reqat.evaluation.likelihood import perplexity
from reqat.evaluation.loading import load_at
from reqat.evaluation.speculation import measure_speculation
from reqat.evaluation.throughput import bits
from reqat.inference import pack
from reqat.models import load_tokenizer
from reqat.tasks import problems

ROOT = Path(__file__).resolve().parents[2]
BASE = str(ROOT / "results" / "base" / "model")
PRECISION = "NVFP4-W4A4KV4"


def test_a_head_in_bf16_is_the_reference_and_fewer_bits_are_further_away() -> None:
    tokenizer = load_tokenizer(BASE)
    asked = problems(["chain_sum"], "test", 6, seed=0)
    rows = [(ids[:1], ids[1:]) for ids in (encode_prompt(tokenizer, problem.prompt) for problem in asked)]
    choices = [("BF16", None), ("INT8", None), ("MXFP4", None), ("MXFP4", "BF16")]
    with pytest.warns(UserWarning, match="MXFP4.*BF16"):
        found = compare_heads(
            BASE, tokenizer, PRECISION, choices, rows=rows, problems=asked[:2], max_new_tokens=24, global_scale="row"
        )
    same, int8, four, outer = found
    tokens = sum(len(continuation) for _, continuation in rows)
    assert all((one.rows, one.tokens, one.problems) == (6, tokens, 2) for one in found)
    assert same.kl_nats == 0 == same.nll_change_nats and same.same_argmax == tokens
    assert same.correct == same.reference_correct and same.same_responses == 2
    assert 0 < int8.kl_nats < four.kl_nats and four.weight_bytes < int8.weight_bytes < same.weight_bytes
    assert outer.weight_bytes > same.weight_bytes  # stored twice
    model = pack(load_at(BASE, PRECISION, gpu=False, global_scale="row"), head="MXFP4")
    # Of whole sequences; in other batches an activation may cross a rounding threshold.
    assert four.perplexity == pytest.approx(perplexity(model, [[*a, *b] for a, b in rows]), rel=0.01)
    assert metrics(found)[2]["kl_nats"] == four.kl_nats


def test_the_standard_error_is_that_of_a_mean_where_rows_are_alike() -> None:
    x = np.random.default_rng(0).normal(size=50)
    assert _ratio_error(7 * x, np.full(50, 7.0)) == pytest.approx(x.std(ddof=1) / 50**0.5)
    assert _ratio_error(x[:1], np.ones(1)) is None


def test_nothing_to_compare_on_is_refused() -> None:
    with pytest.raises(ReqatError, match="rows of tokens or problems"):
        compare_heads(BASE, load_tokenizer(BASE), PRECISION, [("INT8", None)])


def test_bits_are_those_of_what_is_stored() -> None:
    def packed(head: str | None) -> tuple[float, float, float]:
        return bits(pack(load_at(BASE, PRECISION, dtype=torch.bfloat16, gpu=False), head=head))

    assert packed(None)[1:] == (16, 16)
    body, head, embeddings = packed("MXFP4-A8")
    # 4.5 bits a number; a few bytes more where a layer's bytes end inside a cache line, or a vocabulary inside a tile
    assert 4.5 <= body <= 4.6 and 4.25 <= head == embeddings <= 4.25 * 272 / 260 + 0.01


def test_every_number_of_guesses_gives_every_response() -> None:
    tokenizer = load_tokenizer(BASE)
    model = pack(load_at(BASE, PRECISION, gpu=False, global_scale="row"))
    prompts = [encode_prompt(tokenizer, problem.prompt) for problem in problems(["chain_sum"], "test", 2, seed=0)]
    found = measure_speculation(model, tokenizer, prompts, [2, 5], max_new_tokens=40)
    assert [row.guesses for row in found] == [0, 2, 5]
    for row in found:
        assert row.prompts == row.same_responses == 2 == len(row.seconds_each)
        assert row.tokens == found[0].tokens == row.steps + row.accepted + 2 and row.seconds > 0
        assert row.metrics()["tokens_per_s"] == row.tokens / row.seconds
    with pytest.raises(ReqatError, match="0"):
        measure_speculation(model, tokenizer, prompts, [0], max_new_tokens=4)


def test_every_matrix_of_llama_cpp_can_be_in_four_bits(tiny: Callable[..., LlamaForCausalLM]) -> None:
    """Q4_0 has 16 levels a block of 32, Q8_0 more; bits a number are those of its blocks' bytes."""
    model: Any = tiny(vocab_size=64)
    weights = {name: llama_cpp.rounded(model, name) for name in ("Q4_0", "Q4_0-all")}
    levels = {
        name: max(len(block.unique()) for block in rounded.lm_head.weight.detach().view(-1, 32))
        for name, rounded in weights.items()
    }
    assert levels["Q4_0-all"] <= 16 < levels["Q4_0"]
    for part in ("model.embed_tokens", "lm_head"):
        assert not torch.equal(
            weights["Q4_0"].get_submodule(part).weight, weights["Q4_0-all"].get_submodule(part).weight
        )
    import gguf

    for name, bits_of in llama_cpp.BITS.items():
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        assert bits_of == 8 * size / block


def test_sections_can_be_chosen() -> None:
    whole = load_throughput("smoke", ROOT / "config")
    assert whole is not None
    chosen = whole.only(["heads", "speculation"])
    assert chosen.heads == whole.heads and chosen.speculation == whole.speculation and chosen.burst_ms == whole.burst_ms
    assert chosen == Throughput(
        heads=whole.heads, speculation=whole.speculation, ring_bytes=whole.ring_bytes, burst_ms=whole.burst_ms,
        memory_mb=whole.memory_mb,
    )  # fmt: skip
    assert chosen.id != whole.id
    with pytest.raises(ReqatError, match="'head'.*'heads'"):
        whole.only(["head"])


def test_running_text_is_named_by_its_digest(tmp_path: Path) -> None:
    text, digest = running_text("python")
    assert len(text) > 100_000 and "statement" in text and digest == running_text("python")[1]
    (tmp_path / "a.txt").write_text("a text")
    assert running_text(str(tmp_path / "a.txt"))[0] == "a text"
    with pytest.raises(ReqatError, match="none.txt"):
        running_text(str(tmp_path / "none.txt"))
