"""Companion TSLD: best evaluation perplexity of quantized decoders by loss, beside the paper's, and the claims on it.

Every loss is trained from the same teacher on the same blocks and tested on the same ones, so differences are paired by
group of test blocks and by training seed. They are in nats per token, of which perplexity is the exponential; where
students answered problems, also in points of accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.report.companion_claims import NATS, POINTS
from analysis.report.companions import Found, verdict
from analysis.report.document import EMPTY, Column, Table, Text, number, p_value
from reqat.evaluation.means import Mean, mean_over_runs, ratio_observations
from reqat.evaluation.statistics import holm

NAME = "companion-tsld"
COMPANION = "tsld"
HEADLINE = ("TSLD below", "TSLD above")
"""How the claims begin that README shows."""

# Best evaluation perplexity of OPT-1.3B on the Penn Treebank, TWN per output channel (README of the paper's code).
PAPER = {
    "float32": {"teacher": 12.34, "logit": 13.58, "logit+gt": 14.20, "tsld": 13.24},
    "bfloat16": {"teacher": 12.34, "logit": 15.09, "logit+gt": 15.02, "tsld": 14.81},
}
NAMES = {
    "teacher": "teacher, not quantized",
    "ptq": "rounded, not trained",
    "gt": "ground truth",
    "logit": "Logit",
    "logit+gt": "Logit + GT",
    "tsld": "TSLD",
    "l2l": "L2L",
}
_DIGITS = {NATS: 3, POINTS: 1}


@dataclass(frozen=True)
class Claim:
    """The mean of `a` less that of `b`, in `unit`, is expected to have this sign."""

    text: str
    a: str
    b: str
    unit: str = NATS
    sign: int = -1


CLAIMS = (
    Claim("TSLD below Logit", "tsld", "logit"),
    Claim("TSLD below Logit + GT", "tsld", "logit+gt"),
    Claim("Logit below Logit + GT", "logit", "logit+gt"),
    Claim("TSLD above Logit", "tsld", "logit", POINTS, 1),
    Claim("TSLD above Logit + GT", "tsld", "logit+gt", POINTS, 1),
    Claim("Logit above Logit + GT", "logit", "logit+gt", POINTS, 1),
)


def build(found: Found) -> Table:
    """A section of settings (float32, bfloat16, other precisions): a row a loss; then the verdicts."""
    sections, data, verdicts = [], [], []
    answered = "answered" in found.rows
    for label, rows in found.rows.groupby("companion", sort=False):
        numbers = str(rows["numbers"].iloc[0])
        seen, solved = best(rows), accuracies(rows)
        digits = 3 if found.settings[label]["text"] == "traces" else 2  # solutions: perplexities a little above 1
        lines = []
        for method, values in seen.items():
            mean = mean_over_runs(values)
            train = rows[rows["method"] == method].drop_duplicates("seed")["train_loss"].mean()
            low, value, high = (float(np.exp(x)) for x in (mean.lo, mean.value, mean.hi))
            paper = None
            if rows["precision"].iloc[0].startswith("TERNARY-row") and found.settings[label]["text"] != "traces":
                paper = PAPER[numbers].get(method)
            correct = mean_over_runs(solved[method]) if method in solved else None
            lines.append(
                (
                    Text(str(label)),
                    Text(NAMES[method]),
                    Text(number(value, digits), detail=f"[{number(low, digits)}, {number(high, digits)}]"),
                    *([_accuracy(correct)] if answered else []),
                    Text(number(train, _DIGITS[NATS])),
                    Text(number(paper, 2) if paper is not None else EMPTY),
                )
            )
            about = {"kind": "perplexity", "settings": label, "method": method, "paper": paper}
            data.append(about | {"perplexity": value, "lo": low, "hi": high, "train_loss": train})
            if correct is not None:
                data[-1] |= {"accuracy": correct.value, "accuracy_lo": correct.lo, "accuracy_hi": correct.hi}
        sections.append(tuple(lines))
        for row in claims(seen) + claims(solved, POINTS):
            data.append({"kind": "claim", "settings": label, "where": label} | row)
            verdicts.append(f"{label}: {_line(row)}")
    accuracy = (Column("Accuracy, %"),) if answered else ()
    return Table(
        NAME,
        "TSLD: quantized decoders by loss",
        "Best evaluation perplexity over a training, as the paper reports it: the step is chosen on the blocks that it "
        "is measured on. Every linear layer but the head is quantized. Training loss: mean of the last epoch, of the "
        "loss itself, so it compares seeds and not losses."
        + (" Accuracy: of greedy answers to held-out problems at the end of a training." if answered else ""),
        (*verdicts, *_notes(found)),
        (Column("Settings", align="l"), Column("Loss", align="l"), Column("Perplexity"), *accuracy,
         Column("Training loss"), Column("Paper (OPT-1.3B, PTB)")),
        tuple(sections),
        pd.DataFrame(data),
    )  # fmt: skip


def _accuracy(mean: Mean | None) -> Text:
    if mean is None:
        return Text(EMPTY)
    low, high = max(0.0, mean.lo), min(100.0, mean.hi)
    return Text(number(mean.value, 1), detail=f"[{number(low, 1)}, {number(high, 1)}]")


def best(rows: pd.DataFrame) -> dict[str, Any]:
    """Method -> nats per token at its best step, one observation a training seed and group of blocks, [R, P]."""
    out = {}
    for method, of_method in rows.groupby("method", sort=False):
        runs = []
        for _, run in of_method.groupby("seed", sort=True):
            step = run.groupby("step")["nats"].sum().idxmin()
            runs.append(run[run["step"] == step].sort_values("group"))
        sums, counts = (np.stack([run[name].to_numpy(float) for run in runs]) for name in ("nats", "tokens"))
        out[str(method)] = ratio_observations(sums, counts)
    return out


def accuracies(rows: pd.DataFrame) -> dict[str, Any]:
    """Method -> percent of right answers at the end, one observation a training seed and group of problems, [R, P]; of
    no method where nothing was answered."""
    if "answered" not in rows:
        return {}
    out = {}
    for method, of_method in rows[rows["answered"].notna()].groupby("method", sort=False):
        runs = [run.sort_values("group") for _, run in of_method.groupby("seed", sort=True)]
        sums, counts = (np.stack([run[name].to_numpy(float) for run in runs]) for name in ("right", "answered"))
        out[str(method)] = 100 * ratio_observations(sums, counts)
    return out


def claims(seen: dict[str, Any], unit: str = NATS) -> list[dict[str, Any]]:
    """A row a claim in a unit whose losses are there: its difference, and the verdict, by Holm over these claims."""
    tested = list(_tested(seen, unit))
    out = []
    for (claim, mean), p in zip(tested, holm([mean.p for _, mean in tested]), strict=True):
        says = verdict(mean, claim.sign, p=p, comparisons=len(tested), digits=_DIGITS[unit])
        numbers = {"difference": mean.value, "difference_lo": mean.lo, "difference_hi": mean.hi, "holm": p}
        about = {"unit": unit, "claim": claim.text, "training_seeds": mean.n_training_seeds}
        out.append(about | numbers | {"verdict": says})
    return out


def _tested(seen: dict[str, Any], unit: str) -> Iterator[tuple[Claim, Mean]]:
    for claim in CLAIMS:
        if claim.unit == unit and claim.a in seen and claim.b in seen:
            yield claim, mean_over_runs(seen[claim.a] - seen[claim.b])


def _line(row: dict[str, Any]) -> str:
    names = ("difference", "difference_lo", "difference_hi")
    value, low, high = (number(row[name], _DIGITS[row["unit"]], sign=True) for name in names)
    one = " (one training seed, which concludes nothing of training)" if row["training_seeds"] == 1 else ""
    return f"{row['claim']}: {value} [{low}, {high}] {row['unit']}, p {p_value(row['holm'])}: {row['verdict']}{one}."


def _notes(found: Found) -> list[str]:
    notes = [
        "Intervals: 95%, over groups of test blocks (or problems) and training seeds; p by Holm over the claims of a "
        "setting in one unit.",
        "The paper's order (of perplexities on a text), TSLD below Logit below Logit + GT, holds in float32; in "
        "bfloat16 Logit + GT is no longer above Logit (14.81, 15.09, 15.02).",
    ]
    for label, settings in found.settings.items():
        shape, seeds, traces = settings["architecture"], len(settings["seeds"]), settings["text"] == "traces"
        teacher = (
            f"the testbed's pinned base; students on {settings['student_blocks']} verified solutions"
            if traces
            else f"decoder of {shape['layers']} layers, {shape['hidden_size']} wide, {settings['vocabulary']} tokens, "
            f"trained on {settings['teacher_blocks']} blocks of {settings['block_tokens']} tokens "
            f"({settings['text']}); students on {settings['student_blocks']} of them"
        )
        asked = f" and {settings['answered']} problems" if settings.get("answered") else ""
        notes.append(
            f"{label}: {settings['precision']}{', learned scales' if settings['learned_scale'] else ''}; {teacher}, "
            f"{settings['epochs']} times; {seeds} training seed{'s' if seeds > 1 else ''}; {settings['test_blocks']} "
            f"{settings['held_out']} {'solutions' if traces else 'blocks'}{asked}; learning rate "
            f"{settings['lr']:g}{''.join(f', {NAMES[loss]} {rate:g}' for loss, rate in settings['rates'].items())}."
        )
    if any(settings["text"] == "brown" for settings in found.settings.values()):
        notes.append("The Brown corpus is commonly read as free for non-commercial use alone.")
    return [*notes, *found.notes]
