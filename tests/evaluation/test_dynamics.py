"""One pass of several models over the same verified traces, each at its own precision."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from reqat.config.errors import ReqatError
from reqat.config.precision import PrecisionSpec
from reqat.data.tokenizer import build_tokenizer
from reqat.evaluation.dynamics import run_dynamics, verified_traces
from reqat.evaluation.trace_folder import TraceFolder
from reqat.models import freeze, load_model, prepare, save_model
from reqat.tasks import problems, verify, write_trace

FAMILIES = {"chain_sum": {"min_terms": 2, "max_terms": 3}, "simple_equations": {}}
FP4 = PrecisionSpec(name="NVFP4-W4A4KV4", global_scale="row")
_RNG = random.Random(0)
TOKENIZER = build_tokenizer(
    text for p in problems(FAMILIES, "train", 300, 0) for text in (p.prompt, write_trace(p, _RNG) or "")
)
Tiny = Callable[..., LlamaForCausalLM]


@pytest.fixture
def folders(tiny: Tiny, tmp_path: Path) -> dict[str, Path]:
    model = tiny(vocab_size=len(TOKENIZER), max_position_embeddings=512)
    save_model(model, TOKENIZER, tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    save_model(model, TOKENIZER, tmp_path / "trained")
    return {name: tmp_path / name for name in ("base", "trained")}


def test_traces_are_verified_solutions_of_the_split_with_an_end() -> None:
    traces = verified_traces(FAMILIES, TOKENIZER, n=12, split="validation", seed=4)
    asked = {p.id: p for p in problems(FAMILIES, "validation", 12, 4)}
    assert [t.info.problem for t in traces] == list(asked)
    for trace in traces:
        assert verify(asked[trace.info.problem], trace.info.response)
        assert trace.response_ids[-1] == TOKENIZER.eos_token_id
        assert trace.prompt_ids[0] == TOKENIZER.bos_token_id
        assert trace.info.correct and trace.info.finished and trace.info.source == "given"
    assert traces == verified_traces(FAMILIES, TOKENIZER, n=12, split="validation", seed=4)
    trained = {t.info.problem for t in verified_traces(FAMILIES, TOKENIZER, n=12, split="train", seed=4)}
    assert not trained & set(asked)


def test_every_model_reads_the_same_tokens_at_its_own_precision(folders: dict[str, Path], tmp_path: Path) -> None:
    traces = verified_traces(FAMILIES, TOKENIZER, n=6)
    models = {
        "base": (folders["base"], PrecisionSpec()),
        "FT": (folders["trained"], PrecisionSpec()),
        "FT+PTQ": (folders["trained"], FP4),
    }
    found = run_dynamics(models, traces, tmp_path / "out", progress=False)
    folder = TraceFolder(tmp_path / "out")
    assert found == {"labels": list(models), "traces": 6, "tokens": folder.n_tokens}
    assert list(folder.labels) == list(models)
    assert folder.n_tokens == sum(len(t.response_ids) for t in traces)
    for label, (path, spec) in models.items():
        model = load_model(path)
        prepare(model, spec.name, **spec.options())
        freeze(model)
        entropies = []
        for trace in traces:
            with torch.no_grad():
                logits = model(torch.tensor([[*trace.prompt_ids, *trace.response_ids]])).logits[0]
            p = logits[len(trace.prompt_ids) - 1 : -1].double().softmax(-1)
            entropies.append(torch.special.entr(p).sum(-1))
        np.testing.assert_allclose(folder.entropy(label), torch.cat(entropies).numpy(), rtol=1e-4, atol=1e-5)
    assert not np.allclose(folder.entropy("FT"), folder.entropy("FT+PTQ"))


def test_what_cannot_be_compared_is_refused(folders: dict[str, Path], tiny: Tiny, tmp_path: Path) -> None:
    traces = verified_traces(FAMILIES, TOKENIZER, n=2)
    base = (folders["base"], PrecisionSpec())
    with pytest.raises(ReqatError, match="compare models with a base"):
        run_dynamics({"base": base}, traces, tmp_path / "out")
    static = (folders["trained"], FP4.model_copy(update={"global_scale": "static"}))
    with pytest.raises(ReqatError, match="QAT.*static"):
        run_dynamics({"base": base, "QAT": static}, traces, tmp_path / "out")
    other = build_tokenizer(["other words"])
    save_model(tiny(vocab_size=len(other)), other, tmp_path / "other")
    with pytest.raises(ReqatError, match="different tokenizers"):
        run_dynamics({"base": base, "QAT": (tmp_path / "other", PrecisionSpec())}, traces, tmp_path / "out")
    assert not (tmp_path / "out" / "meta.json").exists()
