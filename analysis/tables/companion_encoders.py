"""Companion on KD for QAT of encoders: accuracy of ternary encoders by loss, and how much attention they recovered.

All students of a seed have one teacher, read the same sequences, and are graded on the same ones, so differences are
paired by group of test sequences and by training seed. Each is compared with the loss on attention scores
(TernaryBERT), the prior that the paper rejects.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from analysis.report.companion_claims import SHARE
from analysis.report.companions import Found, verdict
from analysis.report.document import EMPTY, Column, Table, Text, number, p_value
from reqat.evaluation.means import Mean, mean_over_runs, ratio_observations
from reqat.evaluation.statistics import holm

NAME = "companion-encoders"
COMPANION = "encoders"
HEADLINE = ("map", "output")
"""How the claims begin that README shows."""

TEACHER, PTQ, HIDDEN, SCORE, MAP, OUTPUT = "teacher", "ptq", "hidden", "score", "map", "output"
NAMES = {
    TEACHER: "teacher, not quantized",
    PTQ: "rounded, not trained",
    HIDDEN: "logits and hidden states",
    SCORE: "+ attention scores (TernaryBERT)",
}
_DIGITS = 2


def build(found: Found) -> Table:
    """A section of settings and task: a row a loss; then the verdicts."""
    sections, data, verdicts = [], [], []
    names = headings(found.rows)
    for (label, task), rows in found.rows.groupby(["companion", "task"], sort=False):
        seen, recovered = accuracies(rows), recovery(rows)
        lines = []
        for method, values in seen.items():
            mean = mean_over_runs(values)
            gain = mean_over_runs(values - seen[SCORE]) if method not in (TEACHER, PTQ, SCORE) else None
            attention = recovered.get(method, {})
            lines.append(
                (
                    Text(names[label, task]),
                    Text(named(method)),
                    Text(number(100 * mean.value, _DIGITS), detail=_interval(mean)),
                    Text() if gain is None else Text(_points(gain.value), detail=_interval(gain, sign=True)),
                    *(Text(number(attention[name], 4) if name in attention else EMPTY) for name in RECOVERY),
                )
            )
            about = {"kind": "accuracy", "settings": label, "task": task, "method": method}
            row = about | {"accuracy": mean.value, "lo": mean.lo, "hi": mean.hi} | attention
            if gain is not None:
                row |= {"gain": gain.value, "gain_lo": gain.lo, "gain_hi": gain.hi}
            data.append(row)
        sections.append(tuple(lines))
        for claim in claims(seen):
            where = {"settings": label, "task": task, "where": names[label, task], "unit": SHARE}
            data.append({"kind": "claim"} | where | claim)
            verdicts.append(f"{names[label, task]}: {_line(claim)}")
    return Table(
        NAME,
        "KD for QAT of encoders: ternary weights, 8-bit activations",
        "Accuracy in percent, and what was recovered of the teacher's attention: divergence of the attention maps (KL "
        "in nats, mean over layers) and error of the output of the attention blocks (squared, relative to the "
        "teacher's, mean over layers). map and output: the losses of the paper, beside logits and hidden states, with "
        "their coefficients where these are not 1. Gain: over the loss on attention scores.",
        (*verdicts, *_notes(found)),
        (Column("Task", align="l"), Column("Loss", align="l"), Column("Accuracy"), Column("Gain"),
         Column("KL of maps", "Attention"), Column("Error of outputs", "Attention")),
        tuple(sections),
        pd.DataFrame(data),
    )  # fmt: skip


RECOVERY = ("map_kl_nats", "output_error")


def named(method: str) -> str:
    """What a loss is called."""
    return NAMES.get(method, f"+ {method}")


def accuracies(rows: pd.DataFrame) -> dict[str, Any]:
    """Method -> share of right labels, one observation a training seed and group of sequences, [R, P]; of one task."""
    graded = rows[rows["right"].notna()].sort_values(["seed", "group"])
    out = {}
    for method, of_method in graded.groupby("method", sort=False):
        runs = [run for _, run in of_method.groupby("seed", sort=True)]
        sums, counts = (np.stack([run[name].to_numpy(float) for run in runs]) for name in ("right", "count"))
        out[str(method)] = ratio_observations(sums, counts)
    order = [name for name in dict.fromkeys(rows["method"]) if name in out]
    return {name: out[name] for name in order}


def recovery(rows: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Method -> both measures of recovered attention, means over layers and seeds; of one task."""
    layers = rows[rows["layer"].notna()]
    return {
        str(method): {name: float(of_method[name].mean()) for name in RECOVERY}
        for method, of_method in layers.groupby("method", sort=False)
    }


