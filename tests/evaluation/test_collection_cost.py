"""What collecting entropies costs: the same work with and without it, row by row. On no clock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from reqat.config.policy import Decoding
from reqat.evaluation import collection_cost
from reqat.evaluation.collection_cost import PLAIN, RECORDED, RESET, WRITTEN, measure_collection
from reqat.models import load_model, load_tokenizer, save_model
from reqat_kernels.bench import Wrong
from reqat_kernels.bench.machine import Bandwidth, Probe

UNKNOWN = Bandwidth((), (), None)
RULE = "reset(t_low=0.1, tau0=0.5, top_p=0.9)"


@pytest.fixture
def checkpoint(tiny: Callable[..., LlamaForCausalLM], tmp_path: Path) -> str:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    save_model(tiny(), tokenizer, tmp_path / "model")
    return str(tmp_path / "model")


def test_every_provider_generates_in_turns_and_has_a_row(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []  # rows and processors of each generation
    plain = collection_cost.generate

    def counted(model: Any, tokenizer: Any, prompts: Any, **options: Any) -> Any:
        found = plain(model, tokenizer, prompts, **options)
        assert all(len(g.token_ids) == options["max_new_tokens"] for g in found)
        calls.append((len(prompts), len(options["processors"] or [])))
        return found

    monkeypatch.setattr(collection_cost, "generate", counted)
    said: list[str] = []
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    result = measure_collection(
        checkpoint, batch=3, prompt_tokens=4, output_tokens=6, rounds=4, probe=Probe(1024), bandwidth=UNKNOWN,
        scratch=scratch, say=said.append,
    )  # fmt: skip
    assert [row.provider for row in result.rows] == [PLAIN, RECORDED, WRITTEN, RESET]
    # One to compare with and one of each as warm-up, then four rounds, whose order turns by one.
    turns = [[0, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 1], [1, 0, 1, 1]]
    assert calls == [(3, 0)] + [(3, processors) for turn in (turns[0], *turns) for processors in turn]
    assert len(said) == 16 and said[0] == f"entropy, batch 3: {PLAIN}, round 1 of 4"
    # bfloat16, as the rows say: two bytes a parameter
    parameters = sum(p.numel() for p in load_model(checkpoint).parameters())
    assert result.rows[0].weight_bytes == pytest.approx(2 * parameters, rel=0.01)
    for row in result.rows:
        assert (row.kernel, row.shape, row.m, row.format) == ("entropy", "B=3 P=4 T=6", 3, "BF16")
        assert row.n + row.set_aside == 4
        assert row.tokens_per_s == pytest.approx(3e6 / row.median_us)
        assert row.weight_bytes == result.rows[0].weight_bytes
    assert list(scratch.iterdir()) == []  # nothing is left behind


def test_recording_that_changes_a_token_is_refused(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Meddler(collection_cost.EntropyRecorder):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            return -super().__call__(input_ids, scores)

    monkeypatch.setattr(collection_cost, "EntropyRecorder", Meddler)
    options: Any = {"batch": 2, "prompt_tokens": 3, "output_tokens": 4, "probe": Probe(1024), "bandwidth": UNKNOWN}
    with pytest.raises(Wrong, match="EntropyRecorder.*other tokens"):
        measure_collection(checkpoint, rounds=1, **options)
    with pytest.raises(ValueError, match="rounds=0"):
        measure_collection(checkpoint, rounds=0, **options)


def test_reset_is_timed_at_what_its_policy_generates(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, seen = collection_cost.generate, []

    def kept(model: Any, tokenizer: Any, prompts: Any, **options: Any) -> Any:
        found = plain(model, tokenizer, prompts, **options)
        if any(isinstance(p, collection_cost.ReSET) for p in options["processors"] or []):
            with_policy = options | {"processors": None, "decoding": Decoding.parse(RULE), "eos_id": ()}
            seen.append(found == plain(model, load_tokenizer(checkpoint), prompts, **with_policy))
        return found

    monkeypatch.setattr(collection_cost, "generate", kept)
    options: Any = {"batch": 2, "prompt_tokens": 3, "output_tokens": 8, "rounds": 1}
    options |= {"probe": Probe(1024), "bandwidth": UNKNOWN}
    measure_collection(checkpoint, reset=RULE, **options)
    assert seen == [True, True]
    with pytest.raises(ValueError, match="'greedy' has no rule"):
        measure_collection(checkpoint, reset="greedy", **options)
