"""Figure 1(c): accuracy against the total token budget, one line a method."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from analysis.figures._results import (
    METHODS,
    MODEL_OF_PAPER,
    PAPER_AXIS,
    dash,
    finish,
    percent_of,
    reference_precision,
)
from analysis.report import paper, style
from analysis.report.cells import Entry, Results
from analysis.report.document import tokens
from analysis.report.lines import lines
from analysis.report.names import BF16

NAME = "figure1c"
ARTIFACT = "figure1"
NEEDS = "quantized"

_LABELS = {"FT": "BF16 FT", "Baseline": "BF16 base"}


def build(results: Results, model: str) -> Figure:
    """Figure 1(c): accuracy against the total token budget, one line a method, at NVFP4-W4A4KV4.

    Inferred from Table 1 like Figure 1(b): the horizontal axis is the total (fine-tuning and QAT together), equal for
    all methods; the BF16 base and PTQ of it, which spend nothing, are levels. Of a tier with one total, methods stand
    side by side. The paper's curves are in a panel of their own, with the paper's totals.
    """
    entries = results.of("figure1", model=model)
    all_lines, precision = lines(entries), reference_precision(entries)
    fig = style.figure(3.3)
    left, right = fig.subplots(1, 2, width_ratios=[1.3, 1])
    used: list[Entry] = []
    rows = [(BF16, "Baseline"), (BF16, "FT"), *((precision, m) for m in METHODS)]
    totals = sorted({e.total_tokens for e in entries if e.total_tokens})
    several = len(totals) > 1
    shown: list[str] = []
    for at, method in rows:
        line = next((li for li in all_lines if li.precision == at and li.method == method), None)
        if line is None:
            continue
        shown.append(method)
        trained = {m: e for m, e in line.by.items() if m is not None}
        used += line.by.values()
        if trained:
            x: list[float] = [e.total_tokens for e in trained.values() if e.total_tokens is not None]
            v = np.array([percent_of(results, e) for e in trained.values()])
            if several:
                left.fill_between(x, v[:, 1], v[:, 2], color=style.colour(method), alpha=0.13, lw=0)
                left.plot(x, v[:, 0], **style.line(method), ls=dash(at), zorder=3)
            else:
                _point(left, len(shown) - 1, method, *v[0])
        elif not several:
            _point(left, len(shown) - 1, method, *percent_of(results, line.by[None]))
        else:
            v0, lo, hi = percent_of(results, line.by[None])
            left.axhline(v0, color=style.colour(method), ls=":", lw=1.1)
            left.axhspan(lo, hi, color=style.colour(method), alpha=0.10, lw=0)
        theirs = paper.by_budget("table1", precision=at, method=method)
        budgets = {t: a for t, a in theirs.items() if t is not None}
        if budgets:
            right.plot(list(budgets), list(budgets.values()), **style.line(method), ls=dash(at))
        elif theirs:
            right.axhline(theirs[None], color=style.colour(method), ls=":", lw=1.1)
    _budgets(right, paper.budgets("table1"))
    if several:
        _budgets(left, totals)
    else:  # nothing to draw a line through: a place for each method
        left.set_xticks(
            range(len(shown)), [_LABELS.get(m, m) for m in shown], rotation=30, ha="right", rotation_mode="anchor"
        )
        left.set_xlim(-0.6, len(shown) - 0.4)
        left.tick_params(axis="x", length=0)
        left.set_xlabel(f"trained on {tokens(totals[0])} tokens in all; base and PTQ on none" if totals else "")
    left.set_ylabel("accuracy (%)")
    right.set_ylabel(PAPER_AXIS)
    style.panel(left, "c", f"Measured: {model}, {precision}")
    style.panel(right, "", f"Paper: {MODEL_OF_PAPER}, {precision}", theirs=True)
    right.yaxis.set_major_locator(MaxNLocator(integer=True))
    handles = [_handle(m) for m in shown]
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles), columnspacing=1.2, handlelength=2.0)
    return finish(fig, results, used)


def _budgets(ax: Axes, totals: Sequence[int]) -> None:
    """A tick a total budget."""
    ax.set_xticks(list(totals), [tokens(t) for t in totals])
    ax.set_xlabel("total training budget (tokens)")
    pad = 0.08 * (totals[-1] - totals[0]) or 0.5 * totals[0]
    ax.set_xlim(totals[0] - pad, totals[-1] + pad)


def _point(ax: Axes, x: int, method: str, value: float, lo: float, hi: float) -> None:
    """A method at the one budget: its accuracy, written beside the point, with its interval."""
    ax.errorbar([x], [value], yerr=[[value - lo], [hi - value]], **style.line(method), ls="none", lw=0.9, zorder=3)
    ax.annotate(f"{value:.1f}", (x, hi), (0, 3), textcoords="offset points", ha="center", fontsize=6.5)


def _handle(method: str) -> Line2D:
    label = _LABELS.get(method, method)
    if method in ("Baseline", "PTQ"):
        return Line2D([], [], color=style.colour(method), ls=":", lw=1.3, label=label)
    return Line2D([], [], **style.line(method), ls=dash(BF16 if method == "FT" else ""), label=label)
