"""Held-out likelihood of verified solutions, a row a method: all tokens, and those where the reference is sure or not.

A finer measure than accuracy (`reqat.evaluation.held_out`): every method reads the same solutions, so a difference of
two of them is paired trace by trace and training seed by training seed.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from analysis.report.document import EMPTY, Column, Table, Text, number, p_value
from analysis.report.held_out import QUANTITIES, compared, observations
from analysis.report.studies import ByKind, Study, several
from analysis.report.study_words import made_notes
from reqat.config.errors import ReqatError
from reqat.evaluation.means import mean_over_runs
from reqat.evaluation.statistics import holm

NAME = "likelihood"
STUDIES = ("likelihood",)

DIGITS = 4
COMPARED = ("low", "all")


def build(studies: ByKind) -> Table:
    """Table `likelihood`: a section a study, a row a method. Raises `ReqatError` without a study of this kind."""
    chosen = several(studies, "likelihood")
    sections, rows = [], []
    for study in chosen:
        found = method_rows(study)
        rows += found
        sections.append(tuple(_line(row, study.settings["against"]) for row in found))
    return Table(
        NAME,
        "Held-out likelihood of verified solutions",
        "Mean negative log-likelihood (nats per response token; lower is better) of the same verified solutions under "
        "every method, of all tokens, of those where the reference's entropy is low and of the others, and the mean "
        "forward divergence KL(reference || method) per token. Differences are to the method named in the footer, "
        "paired trace by trace and training seed by training seed; negative is better.",
        tuple(note for study in chosen for note in _notes(study, rows)),
        (
            Column("Method", align="l"),
            Column("Precision", align="l"),
            Column("Seeds"),
            Column("low entropy", "Nats per token"),
            Column("high entropy", "Nats per token"),
            Column("all", "Nats per token"),
            Column("KL (nats)"),
            Column("low entropy", "Difference"),
            Column("all", "Difference"),
            Column("Holm"),
        ),
        tuple(sections),
        pd.DataFrame(rows),
    )


def method_rows(study: Study) -> list[dict[str, Any]]:
    """A row a method: every quantity of `QUANTITIES` with `_lo` and `_hi` (nats per token), and the differences of
    `COMPARED` to the method that the study names (`difference_<quantity>` with `_lo`, `_hi` and, over several training
    seeds, `_p`).

    Raises `ReqatError` if a method has no run, or its runs read different traces.
    """
    frame = study.parquet("likelihood")
    against = study.settings["against"]
    by_label = {str(label): part for label, part in frame.groupby("label", sort=False)}
    rows: list[dict[str, Any]] = []
    for label in study.settings["models"]:
        if label not in by_label:
            raise ReqatError(f"{study.path}: no run of {label!r} in likelihood.parquet; run the study again.")
        part = by_label[label]
        seeds = sorted(int(seed) for seed in part["seed"].dropna().unique())
        row: dict[str, Any] = {
            "tier": study.settings["tier"],
            "study": study.id,
            "method": label,
            "precision": study.settings["models"][label]["precision"],
            "training_seeds": " ".join(map(str, seeds)),
            "runs": part["seed"].nunique(dropna=False),
        }
        for quantity, (_, tokens) in QUANTITIES.items():
            if not part[list(tokens)].to_numpy().any():  # every token is on the other side of the threshold
                continue
            mean = mean_over_runs(observations(part, quantity))
            row |= {
                quantity: mean.value,
                f"{quantity}_lo": mean.lo,
                f"{quantity}_hi": mean.hi,
                "traces": mean.n_problems,
            }
            if against in (None, label) or quantity not in COMPARED:
                continue
            if (d := compared(part, by_label[against], quantity)) is not None:
                # One training seed says nothing of another: its interval is over traces alone, and nothing is tested.
                names = ("", "_lo", "_hi", "_p")[: 4 if d.n_training_seeds > 1 else 3]
                values = (d.value, d.lo, d.hi, d.p)[: len(names)]
                row |= {f"difference_{quantity}{name}": v for name, v in zip(names, values, strict=True)}
        rows.append(row)
    known = [row for row in rows if "difference_all_p" in row]
    for row, adjusted in zip(known, holm([row["difference_all_p"] for row in known]), strict=True):
        row["difference_all_holm"] = adjusted
    return rows


def _line(row: dict[str, Any], against: str | None) -> tuple[Text, ...]:
    def cell(name: str, sign: bool = False) -> Text:
        if name not in row:
            return Text(EMPTY)
        lo, hi = (number(row[f"{name}_{end}"], DIGITS, sign=sign) for end in ("lo", "hi"))
        return Text(number(row[name], DIGITS, sign=sign), detail=f"[{lo}, {hi}]")

    holm_text = p_value(row["difference_all_holm"]) if "difference_all_holm" in row else EMPTY
    return (
        Text(row["method"], bold=row["method"] == against),
        Text(row["precision"]),
        Text(str(row["runs"])),
        *(cell(name) for name in ("low", "high", "all", "kl")),
        *(cell(f"difference_{name}", sign=True) for name in COMPARED),
        Text(holm_text),
    )


def _notes(study: Study, rows: list[dict[str, Any]]) -> list[str]:
    s, metrics = study.settings, study.metrics
    asked = study.record["config"]["problems"]
    frame = study.parquet("likelihood")
    thresholds = sorted(frame["threshold_nats"].unique())
    ends = (
        number(thresholds[0], DIGITS)
        if len(thresholds) == 1
        else " to ".join(number(end, DIGITS) for end in (thresholds[0], thresholds[-1]))
    )
    reference = s["reference"]
    against = f" Differences to {s['against']}, Holm's adjustment for those of all tokens." if s["against"] else ""
    several_runs = any(row["runs"] > 1 for row in rows if row["study"] == study.id)
    over = "over traces and training runs" if several_runs else "one training run"
    return [
        f"{study.tier}; verified solutions of {metrics['traces']:,} {asked['split']} problems, "
        f"{metrics['tokens']:,} tokens, read by all methods.",
        f"Reference: recipe {reference['recipe']} at {reference['precision']}"
        f"{', of the same training seed where there is one' if several_runs else ''}; low: its entropy is below "
        f"percentile {s['percentile']:g} ({ends} nats).{against}",
        f"Intervals: 95%, clustered by trace, {over}.",
        *made_notes(study),
    ]
