"""Token entropies of two models over the same tokens: sample, read, analyse."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reqat.config.errors import ReqatError
from reqat.pipeline.task import same_tokens
from reqat.records import provenance
from reqat.tasks.problem_files import Given, grade

if TYPE_CHECKING:
    import torch

    from analysis.entropy.pair_report import Report
    from reqat.evaluation.entropies import ForcedTrace
    from reqat.evaluation.trace_files import TraceInfo
    from reqat.generation import Decoding


@dataclass(frozen=True)
class Side:
    """One of the two models: its folder (or ``package:NAME``), its precision, options of `prepare` (None: default)."""

    folder: str
    precision: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PairSettings:
    """How two models are held against each other; see the options of `reqat entropy`.

    ``sample``: sample responses (None: where a problem has none). ``logprobs``: problem id -> positions whose whole
    distributions are kept. ``autocast``: dtype that both sample and read under, e.g. ``torch.bfloat16``.
    """

    seeds: Sequence[int]
    decoding: str
    max_new_tokens: int
    batch_rows: int | None = None
    sample: bool | None = None
    end_marker: str | None = None
    logprobs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    top: int = 5
    bins: int = 20
    more_than: int = 100
    autocast: torch.dtype | None = None


@dataclass(frozen=True)
class Collected:
    """Metrics for the record, and the report that can be drawn."""

    metrics: dict[str, Any]
    report: Report


def collect(
    reference: Side,
    candidate: Side,
    problems: Sequence[Given],
    settings: PairSettings,
    out: Path,
    *,
    root: Path,
    kept: Path | None = None,
    progress: bool,
) -> Collected:
    """Sample responses of both models, let both read all of them, and write traces and tables into ``out``.

    ``kept``: a folder where sampled batches outlive a kill, of these models and settings alone.

    Raises ReqatError where the two are the same model or have different tokenizers.
    """
    from analysis.entropy.pair_report import report
    from reqat.evaluation.entropies import force_traces, vocabulary_of
    from reqat.evaluation.loading import load_at
    from reqat.evaluation.trace_files import TraceWriter
    from reqat.evaluation.trace_folder import TraceFolder
    from reqat.generation import Decoding
    from reqat.models import end_ids, load_tokenizer

    policy = Decoding.parse(settings.decoding)
    used = policy.effective_seeds(settings.seeds)
    sides = (reference, candidate)
    labels = _labels(reference, candidate)
    tokenizer = load_tokenizer(reference.folder)
    if candidate.folder != reference.folder:
        same_tokens(tokenizer, load_tokenizer(candidate.folder), (reference.folder, candidate.folder))
    models: dict[str, Any] = {}
    for label, side in zip(labels, sides, strict=True):
        given = {name: value for name, value in side.options.items() if value is not None}
        models[label] = load_at(side.folder, side.precision, **given)
    faults: list[tuple[TraceInfo, str]] = []
    ends = tuple(dict.fromkeys(i for model in models.values() for i in end_ids(model, tokenizer)))
    answered = [row for row in problems if row.has_response]
    traces = _given_traces(tokenizer, answered, ends, settings, faults)
    wanted = [row for row in problems if settings.sample or (settings.sample is None and not row.has_response)]
    asked = list({row.id: row for row in wanted}.values())  # one problem may come with several responses
    for label, model in models.items():
        caption = f"sampling {label}" if progress else False
        own = kept / label.replace(":", "-") if kept is not None else None
        traces += _sampled_traces(model, tokenizer, asked, label, used, policy, settings, caption, own)
    metadata = {
        "decoding": str(policy),
        "seeds": list(used),
        "models": dict(zip(labels, provenance.scrub([side.folder for side in sides], root), strict=True)),
        "precisions": dict(zip(labels, [side.precision for side in sides], strict=True)),
        "tokenizer": provenance.scrub(reference.folder, root),
    }
    width = max(int(model.config.vocab_size) for model in models.values())
    with TraceWriter(
        out,
        labels,
        vocabulary_of(tokenizer, width),
        k=settings.top,
        logprobs=bool(settings.logprobs),
        metadata=metadata,
    ) as writer:
        for info, reason in faults:
            writer.leave_out(info, reason)
        force_traces(models, traces, writer, skip_bad=True, autocast=settings.autocast)
        left_out = list(writer.left_out)
    for entry in left_out:
        print(f"reqat: warning: left out: {entry['reason']}", file=sys.stderr)
    folder = TraceFolder(out)
    found = report(folder, *labels, bins=settings.bins, more_than=settings.more_than)
    found.write(out)
    metrics = {
        "labels": labels,
        "traces": len(folder.traces),
        "tokens": folder.n_tokens,
        "unfinished": int((~folder.traces["finished"]).sum()),
        "left_out": len(left_out),
        "headlines": found.table.data.to_dict("records"),
    }
    return Collected(metrics, found)


def _labels(reference: Side, candidate: Side) -> list[str]:
    """The precisions, or with the folder's name in front where both are in one."""
    if reference.precision != candidate.precision:
        return [reference.precision, candidate.precision]
    names = [f"{Path(side.folder).name}:{side.precision}" for side in (reference, candidate)]
    if names[0] != names[1]:
        return names
    if reference.folder == candidate.folder:
        raise ReqatError(f"reference and candidate are the same model in {reference.precision}; change one of them.")
    return [f"reference:{reference.precision}", f"candidate:{candidate.precision}"]


