"""`reqat evaluate --model`: a model of one's own, graded on task families or on problems of a file."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reqat.config.errors import ReqatError
from reqat.config.policy import Decoding
from reqat.pipeline.jobs import OUTCOMES, graded
from reqat.tasks.problem_files import Given


@dataclass(frozen=True)
class Asked:
    """How a model is graded. ``precision`` None: the one that its folder was saved at, or else BF16."""

    precision: str | None
    seeds: Sequence[int]
    decoding: str
    max_new_tokens: int
    batch_rows: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of `prepare`."""


@dataclass(frozen=True)
class Graded:
    """What was computed."""

    metrics: dict[str, Any]
    """The record's."""
    precision: str
    """With each option that is not the default."""
    skip: tuple[str, ...]
    """Patterns of the layers that were left alone."""
    seeds: tuple[int, ...]
    """Those that made different responses."""


def grade_model(model: str, problems: Sequence[Given], asked: Asked, out: Path, *, progress: bool) -> Graded:
    """Sample a response to each problem and seed, grade it, and write the outcomes into ``out``.

    Raises `ReqatError` before the model is loaded for a problem without an answer.
    """
    from reqat.evaluation import evaluate
    from reqat.evaluation.loading import load_at
    from reqat.models import load_tokenizer
    from reqat.models.prepare import report_of

    without = [row.id for row in problems if row.problem is None and not row.answer]
    if without:
        raise ReqatError(f"problem {without[0]} has no answer to grade by ({len(without)} such); give each one.")
    policy = Decoding.parse(asked.decoding)
    seeds = policy.effective_seeds(asked.seeds)
    tokenizer = load_tokenizer(model)
    given = {name: value for name, value in asked.options.items() if value is not None}
    loaded = load_at(model, asked.precision, **given)
    outcomes = evaluate(
        loaded,
        tokenizer,
        [row.problem or row for row in problems],
        seeds=seeds,
        decoding=policy,
        max_new_tokens=asked.max_new_tokens,
        batch_rows=asked.batch_rows,
        progress="evaluate" if progress else False,
    )
    outcomes.to_parquet(out / OUTCOMES)
    metrics = graded(outcomes, {row.id: row.problem for row in problems if row.problem is not None})
    if metrics["unfinished"] * 2 > metrics["responses"]:
        print(
            f"reqat: note: {metrics['unfinished']} of {metrics['responses']} responses were cut at "
            f"{asked.max_new_tokens} tokens; raise --max-new-tokens.",
            file=sys.stderr,
        )
    report = report_of(loaded)
    assert report is not None  # load_at prepares
    precision = str(report.precision)
    return Graded({"precision": precision, **metrics}, precision, report.skip, seeds)


def said(metrics: Mapping[str, Any]) -> str:
    """Accuracies as they are printed, in percent with 95% intervals."""
    low, high = 100 * metrics["accuracy_lo"], 100 * metrics["accuracy_hi"]
    lines = [
        f"{metrics['precision']}: {100 * metrics['accuracy']:.1f}% [{low:.1f}, {high:.1f}] correct of "
        f"{metrics['problems']} problems, {metrics['responses']} responses of {metrics['mean_tokens']:.0f} tokens"
    ]
    if len(metrics["accuracy_by_family"]) > 1:
        lines += [f"  {name}: {100 * value:.1f}%" for name, value in metrics["accuracy_by_family"].items()]
    return "\n".join(lines)
