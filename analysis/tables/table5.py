"""Table 5: parts of Q-FIT, their final loss and accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from analysis.report import paper
from analysis.report.cells import Entry, Results
from analysis.report.document import EMPTY, Column, Table, Text, best, number, tokens
from analysis.report.lines import where
from analysis.report.rows import footer, measured_row, paper_row, tidy
from analysis.report.texts import difference_text, measured_text, reported_text
from reqat.config.errors import ReqatError

NAME = "table5"


def final_losses(results: Results, entry: Entry) -> list[float]:
    """Final training loss (nats a response token) of the stage behind each cell of an entry."""
    out = []
    for cell in entry.cells:
        stage = results.plan.evaluation(cell.evaluation).stage
        loss = results.metrics(stage).get("final_loss")
        if loss is None:
            raise ReqatError(
                f"{results.folder(stage)}: the record has no final_loss, so {entry} has none; {results.remedy([stage])}"
            )
        out.append(float(loss))
    return out


def build(results: Results, artifact: str = NAME) -> Table:
    """Paper Table 5: E1M2, pre-RoPE scale and post-RoPE shift on and off; final QAT loss and accuracy."""
    keys = ("e1m2", "pre_rope_scale", "post_rope_shift")
    entries = results.of(artifact)
    many = len(results.models(artifact)) > 1
    none = ";".join(f"{k}=0" for k in keys)
    reference = where(none)
    compared = any(reference(e, entries) for e in entries)
    columns = [
        *([Column("Model", align="l")] if many else []),
        *(Column(n, "Q-FIT", "c") for n in ("E1M2", "scale", "shift")),
        Column("Tokens"),
        Column("Final loss (nats)"),
        Column("Accuracy (%)"),
        *([Column("Difference to none (points)")] if compared else []),
        Column("final loss", "Paper: R1-Qwen-14B, 280M tokens"),
        Column("AIME-120 (%)", "Paper: R1-Qwen-14B, 280M tokens"),
    ]
    values = [results.estimate(e).value for e in entries]
    losses = [final_losses(results, e) for e in entries]
    their_loss, theirs = (
        [paper.value("table5", precision=e.precision, method=e.method, metric=m, **e.conditions) for e in entries]
        for m in ("final_loss", "AIME-120")
    )
    bolds = _best_by_model(entries, [100 * v for v in values])
    lowest = _best_by_model(entries, [-fmean(x) for x in losses], digits=4)
    section, rows = [], []
    for i, e in enumerate(entries):
        other = reference(e, entries)
        loss = Text(
            number(fmean(losses[i]), 4), lowest[i], f"\u00b1 {stdev(losses[i]):.4f}" if len(losses[i]) > 1 else ""
        )
        cells = [Text(e.model)] if many else []
        cells += [Text("yes" if e.conditions[k] == "1" else EMPTY) for k in keys]
        cells += [Text(tokens(e.total_tokens)), loss, measured_text(results.estimate(e), bolds[i])]
        cells += [difference_text(results.paired(e, other) if other else None)] if compared else []
        cells += [
            reported_text(their_loss[i], best([None if v is None else -v for v in their_loss], 4)[i], 4),
            reported_text(theirs[i], best(theirs)[i]),
        ]
        section.append(tuple(cells))
        rows.append(measured_row(results, e, reference=other) | {"best": bolds[i]})
        common = {
            k: v
            for k, v in rows[-1].items()
            if k
            in (
                "source",
                "tier",
                "model",
                "precision",
                "method",
                "condition",
                "recipe",
                "total_tokens",
                "multiple",
                "training_seeds",
                "arithmetic",
                "commit",
            )
        }
        rows.append(
            common
            | {
                "metric": "final_loss",
                "value": fmean(losses[i]),
                "best": lowest[i],
                "sd": stdev(losses[i]) if len(losses[i]) > 1 else math.nan,
            }
        )
    rows += [paper_row(r) for r in paper.select("table5")]
    return Table(
        artifact,
        results.title(artifact),
        "E1M2 in place of E2M1 for the KV cache, the pre-RoPE scale and the post-RoPE shift of Q-FIT, one at a time "
        "and together. Final loss: mean of the QAT stage's last 5% of steps, in nats a response token"
        + (", with the standard deviation over training seeds" if any(len(x) > 1 for x in losses) else "")
        + ".",
        footer(results, entries, "Bold: best of a column, as printed.", *paper.notes(artifact)),
        tuple(columns),
        (tuple(section),),
        tidy(rows),
    )


def _best_by_model(entries: Sequence[Entry], values: Sequence[float], digits: int = 1) -> list[bool]:
    out = [False] * len(entries)
    for model in {e.model for e in entries}:
        at = [i for i, e in enumerate(entries) if e.model == model]
        for i, flag in zip(at, best([values[i] for i in at], digits), strict=True):
            out[i] = flag
    return out
