"""The numbers that the paper reports, typed.

`paper_reported.csv` holds every number of the tables and of Figure 6 of "ReQAT: Achieving Full-Precision Reasoning
Accuracy with 4-bit Floating-Point Quantization-Aware Training" (ICML 2026, arXiv 2606.15682), transcribed by hand, one
number a row: artifact, model, format (the precision), method, condition, metric, value. Accuracies are percentages,
mean over 8 sampling seeds; the paper gives no intervals. `condition` is `key=value;key=value` or a bare flag
(`greedy`).

Figures give more: `paper_digitized.csv` has what was read off them, to about +-0.1, in the same columns and `how`.
`read_off` selects from it, and whoever shows such a number says that it was read off.

These numbers are only ever drawn or printed *beside* what was measured here, never mixed with it.
"""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

CITATION = "ReQAT, ICML 2026, arXiv 2606.15682"
SOURCE = Path(__file__).with_name("paper_reported.csv")
DIGITIZED = Path(__file__).with_name("paper_digitized.csv")
READ_OFF = "paper (read off)"
"""Label of a number that was read off a figure, beside ours."""
QFIT_GRID = "Paper: its text and code search 20 x 20 points, its maps show 20 x 10, with shifts up to 0.45."
"""Under every map of Q-FIT's search."""
QAT_TOKENS = 70_000_000  # the QAT budget of every total (Table 1)
SAMPLING_SEEDS = 8  # behind every sampled accuracy
RESPONSES = {
    **{
        metric: n * SAMPLING_SEEDS
        for metric, n in {"AIME-90": 90, "AIME-120": 120, "MATH-500": 500, "GSM8K": 1319}.items()
    },
    **{f"AIME-{year}": 30 * SAMPLING_SEEDS for year in (2022, 2023, 2024, 2025)},
    "MMLU": 14_042,  # scored by likelihood, so once
}
"""Metric -> graded responses behind one of the paper's accuracies. Of LiveCodeBench it does not say which problems."""
COLUMNS = ("artifact", "model", "format", "method", "condition", "metric", "value")


INCONSISTENT = {
    "table1": (
        "The paper says that accuracy rises with each part (Section 5.2); its own NVFP4-W4A4KV4 column of 280M has "
        "ReQAT-TQ 65.94 above ReQAT-TQS 64.37. FT+PTQ at 210M is 57.71 here and about 58.2 in its Figure 1(b)."
    ),
    "table2": "ReQAT-TQS on GSM8K is 89.85 in the paper's Table 2 and 89.95 in its Table 16.",
    "table4": (
        "NVIDIA's Model-Optimizer advises different samples for fine-tuning and QAT, against overfitting: the reverse "
        "of the paper's rows."
    ),
    "table5": (
        "Two of the paper's rows with a part of Q-FIT (62.71 and 62.40) lie below its row without any (63.13): half of "
        "it can hurt."
    ),
    "table10": (
        "The paper chooses each method's best budget on the test problems; its FT+PTQ 55.73 is that of 350M, though "
        "210M has 55.83, and its ReQAT 65.94 is ReQAT-TQ's (ReQAT-TQS: 65.63)."
    ),
    "table14": "The paper's FT row (64.79) is that of 350M; its best, of 280M, is 65.46.",
    "table16": (
        "ReQAT on GSM8K at weight 0.1 is 89.95 in the paper's Table 16 and 89.85 in its Table 2; the average 74.11 "
        "needs 89.95."
    ),
}
"""Artifact -> where the paper's own numbers disagree with each other, with its text or with others."""


def notes(artifact: str) -> tuple[str, ...]:
    """Footnotes of a table with the paper's numbers: where they are from, and where they disagree."""
    found = INCONSISTENT.get(artifact)
    return (f"Numbers of the paper: {CITATION}.", *([found] if found else []))


def parse_condition(text: str) -> dict[str, str]:
    """`"e1m2=1;total_tokens=280M"` -> `{"e1m2": "1", "total_tokens": "280M"}`; a bare word is a flag with value "1"."""
    out: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in text.split(";"))):
        key, has_value, value = part.partition("=")
        if key in out:
            raise ValueError(f"condition {text!r} gives {key!r} twice")
        out[key] = value if has_value else "1"
    return out


