"""Held-out likelihood of each method beside the others: what table `likelihood` says, to be seen at a glance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

_GAP = 5.0  # times what the other means span, from which on a mean is drawn as a number
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
    axes, beyond = fig.subplots(1, len(PANELS), sharey=True), False
    for ax, letter, (quantity, title, unit) in zip(axes, "abcd", PANELS, strict=True):
        beyond = _dots(ax, rows, quantity) or beyond
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
        *(["A number with an arrow: a mean far above the others."] if beyond else []),
    ]
    style.footer(fig, notes)
    return fig


def _dots(ax: Axes, rows: Sequence[dict[str, Any]], quantity: str) -> bool:
    """Whether any mean stands as a number alone."""
    measured = {i: row for i, row in enumerate(rows) if quantity in row}  # else every token is across the threshold
    far = far_above({i: row[quantity] for i, row in measured.items()})
    for i, row in measured.items():
        value, lo, hi = (row[f"{quantity}{end}"] for end in ("", "_lo", "_hi"))
        method = row["method"] if row["method"] in style.COLOURS else "Baseline"
        if i in far:
            place, colour = ax.get_yaxis_transform(), style.line(method)["color"]
            ax.text(1, i, f"{value:.2g} →", transform=place, ha="right", va="center", fontsize=6, color=colour)
            continue
        error = np.array([[value - lo], [hi - value]])
        ax.errorbar([value], [i], xerr=error, ls="none", lw=0.9, **style.line(method))
    ax.grid(axis="x")
    ax.grid(visible=False, axis="y")
    if quantity == "kl":  # whose 0 is the reference itself
        ax.set_xlim(left=0)
    ax.locator_params(axis="x", nbins=2)
    return bool(far)


def far_above(values: Mapping[int, float]) -> set[int]:
    """Those that would squeeze all others into a corner: the gap below them is more than five times as wide as what the
    others span. None of fewer than four."""
    order = sorted(values, key=lambda i: values[i])
    for n in range(3, len(order)):
        below, above = values[order[n - 1]], values[order[n]]
        if above - below > _GAP * (below - values[order[0]]):
            return set(order[n:])
    return set()
