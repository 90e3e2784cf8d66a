"""What collecting entropies costs: the same work with and without it, row by row. On no clock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from reqat.evaluation import collection_cost
from reqat.evaluation.collection_cost import PLAIN, RECORDED, WRITTEN, measure_collection
from reqat.models import save_model
from reqat_kernels.bench import Wrong
from reqat_kernels.bench.machine import Probe


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
        checkpoint, batch=3, prompt_tokens=4, output_tokens=6, rounds=4, probe=Probe(1024), scratch=scratch,
        say=said.append,
    )  # fmt: skip
    assert [row.provider for row in result.rows] == [PLAIN, RECORDED, WRITTEN]
    # One to compare with and one of each as warm-up, then four rounds, whose order turns by one.
    assert calls == [(3, 0), *[(3, 0), (3, 1), (3, 1)] * 2, (3, 1), (3, 1), (3, 0), (3, 1), (3, 0), (3, 1),
                     (3, 0), (3, 1), (3, 1)]  # fmt: skip
    assert len(said) == 12 and said[0] == f"entropy, batch 3: {PLAIN}, round 1 of 4"
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
    with pytest.raises(Wrong, match="EntropyRecorder took other tokens"):
        measure_collection(checkpoint, batch=2, prompt_tokens=3, output_tokens=4, rounds=1, probe=Probe(1024))
    with pytest.raises(ValueError, match="rounds=0"):
        measure_collection(checkpoint, batch=2, prompt_tokens=3, output_tokens=4, rounds=0)