def parse_tokens(text: str) -> int:
    """`"140M"` -> 140_000_000; also K and B, and plain integers. Raises ValueError on anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text.strip())
    if match is None:
        raise ValueError(f"cannot read {text!r} as a number of tokens; write 70M, 1.2M, 500K or 70000000")
    return round(float(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}[match[2]])


@dataclass(frozen=True)
class Reported:
    """One number of the paper."""

    artifact: str  # "table1", ..., "figure6"
    model: str  # "R1-Qwen-14B" | "R1-Llama-8B"
    precision: str  # the file's `format` column: "BF16", "NVFP4-W4A4KV4", ...
    method: str  # "Baseline", "FT", "PTQ", "FT+PTQ", "QAT", "ReQAT-T", ...
    condition: Mapping[str, str]
    metric: str  # "AIME-120", "final_loss", ...
    value: float  # percent for accuracies, nats for losses
    how: str = "table"  # or "read off" a figure, with what is known of its accuracy

    @property
    def total_tokens(self) -> int | None:
        """Total training budget in tokens, None where the paper gives none."""
        text = self.condition.get("total_tokens")
        return None if text is None else parse_tokens(text)


@functools.cache
def reported() -> tuple[Reported, ...]:
    """Every number of the tables, in the order of the file. Raises ValueError on a row that does not parse or stands
    twice."""
    return _read(SOURCE, COLUMNS)


@functools.cache
def digitized() -> tuple[Reported, ...]:
    """Every number that was read off a figure, likewise."""
    return _read(DIGITIZED, (*COLUMNS, "how"))


def _read(source: Path, columns: tuple[str, ...]) -> tuple[Reported, ...]:
    rows: list[Reported] = []
    with source.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != columns:
            raise ValueError(f"{source}: columns {reader.fieldnames}, expected {columns}")
        for r in reader:
            condition = parse_condition(r["condition"])
            named = (r["artifact"], r["model"], r["format"], r["method"], condition, r["metric"], float(r["value"]))
            rows.append(Reported(*named, how=r.get("how", "table")))
    seen = {(r.artifact, r.model, r.precision, r.method, tuple(sorted(r.condition.items())), r.metric) for r in rows}
    if len(seen) != len(rows):
        raise ValueError(f"{source}: {len(rows) - len(seen)} number(s) stand twice")
    return tuple(rows)


def read_off(artifact: str, *, metric: str | None = None) -> tuple[Reported, ...]:
    """The numbers that were read off a figure. Raises ValueError if there are none."""
    found = tuple(r for r in digitized() if r.artifact == artifact and metric in (None, r.metric))
    if not found:
        raise ValueError(f"{DIGITIZED.name} has no numbers of {artifact}{f', {metric}' if metric else ''}")
    return found


def select(
    artifact: str,
    *,
    precision: str | None = None,
    method: str | None = None,
    metric: str | None = None,
    model: str | None = None,
    **condition: str,
) -> tuple[Reported, ...]:
    """The numbers that match; `condition` names values that must hold (others are free)."""
    return tuple(
        r
        for r in reported()
        if r.artifact == artifact
        and precision in (None, r.precision)
        and method in (None, r.method)
        and metric in (None, r.metric)
        and model in (None, r.model)
        and all(r.condition.get(k) == v for k, v in condition.items())
    )


def value(
    artifact: str, *, precision: str, method: str, metric: str = "AIME-120", model: str | None = None, **condition: str
) -> float | None:
    """The one number that matches, None if the paper has none. Raises ValueError if several match."""
    found = select(artifact, precision=precision, method=method, metric=metric, model=model, **condition)
    if len(found) > 1:
        raise ValueError(
            f"{len(found)} numbers of {artifact} match {precision} {method} {metric} {condition}; "
            f"name a condition: {[dict(r.condition) for r in found]}"
        )
    return found[0].value if found else None


def budgets(artifact: str) -> tuple[int, ...]:
    """Total budgets in tokens that an artifact reports, ascending (Table 1: 140M, 210M, 280M, 350M)."""
    return tuple(sorted({r.total_tokens for r in reported() if r.artifact == artifact and r.total_tokens}))


def multiple(total_tokens: int | None) -> int | None:
    """The paper's total in its QAT budgets of 70M tokens: 140M -> 2; None (no budget) stays None."""
    return None if total_tokens is None else total_tokens // QAT_TOKENS


def by_budget(
    artifact: str, *, precision: str, method: str, metric: str = "AIME-120", **condition: str
) -> dict[int | None, float]:
    """`{total_tokens: value}` of one row of an artifact; the key is None where the paper names no budget."""
    found = select(artifact, precision=precision, method=method, metric=metric, **condition)
    out = {r.total_tokens: r.value for r in found}
    if len(out) != len(found):
        raise ValueError(f"{artifact} {precision} {method}: more than one number a budget; name a condition")
    return out


def models(artifact: str) -> set[str]:
    """The paper's models that an artifact reports."""
    return {r.model for r in reported() if r.artifact == artifact}


def sampling_variance(percent: float, metric: str) -> float | None:
    """Variance (points squared) of one of the paper's accuracies from the number of its graded responses, each taken as
    a draw of its own; None where that number is not known.

    The paper prints no intervals. Responses to one problem are alike, which makes the variance over problems larger
    than this; pairing by problem makes that of a difference smaller, and training seeds add their own. None of the
    three can be computed from what it prints.
    """
    n = RESPONSES.get(metric)
    return None if n is None else percent * (100 - percent) / n


def frame() -> pd.DataFrame:
    """The file as a tidy frame, with `total_tokens` beside `condition`."""
    import pandas as pd

    data = pd.read_csv(SOURCE, keep_default_na=False).rename(columns={"format": "precision"})
    data["total_tokens"] = pd.array([r.total_tokens for r in reported()], dtype="Int64")
    return data
