"""Companion TSLD: best evaluation perplexity of quantized decoders by loss, beside the paper's, and the claims on it.

Every loss is trained from the same teacher on the same blocks and tested on the same ones, so differences are paired by
group of test blocks and by training seed. They are in nats per token, of which perplexity is the exponential.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.report.companion_claims import NATS
from analysis.report.companions import Found, verdict
from analysis.report.document import EMPTY, Column, Table, Text, number, p_value
from reqat.evaluation.means import Mean, mean_over_runs, ratio_observations
from reqat.evaluation.statistics import holm

NAME = "companion-tsld"
COMPANION = "tsld"
HEADLINE = ("TSLD below",)
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
_DIGITS = 3


@dataclass(frozen=True)
class Claim:
    """The mean of `a` less that of `b`, in nats per token, is expected to have this sign."""

    text: str
    a: str
    b: str
    sign: int = -1


CLAIMS = (
    Claim("TSLD below Logit", "tsld", "logit"),
    Claim("TSLD below Logit + GT", "tsld", "logit+gt"),
    Claim("Logit below Logit + GT", "logit", "logit+gt"),
)


def build(found: Found) -> Table:
    """A section of settings (float32, bfloat16, other precisions): a row a loss; then the verdicts."""
    sections, data, verdicts = [], [], []
    for label, rows in found.rows.groupby("companion", sort=False):
        numbers = str(rows["numbers"].iloc[0])
        seen = best(rows)
        lines = []
        for method, values in seen.items():
            mean = mean_over_runs(values)
            train = rows[rows["method"] == method].drop_duplicates("seed")["train_loss"].mean()
            low, value, high = (float(np.exp(x)) for x in (mean.lo, mean.value, mean.hi))
            paper = PAPER[numbers].get(method) if rows["precision"].iloc[0].startswith("TERNARY-row") else None
            interval = f"[{number(low, 2)}, {number(high, 2)}]"
            lines.append(
                (
                    Text(str(label)),
                    Text(NAMES[method]),
                    Text(number(value, 2), detail=interval),
                    Text(number(train, _DIGITS)),
                    Text(number(paper, 2) if paper is not None else EMPTY),
                )
            )
            about = {"kind": "perplexity", "settings": label, "method": method, "paper": paper}
            data.append(about | {"perplexity": value, "lo": low, "hi": high, "train_loss": train})
        sections.append(tuple(lines))
        for row in claims(seen):
            data.append({"kind": "claim", "settings": label, "where": label, "unit": NATS} | row)
            verdicts.append(f"{label}: {_line(row)}")
    return Table(
        NAME,
        "TSLD: quantized decoders by loss",
        "Best evaluation perplexity over a training, as the paper reports it: the step is chosen on the blocks that it "
        "is measured on. Every linear layer but the head is quantized. Training loss: mean of the last epoch, of the "
        "loss itself, so it compares seeds and not losses.",
        (*verdicts, *_notes(found)),
        (Column("Settings", align="l"), Column("Loss", align="l"), Column("Perplexity"), Column("Training loss"),
         Column("Paper (OPT-1.3B, PTB)")),
        tuple(sections),
        pd.DataFrame(data),
    )  # fmt: skip


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


def claims(seen: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a claim whose losses are there: its difference in nats per token, and the verdict."""
    tested = list(_tested(seen))
    out = []
    for (claim, mean), p in zip(tested, holm([mean.p for _, mean in tested]), strict=True):
        says = verdict(mean, claim.sign, p=p, comparisons=len(tested), digits=_DIGITS)
        numbers = {"difference": mean.value, "difference_lo": mean.lo, "difference_hi": mean.hi, "holm": p}
        out.append({"claim": claim.text, "training_seeds": mean.n_training_seeds} | numbers | {"verdict": says})
    return out


def _tested(seen: dict[str, Any]) -> Iterator[tuple[Claim, Mean]]:
    for claim in CLAIMS:
        if claim.a in seen and claim.b in seen:
            yield claim, mean_over_runs(seen[claim.a] - seen[claim.b])


def _line(row: dict[str, Any]) -> str:
    names = ("difference", "difference_lo", "difference_hi")
    value, low, high = (number(row[name], _DIGITS, sign=True) for name in names)
    one = " (one training seed, which concludes nothing of training)" if row["training_seeds"] == 1 else ""
    return f"{row['claim']}: {value} [{low}, {high}] nats a token, p {p_value(row['holm'])}: {row['verdict']}{one}."


def _notes(found: Found) -> list[str]:
    notes = [
        "Intervals: 95%, over groups of test blocks and training seeds; p by Holm over the claims of a setting.",
        "The paper's order, TSLD below Logit below Logit + GT, holds in float32; in bfloat16 Logit + GT is no longer "
        "above Logit (14.81, 15.09, 15.02).",
    ]
    for label, settings in found.settings.items():
        shape, seeds = settings["architecture"], len(settings["seeds"])
        notes.append(
            f"{label}: {settings['precision']}{', learned scales' if settings['learned_scale'] else ''}; decoder of "
            f"{shape['layers']} layers, {shape['hidden_size']} wide, {settings['vocabulary']} tokens, trained on "
            f"{settings['teacher_blocks']} blocks of {settings['block_tokens']} tokens ({settings['text']}); students "
            f"on {settings['student_blocks']} of them, {settings['epochs']} times; {seeds} training seed"
            f"{'s' if seeds > 1 else ''}; {settings['test_blocks']} {settings['held_out']} blocks; learning rate "
            f"{settings['lr']:g}{''.join(f', {NAMES[loss]} {rate:g}' for loss, rate in settings['rates'].items())}."
        )
    if any(settings["text"] == "brown" for settings in found.settings.values()):
        notes.append("The Brown corpus is commonly read as free for non-commercial use alone.")
    return [*notes, *found.notes]
