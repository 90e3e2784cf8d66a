"""Entropies against float64, and while sampling against teacher forcing."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, LogitsProcessorList

from reqat.config.errors import ReqatError
from reqat.data import build_tokenizer, encode_prompt
from reqat.evaluation import entropies as module
from reqat.evaluation.entropies import (
    EntropyRecorder,
    ForcedTrace,
    RecordedTrace,
    force_traces,
    vocabulary_of,
)
from reqat.evaluation.trace_files import TraceInfo, TraceWriter
from reqat.evaluation.trace_folder import TraceFolder
from reqat.generation import BatchStart, Decoding, generate
from reqat.models import freeze, prepare

EOS = 2
Tiny = Callable[..., LlamaForCausalLM]


@dataclass(frozen=True)
class Question:
    id: str
    prompt: str
    family: str = "sums"
    answer: str = "4"


TOKENIZER = build_tokenizer(["2 + 2 = 4. So 2 + 1 gives 3, and the answer is 3.\n"])
QUESTIONS = [Question(f"q{i}", "2 + 2 =\n" if i % 3 else f"{i} + 1 + 1 =\n") for i in range(7)]


def reference(logits_NV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy, tail mass and probabilities in float64; the tail summed over all but the most likely."""
    p_NV = logits_NV.double().softmax(dim=-1)
    others_NV = p_NV.scatter(1, p_NV.argmax(dim=-1, keepdim=True), 0.0)
    tail_N = others_NV.sum(dim=-1)
    # log of the largest from the tail: of a p that rounds to 1 it would be 0, in float64 too
    entropy_N = torch.special.entr(others_NV).sum(dim=-1) - (1 - tail_N) * torch.log1p(-tail_N)
    return entropy_N, tail_N, p_NV