def _given_traces(
    tokenizer: Any,
    rows: Sequence[Given],
    ends: tuple[int, ...],
    settings: PairSettings,
    faults: list[tuple[TraceInfo, str]],
) -> list[ForcedTrace]:
    """Responses that came with the problems. A response's text is followed by the first of ``ends`` (the ids that end
    a response), if it has one.

    Those with text that the tokenizer does not know go to ``faults``.
    """
    from reqat.data import encode_prompt, unknown_id
    from reqat.evaluation.entropies import ForcedTrace
    from reqat.evaluation.trace_files import TraceInfo

    out = []
    unknown = unknown_id(tokenizer)
    for row in rows:
        prompt = encode_prompt(tokenizer, row.prompt)
        finished = row.finished
        if row.response_ids is not None:
            ids = list(row.response_ids)
            finished = finished and bool(ids) and ids[-1] in ends
            known = [i for i in ids if 0 <= i < len(tokenizer)]
            text = row.response if row.response is not None else tokenizer.decode(known, skip_special_tokens=True)
        else:
            text = str(row.response)
            ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
            if unknown is not None and unknown in prompt + ids:
                # The id that stands for "no such token" tells nothing; forced on it, a model is judged by noise.
                where = "prompt" if unknown in prompt else "response"
                info = TraceInfo(row.id, row.family, row.seed, "given", row.prompt, text, row.answer, None, finished)
                faults.append(
                    (
                        info,
                        f"{info.name}: its {where} has text that the tokenizer knows no token for (an unknown token).",
                    )
                )
                continue
            if finished and ids and ends and ids[-1] not in ends:
                ids.append(ends[0])
        finished = finished and (settings.end_marker is None or settings.end_marker in text)
        correct = grade(row, text) if ids else None
        info = TraceInfo(row.id, row.family, row.seed, "given", row.prompt, text, row.answer, correct, finished)
        at = tuple(p for p in settings.logprobs.get(row.id, ()) if p < len(ids))
        out.append(ForcedTrace(info, tuple(prompt), tuple(ids), at))
    return out


def _sampled_traces(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Given],
    label: str,
    seeds: Sequence[int],
    policy: Decoding,
    settings: PairSettings,
    progress: bool | str,
    kept: Path | None,
) -> list[ForcedTrace]:
    """A response of one model to each problem and seed."""
    if not rows:
        return []
    from reqat.data import encode_prompt
    from reqat.evaluation.entropies import ForcedTrace
    from reqat.evaluation.trace_files import TraceInfo
    from reqat.generation import generate

    prompts = [encode_prompt(tokenizer, row.prompt) for row in rows]
    pairs = [(row, prompt, seed) for row, prompt in zip(rows, prompts, strict=True) for seed in seeds]
    found = generate(
        model,
        tokenizer,
        [prompt for _, prompt, _ in pairs],
        seeds=[seed for _, _, seed in pairs],
        row_keys=[row.id for row, _, _ in pairs],
        decoding=policy,
        max_new_tokens=settings.max_new_tokens,
        batch_rows=settings.batch_rows,
        autocast=settings.autocast,
        kept=kept,
        progress=progress,
    )
    out = []
    for (row, prompt, seed), generation in zip(pairs, found, strict=True):
        text = tokenizer.decode(list(generation.token_ids), skip_special_tokens=True)
        ids = generation.all_ids
        finished = generation.finished and (settings.end_marker is None or settings.end_marker in text)
        info = TraceInfo(row.id, row.family, seed, label, row.prompt, text, row.answer, grade(row, text), finished)
        at = tuple(p for p in settings.logprobs.get(row.id, ()) if p < len(ids))
        out.append(ForcedTrace(info, tuple(prompt), ids, at))
    return out
