"""Held-out likelihood of each method beside the others: what table `likelihood` says, to be seen at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.report import style
from analysis.report.studies import ByKind, one
from analysis.report.study_words import made_notes
from analysis.tables.likelihood import method_rows

NAME = "likelihood-dots"
STUDIES = ("likelihood",)

PANELS = (
    ("low", "Low entropy", "nats / token"),
    ("high", "High entropy", "nats / token"),
    ("all", "All tokens", "nats / token"),
    ("kl", "Divergence", "nats / token"),
)


def build(studies: ByKind) -> Figure:
    """A panel a quantity, a line a method, of the first likelihood study; bars are 95% intervals. Means of several
    methods share hard and easy traces, so that differences are surer than the bars look: they are in the table.

    Raises `ReqatError` without a study of kind `likelihood`.
    """
    study = one(studies, "likelihood")
    rows = method_rows(study)
    fig = style.figure(1.1 + 0.2 * len(rows))
    axes = fig.subplots(1, len(PANELS), sharey=True)
    for ax, letter, (quantity, title, unit) in zip(axes, "abcd", PANELS, strict=True):
        _dots(ax, rows, quantity)
        style.panel(ax, letter, title)
        ax.set_xlabel(unit)
    names = [f"{row['method']} ({row['precision']})" for row in rows]
    axes[0].set_yticks(range(len(rows)), names)
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    s, metrics, reference = study.settings, study.metrics, study.settings["reference"]
    split = study.record["config"]["problems"]["split"]
    over = ", over training runs, too" if any(row["runs"] > 1 for row in rows) else "; one training run"
    notes = [
        f"{study.tier}; solutions of {metrics['traces']:,} {split} problems, {metrics['tokens']:,} tokens.",
        f"Reference: {reference['recipe']} at {reference['precision']}; low: its entropy is below percentile "
        f"{s['percentile']:g}; divergence: KL from it to the method.",
        *made_notes(study),
        f"Bars: 95% intervals clustered by trace{over}.",
    ]
    style.footer(fig, notes)
    return fig


def _dots(ax: Axes, rows: Sequence[dict[str, Any]], quantity: str) -> None:
    for i, row in enumerate(rows):
        if quantity not in row:  # every token is on the other side of the threshold
            continue
        value, lo, hi = (row[f"{quantity}{end}"] for end in ("", "_lo", "_hi"))
        method = row["method"] if row["method"] in style.COLOURS else "Baseline"
        error = np.array([[value - lo], [hi - value]])
        ax.errorbar([value], [i], xerr=error, ls="none", lw=0.9, **style.line(method))
    ax.grid(axis="x")
    ax.grid(visible=False, axis="y")
    if quantity == "kl":  # whose 0 is the reference itself
        ax.set_xlim(left=0)
    ax.locator_params(axis="x", nbins=2)