def forced_by_hand(model: LlamaForCausalLM, prompt: list[int], tokens: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 entropy, tail and probability of each token, from one plain forward pass of one response."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    entropy, tail, p = reference(logits)
    return entropy, tail, p.gather(1, torch.tensor(tokens)[:, None])[:, 0]


@pytest.mark.parametrize("batch_rows", [None, 5, 1])
def test_recording_changes_no_token_and_records_what_was_seen(
    tiny: Tiny, prompts: list[list[int]], batch_rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SPOOL_STEPS", 3)  # several pieces a batch
    model = tiny()
    settings: dict[str, Any] = {
        "seeds": list(range(len(prompts))),
        "row_keys": [f"p{i}" for i in range(len(prompts))],
        "decoding": Decoding(temperature=1.5),
        "max_new_tokens": 11,
        "eos_id": EOS,
        "batch_rows": batch_rows,
    }
    plain = generate(model, None, prompts, **settings)
    seen: dict[int, RecordedTrace] = {}
    recorder = EntropyRecorder(lambda trace: seen.setdefault(trace.row, trace), k=3)
    recorded = generate(model, None, prompts, processors=LogitsProcessorList([recorder]), **settings)
    recorder.close()
    assert recorded == plain
    assert {g.finished for g in plain} == {True, False}  # both ways to end
    assert sorted(seen) == list(range(len(prompts)))
    for row, generation in enumerate(plain):
        trace = seen[row]
        tokens = [*generation.token_ids, *([EOS] if generation.finished else [])]
        assert trace.tokens.tolist() == tokens and trace.finished == generation.finished
        entropy, tail, prob = forced_by_hand(model, prompts[row], tokens)
        # Another order of summation in the model: logits differ by about 1e-6 of their size (up to 30).
        for found, expected in (
            (trace.columns.entropy, entropy),
            (trace.columns.tail, tail),
            (trace.columns.prob, prob),
        ):
            np.testing.assert_allclose(found, expected.numpy(), rtol=3e-4, atol=1e-6)
        assert trace.columns.top.shape == (len(tokens), 3)


def test_recorder_sees_raw_logits_before_later_processors(tiny: Tiny, prompts: list[list[int]]) -> None:
    class Forbid:
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            scores = scores.clone()
            scores[:, 10:] = -torch.inf
            return scores

    seen: list[RecordedTrace] = []
    recorder = EntropyRecorder(seen.append, k=1)
    generate(
        tiny(),
        None,
        prompts[:4],
        seeds=[0] * 4,
        row_keys=list("abcd"),
        decoding=Decoding.greedy(),
        max_new_tokens=5,
        processors=LogitsProcessorList([recorder, Forbid()]),
    )
    recorder.close()
    assert all((trace.tokens < 10).all() for trace in seen)
    assert any((trace.columns.top >= 10).any() for trace in seen)


def write(folder: Path, labels: list[str], vocabulary: list[str], **options: Any) -> TraceWriter:
    return TraceWriter(folder, labels, vocabulary, **options)


def sample(
    model: LlamaForCausalLM,
    questions: list[Question],
    writer: TraceWriter,
    label: str,
    seeds: list[int],
    **options: Any,
) -> None:
    """Write a response to every question and seed, its entropies recorded in the same pass."""
    rows = [(question, seed) for question in questions for seed in seeds]

    def keep(trace: RecordedTrace) -> None:
        question, seed = rows[trace.row]
        ids = trace.tokens[:-1] if trace.finished else trace.tokens
        response = TOKENIZER.decode(ids.tolist(), skip_special_tokens=True)
        correct = question.answer in response
        info = TraceInfo(
            question.id, question.family, seed, label, question.prompt, response, question.answer, correct,
            trace.finished,
        )  # fmt: skip
        writer.add(info, trace.tokens, {label: trace.columns})

    names = [f"{question.id}, seed {seed}" for question, seed in rows]
    recorder = EntropyRecorder(keep, k=writer.k, names=names, spool=writer.folder)
    generate(
        model,
        TOKENIZER,
        [encode_prompt(TOKENIZER, question.prompt) for question, _ in rows],
        seeds=[seed for _, seed in rows],
        row_keys=[question.id for question, _ in rows],
        processors=LogitsProcessorList([recorder]),
        **options,
    )
    recorder.close()


@pytest.mark.parametrize("precision", ["BF16", "NVFP4-W4A4KV4"])
def test_sampled_and_forced_agree(tiny: Tiny, tmp_path: Path, precision: str) -> None:
    model = tiny(vocab_size=len(TOKENIZER), eos_token_id=TOKENIZER.eos_token_id)
    prepare(model, precision, global_scale="row")
    freeze(model)
    vocabulary = vocabulary_of(TOKENIZER, len(TOKENIZER))
    with write(tmp_path / "sampled", [precision], vocabulary) as writer:
        decoding = Decoding.sample(temperature=1.0, top_p=1.0)
        sample(model, QUESTIONS, writer, precision, [3, 4], decoding=decoding, max_new_tokens=20, batch_rows=6)
    sampled = TraceFolder(tmp_path / "sampled")
    assert sampled.traces[["problem", "seed"]].drop_duplicates().shape == (14, 2)
    assert set(sampled.traces["source"]) == {precision}
    forced_traces = []
    token = sampled.column("token")
    for i, row in enumerate(sampled.traces.itertuples()):
        ids = token[sampled.starts[i] : sampled.starts[i] + sampled.lengths[i]].tolist()
        assert (ids[-1] == TOKENIZER.eos_token_id) == row.finished
        info = TraceInfo(
            row.problem,
            row.family,
            row.seed,
            row.source,
            row.prompt,
            row.response,
            row.answer,
            row.correct,
            row.finished,
        )
        forced_traces.append(ForcedTrace(info, tuple(encode_prompt(TOKENIZER, row.prompt)), tuple(ids)))
    with write(tmp_path / "forced", [precision], vocabulary) as writer:
        force_traces({precision: model}, forced_traces, writer, batch_tokens=90)
    forced = TraceFolder(tmp_path / "forced")
    assert forced.traces.equals(sampled.traces)
    assert (forced.column("token") == token).all()
    for name in ("entropy", "prob", "tail"):
        a, b = sampled.column(f"{name}_{precision}"), forced.column(f"{name}_{precision}")
        if precision == "BF16":
            np.testing.assert_allclose(a, b, rtol=3e-4, atol=1e-6)
        else:
            # A last bit may fall on the other side of a rounding to four bits and move everything after it a little.
            assert np.mean(np.abs(a - b) <= 3e-4 * np.abs(b) + 1e-6) > 0.9


def trace_of(tokens: list[int], prompt: tuple[int, ...] = (1, 5), problem: str = "p", **options: Any) -> ForcedTrace:
    info = TraceInfo(problem, "f", 0, "given", "prompt", "response", "", None, False)
    return ForcedTrace(info, prompt, tuple(tokens), **options)


WORDS = [f"<{i}>" for i in range(41)]


def test_forcing_two_models_keeps_order_and_whole_distributions_where_asked(tiny: Tiny, tmp_path: Path) -> None:
    a, b = tiny(), tiny()
    with torch.no_grad():
        b.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    a.train()
    rng = np.random.default_rng(0)
    traces = [
        trace_of(rng.integers(3, 41, size=size).tolist(), tuple(range(1, 2 + size % 4)), f"p{i}", logprobs_at=at)
        for i, (size, at) in enumerate([(5, (0, 4)), (30, ()), (1, ()), (12, (7,)), (30, ())])
    ]
    with write(tmp_path, ["A", "B"], WORDS, logprobs=True, group_tokens=20) as writer:
        assert force_traces({"A": a, "B": b}, iter(traces), writer, batch_tokens=40) == 5
    assert a.training and not b.training
    folder = TraceFolder(tmp_path)
    assert folder.traces["problem"].tolist() == [f"p{i}" for i in range(5)]
    a.eval()
    for label, model in (("A", a), ("B", b)):
        for i, trace in enumerate(traces):
            where = slice(folder.starts[i], folder.starts[i] + folder.lengths[i])
            entropy, _, prob = forced_by_hand(model, list(trace.prompt_ids), list(trace.response_ids))
            np.testing.assert_allclose(folder.entropy(label)[where], entropy.numpy(), rtol=3e-4, atol=1e-6)
            np.testing.assert_allclose(folder.column(f"prob_{label}")[where], prob.numpy(), rtol=3e-4, atol=1e-6)
        import pyarrow.parquet as pq

        kept = pq.read_table(tmp_path / "tokens.parquet", columns=[f"logprobs_{label}"])[0].to_pylist()
        assert [n for n, row in enumerate(kept) if row is not None] == [0, 4, 36 + 7]
        with torch.no_grad():
            logits = model(torch.tensor([[*traces[3].prompt_ids, *traces[3].response_ids]])).logits[
                0, len(traces[3].prompt_ids) + 6
            ]
        np.testing.assert_allclose(kept[43], logits.log_softmax(-1).numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("trace", "says"),
    [
        (trace_of([], problem="nothing"), "'nothing', seed 0, source 'given'.*empty"),
        (trace_of([3, 99], problem="x"), "token id 99.*position 1"),
        (trace_of([3, -1]), "token id -1.*position 1"),
        (trace_of([3], prompt=()), "prompt.*no token"),
        (trace_of([3], prompt=(77,)), "token id 77"),
        (trace_of([3] * 120), "A has 96 positions"),
        (trace_of([3], logprobs_at=(1,)), "no position 1.*1 tokens"),
    ],
)
def test_a_faulty_trace_is_named_and_costs_no_other(tiny: Tiny, tmp_path: Path, trace: ForcedTrace, says: str) -> None:
    model, good = tiny(), [trace_of([4, 5, 6], problem="first"), trace_of([7], problem="last")]
    with pytest.raises(ReqatError, match=says), write(tmp_path / "strict", ["A"], WORDS) as writer:
        force_traces({"A": model}, [good[0], trace, good[1]], writer)
    assert not list((tmp_path / "strict").iterdir())
    with write(tmp_path / "lenient", ["A"], WORDS) as writer:
        force_traces({"A": model}, [good[0], trace, good[1]], writer, skip_bad=True)
    folder = TraceFolder(tmp_path / "lenient")
    assert folder.traces["problem"].tolist() == ["first", "last"]
    assert [entry["problem"] for entry in folder.meta["left_out"]] == [trace.info.problem]
    assert re.search(says, folder.meta["left_out"][0]["reason"])


def poisoned(model: LlamaForCausalLM, token: int) -> LlamaForCausalLM:
    """A model that breaks down once it reads ``token``."""
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = torch.nan
    return model


def test_a_distribution_of_nan_is_named_and_costs_no_other(tiny: Tiny, tmp_path: Path) -> None:
    model = poisoned(tiny(), 9)
    traces = [trace_of([4, 5], problem="good"), trace_of([4, 9, 5], problem="bad"), trace_of([9], problem="last only")]
    with (
        pytest.raises(ReqatError, match="'bad'.*A at position .*not finite"),
        write(tmp_path / "strict", ["A"], WORDS) as writer,
    ):
        force_traces({"A": model}, traces, writer)
    with write(tmp_path / "lenient", ["A"], WORDS) as writer:
        force_traces({"A": model}, traces, writer, skip_bad=True)
    # Another trace of the batch is untouched; a last token is taken, and read by nobody.
    assert TraceFolder(tmp_path / "lenient").traces["problem"].tolist() == ["good", "last only"]


def test_nan_while_sampling_names_the_row(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny(vocab_size=len(TOKENIZER), eos_token_id=TOKENIZER.eos_token_id)
    poisoned(model, TOKENIZER.get_vocab()[" 1"])
    questions = [Question("fine", "2 + 2 =\n"), Question("bad", "2 + 1 =\n")]
    vocabulary = vocabulary_of(TOKENIZER, len(TOKENIZER))
    with pytest.raises(ReqatError, match="bad, seed 0.*position 0"), write(tmp_path, ["A"], vocabulary) as writer:
        sample(model, questions, writer, "A", [0], decoding=Decoding.greedy(), max_new_tokens=4)


def test_what_follows_the_end_of_a_row_may_be_nan() -> None:
    recorder = EntropyRecorder(lambda trace: None, k=2)
    ids = torch.ones(2, 1, dtype=torch.int64)
    recorder.begin_batch(BatchStart(ids, ids.bool(), (7, 3), 9, eos_ids=(EOS,)))
    recorder(ids, torch.randn(2, 5))
    recorder.take_tokens(torch.tensor([EOS, 4]))
    broken = torch.randn(2, 5)
    broken[0] = torch.nan  # that row is over: what follows its end is of no interest
    recorder(ids, broken)
    recorder.take_tokens(torch.tensor([EOS, 1]))
    broken[1] = torch.nan
    with pytest.raises(ReqatError, match="row 3.*position 2"):
        recorder(ids, broken)


def test_labels_of_models_and_writer_must_match(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ReqatError, match="models for B.*for A"), write(tmp_path, ["A"], WORDS) as w:
        force_traces({"B": tiny()}, [trace_of([3])], w)


def test_vocabulary_reads_as_text_and_pads_to_the_models_width() -> None:
    vocabulary = vocabulary_of(TOKENIZER, len(TOKENIZER) + 2)
    assert len(vocabulary) == len(TOKENIZER) + 2
    ids = TOKENIZER("2 + 1 gives 3", add_special_tokens=False)["input_ids"]
    assert "".join(vocabulary[i] for i in ids) == "2 + 1 gives 3"