def claims(seen: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a claim of the paper on one task: each of its losses, alone and together, above that on scores."""
    mixes = [name for name in seen if name not in (TEACHER, PTQ, HIDDEN, SCORE)]
    tested = [(name, mean_over_runs(seen[name] - seen[SCORE])) for name in mixes]
    out = []
    for (name, mean), p in zip(tested, holm([mean.p for _, mean in tested]), strict=True):
        points = _scaled(mean)
        says = verdict(points, 1, p=p, comparisons=len(tested), digits=_DIGITS)
        numbers = {"difference": mean.value, "difference_lo": mean.lo, "difference_hi": mean.hi, "holm": p}
        about = {"claim": f"{name} above attention scores", "training_seeds": mean.n_training_seeds}
        out.append(about | numbers | {"verdict": says})
    return out


def _scaled(mean: Mean) -> Mean:
    """In points of accuracy."""
    shares = (mean.value, mean.lo, mean.hi)
    value, lo, hi = (100 * share for share in shares)
    rest = (mean.n_problems, mean.n_training_seeds, mean.df, mean.level)
    return Mean(value, lo, hi, mean.p, 100 * mean.std_error, *rest)


def _line(row: dict[str, Any]) -> str:
    names = ("difference", "difference_lo", "difference_hi")
    value, low, high = (_points(row[name]) for name in names)
    one = " (one training seed, which concludes nothing of training)" if row["training_seeds"] == 1 else ""
    return f"{row['claim']}: {value} [{low}, {high}] points, p {p_value(row['holm'])}: {row['verdict']}{one}."


def _points(share: float) -> str:
    return number(100 * share, _DIGITS, sign=True)


def _interval(mean: Mean, sign: bool = False) -> str:
    low, high = (number(100 * value, _DIGITS, sign=sign) for value in (mean.lo, mean.hi))
    return f"[{low}, {high}]"


def headings(rows: pd.DataFrame) -> dict[tuple[str, str], str]:
    """(Name of the settings, task) -> the task, with the settings' name where several settings have it."""
    pairs = [(str(label), str(task)) for label, task in rows[["companion", "task"]].drop_duplicates().to_numpy()]
    tasks = [task for _, task in pairs]
    return {
        (label, task): task.replace("_", " ").capitalize() + (f" ({label})" if tasks.count(task) > 1 else "")
        for label, task in pairs
    }


def _notes(found: Found) -> list[str]:
    notes = [
        "Intervals: 95%, over groups of test sequences and training seeds; p by Holm over the losses of a task.",
        "Paper (GLUE, BERT and others; its tables were not seen): the map loss wins on some tasks, the output loss on "
        "others, both together on most, and both above the loss on attention scores.",
    ]
    for label, settings in found.settings.items():
        layers = f", {settings['layers']} lower layers" if settings["layers"] else ""
        notes.append(
            f"{label}: {settings['model']}{layers}, {settings['precision']}; {settings['train_sequences']} sequences, "
            f"teacher {settings['teacher_epochs']} epochs at {settings['teacher_lr']:g}, students {settings['epochs']} "
            f"at {settings['lr']:g}; seeds {', '.join(map(str, settings['seeds']))}."
        )
    if any("brown" in task for settings in found.settings.values() for task in settings["tasks"]):
        notes.append("The Brown corpus is commonly read as free for non-commercial use alone.")
    return [*notes, *found.notes]
