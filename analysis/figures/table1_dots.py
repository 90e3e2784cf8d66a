"""Table 1 as dots and intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.figures._results import (
    METHODS,
    MODEL_OF_PAPER,
    PAPER_AXIS,
    finish,
    percent_of,
)
from analysis.report import paper, style
from analysis.report.cells import Results
from analysis.report.document import tokens
from analysis.report.lines import lines
from analysis.report.names import BF16

NAME = "table1-dots"
ARTIFACT = "table1"
NEEDS = "quantized"

# Narrower than a marker, most intervals would lie under it: they are drawn over it, in black, with ends.
_INTERVAL: dict[str, Any] = {"ecolor": "black", "elinewidth": 0.8, "capsize": 2.2, "barsabove": True, "zorder": 3}


def build(results: Results, model: str) -> Figure:
    """Table 1 at a glance: a dot and its interval a method and budget, one column of panels a precision; the paper's
    below.
    """
    entries = results.of("table1", model=model)
    all_lines = lines(entries)
    precisions = list(dict.fromkeys(e.precision for e in entries if e.precision != BF16))
    rows = [m for m in ("Baseline", "FT", *METHODS) if any(li.method == m for li in all_lines)]
    fig = style.figure(1.7 + 0.5 * len(rows))
    axes = fig.subplots(2, len(precisions), squeeze=False, sharey="row", height_ratios=[1.25, 1])
    ours = sorted({e.multiple for e in entries if e.multiple})
    theirs = sorted(m for m in map(paper.multiple, paper.budgets("table1")) if m)
    for column, precision in enumerate(precisions):
        top, bottom = axes[0, column], axes[1, column]
        for y, method in enumerate(rows):
            at = BF16 if method in ("Baseline", "FT") else precision
            for m in [None, *ours]:
                entry = next((li.by.get(m) for li in all_lines if li.precision == at and li.method == method), None)
                if entry is not None:
                    v, lo, hi = percent_of(results, entry)
                    top.errorbar(
                        v,
                        y + _offset(m, ours),
                        xerr=[[v - lo], [hi - v]],
                        **_dot(method, m, ours),
                        **_INTERVAL,
                    )
            for m in [None, *theirs]:
                budgets = {
                    paper.multiple(t): a for t, a in paper.by_budget("table1", precision=at, method=method).items()
                }
                if m in budgets:
                    bottom.plot(budgets[m], y + _offset(m, theirs), zorder=3, **_dot(method, m, theirs))
        for ax in (top, bottom):
            ax.set_yticks(range(len(rows)), [{"FT": "BF16 FT", "Baseline": "BF16 base"}.get(m, m) for m in rows])
            ax.set_ylim(len(rows) - 0.4, -0.6)
            ax.grid(axis="x")
            ax.grid(axis="y", visible=False)
            ax.axhline(1.5, color="#BBBBBB", lw=0.6)
            ax.tick_params(axis="y", length=0)
        style.panel(top, "", precision)
        top.set_xlabel("accuracy (%)")
        bottom.set_xlabel(PAPER_AXIS)
    _share_limits(list(axes[0]))
    _share_limits(list(axes[1]))
    axes[0, 0].set_ylabel(f"measured: {model}", fontweight="bold")
    axes[1, 0].set_ylabel(f"paper: {MODEL_OF_PAPER}", color=style.GREY, fontweight="bold")
    totals = {e.multiple: e.total_tokens for e in entries}
    several = len(ours) > 1
    words = (
        (
            f"From the top of each line: {', '.join(tokens(totals[m]) for m in ours)} tokens in all (darker: more); "
            f"paper: {', '.join(tokens(t) for t in paper.budgets('table1'))}."
        )
        if several
        else ""
    )
    return finish(fig, results, entries, *([words] if words else []))


def _offset(multiple: int | None, known: Sequence[int]) -> float:
    """Vertical place within a line: budgets spread over half of it, ascending downwards."""
    if multiple is None or len(known) < 2:
        return 0.0
    return 0.5 * (known.index(multiple) / (len(known) - 1) - 0.5)


def _dot(method: str, multiple: int | None, known: Sequence[int]) -> dict[str, Any]:
    """Marker and colour of a method, paler for smaller budgets."""
    share = 1.0 if multiple is None or len(known) < 2 else 0.45 + 0.55 * known.index(multiple) / (len(known) - 1)
    look = style.line(method)
    return {**look, "markersize": 0.8 * look["markersize"], "ls": "none", "alpha": share}


def _share_limits(axes: Sequence[Axes]) -> None:
    lo, hi = min(ax.get_xlim()[0] for ax in axes), max(ax.get_xlim()[1] for ax in axes)
    for ax in axes:
        # A little beyond 0 and 100, so that a marker there is whole.
        ax.set_xlim(max(-3.0, lo), min(103.0, hi))
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
