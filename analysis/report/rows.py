"""Numbers as rows of the tidy CSV, with what is needed to check them, and the footer that says how they were made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis.report import paper
from analysis.report.cells import Entry, Results
from reqat.config.recipe import OWN

if TYPE_CHECKING:
    from reqat.evaluation.statistics import Difference


def measured_row(
    results: Results,
    entry: Entry,
    *,
    metric: str = "accuracy",
    family: str | None = None,
    reference: Entry | None = None,
) -> dict[str, Any]:
    """A row of the tidy CSV: what was measured, percent and percentage points, with everything needed to check it."""
    e = results.estimate(entry, family)
    made = results.provenance([entry])
    row: dict[str, Any] = {
        "source": "measured",
        "tier": made.tier,
        "model": entry.model,
        "precision": entry.precision,
        "method": entry.method,
        "condition": entry.condition,
        "recipe": entry.recipe,
        "total_tokens": entry.total_tokens,
        "multiple": entry.multiple,
        "metric": metric,
        "family": family or "all",
        "value": 100 * e.value,
        "lo": 100 * e.lo,
        "hi": 100 * e.hi,
        "unfinished": e.n_unfinished / e.n_responses,
    }
    if entry.problems != OWN:
        row["problems"] = entry.problems
    if reference is not None:
        row |= difference_columns(results.paired(entry, reference, family), reference)
    return row | made_by(results, entry, e.n_problems)


def difference_columns(d: Difference, reference: Entry) -> dict[str, Any]:
    """The columns of the tidy CSV that hold a difference to a reference, in percentage points."""
    return {
        "reference": f"{reference.precision} {reference.method} {reference.condition}".strip(),
        "difference": 100 * d.value,
        "difference_lo": 100 * d.lo,
        "difference_hi": 100 * d.hi,
        "p": d.p,
    }


def made_by(results: Results, entry: Entry, n_problems: int) -> dict[str, Any]:
    """The columns that say how a number was made: counts, seeds, decoding, arithmetic, commit, evaluations."""
    made = results.provenance([entry])
    return {
        "n_problems": n_problems,
        "n_sampling_seeds": made.sampling_seeds[-1],
        "training_seeds": " ".join(map(str, entry.training_seeds)),
        "decoding": "; ".join(made.decoding),
        "arithmetic": "; ".join(made.arithmetic),
        "commit": " ".join(made.commits),
        "evaluations": " ".join(c.evaluation for c in entry.cells),
    }


def paper_row(r: paper.Reported) -> dict[str, Any]:
    """A row of the tidy CSV: a number of the paper."""
    condition = ";".join(f"{k}={v}" for k, v in r.condition.items() if k != "total_tokens")
    return {
        "source": "paper",
        "model": r.model,
        "precision": r.precision,
        "method": r.method,
        "condition": condition,
        "total_tokens": r.total_tokens,
        "multiple": paper.multiple(r.total_tokens),
        "metric": r.metric,
        "value": r.value,
    }


def tidy(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Rows as a frame; integers stay integers beside missing values."""
    data = pd.DataFrame(list(rows))
    for column in ("total_tokens", "multiple", "n_problems", "n_sampling_seeds"):
        if column in data:
            data[column] = data[column].astype("Int64")
    return data


def footer(results: Results, entries: Sequence[Entry], *more: str) -> tuple[str, ...]:
    """Who made the numbers, how they were made, and what the intervals do and do not cover."""
    made = results.provenance(entries)
    one, several = made.training_seeds[0] == 1, made.training_seeds[-1] > 1
    seeds = "Intervals: 95%, clustered by problem"
    seeds += ", over problems and training runs" if several else ""
    seeds += "; of one training run they say nothing about another" if one else ""
    seeds += ". Differences use the training seeds that both sides have." if one and several else "."
    return (*made.notes(), seeds, *more)
