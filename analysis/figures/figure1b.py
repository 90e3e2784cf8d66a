"""Figure 1(b): accuracy over the tokens that training spends, at MXFP4-W4A16, with distillation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from analysis.figures._results import MODEL_OF_PAPER, PAPER_AXIS, finish, percent_of, reference_precision
from analysis.report import paper, style
from analysis.report.cells import Entry, Results
from analysis.report.document import tokens
from analysis.report.lines import multiples
from analysis.report.names import BF16

NAME = "figure1b"
ARTIFACT = "figure1"
NEEDS = "quantized"

PRECISION = "MXFP4-W4A16"
"""The paper's. A tier without it draws the precision that its claims are at, and says so."""
METHODS = {"FT": "Baseline", "FT+PTQ": "PTQ", "QAT": "PTQ", "QAD": "PTQ", "ReQAT-TQS": None}
"""Method -> what it is before its first token; the paper draws none for ReQAT."""

Point = tuple[int, float, float, float]
"""Total tokens, accuracy in percent, ends of its interval."""


def build(results: Results, model: str) -> Figure:
    """Figure 1(b): accuracy from the untrained model to the largest total budget, one line a method.

    The horizontal axis is what a method spends in all, fine-tuning and QAT together. QAD is of whichever artifact has
    it at this precision. The paper's panel has its Table 1 (filled) and what its figure shows beyond that, read off
    (hollow).
    """
    entries = results.of(ARTIFACT, model=model)
    precision = PRECISION if any(e.precision == PRECISION for e in entries) else reference_precision(entries)
    curves = {method: _curve(results, model, precision, method, start) for method, start in METHODS.items()}
    curves = {method: found for method, found in curves.items() if found}
    fig = style.figure(3.3)
    left, right = fig.subplots(1, 2, width_ratios=[1.3, 1])
    for method, found in curves.items():
        points = [(e.total_tokens or 0, *percent_of(results, e)) for e in found]
        x, value, lo, hi = np.array(points, dtype=float).T
        left.errorbar(x, value, yerr=[value - lo, hi - value], label=method, ls=_dash(method), **style.line(method))
    for method in METHODS:
        _theirs(right, method)
    _tokens_axis(left, [e.total_tokens for found in curves.values() for e in found])
    _tokens_axis(right, [4 * k * paper.QAT_TOKENS for k in range(4)])
    right.set_xlim(right=17 * paper.QAT_TOKENS)
    left.set_ylabel("accuracy (%)")
    right.set_ylabel(PAPER_AXIS)
    right.yaxis.set_major_locator(MaxNLocator(integer=True))
    style.panel(left, "b", f"Measured: {model}, {precision}")
    style.panel(right, "", f"Paper: {MODEL_OF_PAPER}, {PRECISION}", theirs=True)
    handles = [
        Line2D([], [], ls=_dash(method), label=f"{BF16} FT" if method == "FT" else method, **style.line(method))
        for method in METHODS
    ]
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles), columnspacing=1.4, handlelength=2.0)
    notes = ["At 0 tokens: the base, in BF16 or rounded.", "Paper: filled, its Table 1; hollow, read off its figure."]
    if precision != PRECISION:
        notes.append(f"This tier has no {PRECISION}, which is the paper's.")
    if "QAD" not in curves:
        notes.append("No QAD at this precision in this tier.")
    used = list({id(e): e for found in curves.values() for e in found}.values())
    return finish(fig, results, used, *notes)


def _curve(results: Results, model: str, precision: str, method: str, start: str | None) -> list[Entry]:
    """The entries of a method by budget, from the untrained model on; none where it is trained on no budget."""
    at = BF16 if method == "FT" else precision
    trained: dict[int, Entry] = {}
    untrained = None
    for e in results.entries:  # of any artifact: the one of most training seeds
        if (e.model, e.precision, e.condition, e.problems) != (model, at, "", "own"):
            continue
        if e.method == start and e.multiple is None:
            untrained = untrained or e
        if e.method == method and e.multiple is not None:
            there = trained.get(e.multiple)
            if there is None or len(e.cells) > len(there.cells):
                trained[e.multiple] = e
    if not trained:
        return []
    return [*([untrained] if untrained else []), *(trained[m] for m in multiples(trained.values()) if m is not None)]


def _theirs(ax: Axes, method: str) -> None:
    """The paper's curve of a method: numbers of Table 1 filled, those read off hollow."""
    at = BF16 if method == "FT" else PRECISION
    exact = {t: v for t, v in paper.by_budget("table1", precision=at, method=method).items() if t is not None}
    read = {
        r.total_tokens: r.value
        for r in paper.read_off("figure1b")
        if (r.precision, r.method) == (at, method) and r.total_tokens is not None
    }
    look: Mapping[str, Any] = style.line(method)
    whole = dict(sorted(({t: v for t, v in read.items() if t is not None} | exact).items()))
    joined = {"color": look["color"], "ls": _dash(method), "lw": 1.0, "alpha": 0.7, "gid": style.JOIN}
    ax.plot([*whole], [*whole.values()], **joined)
    for label, points, hollow in ((f"{method}, Table 1", exact, False), (f"{method}, {paper.READ_OFF}", read, True)):
        marks = {**look, "ls": "none", "label": label}
        if hollow:
            marks |= {"markerfacecolor": "white", "markeredgecolor": look["color"], "markeredgewidth": 0.8}
        ax.plot(list(points), list(points.values()), **marks)


def _tokens_axis(ax: Axes, totals: Sequence[float | None]) -> None:
    places = sorted({int(t or 0) for t in totals})
    ax.set_xticks(places, ["0" if t == 0 else tokens(t) for t in places])
    ax.set_xlabel("total training budget (tokens)")
    ax.set_xlim(-0.05 * places[-1], 1.06 * places[-1])


def _dash(method: str) -> str:
    return "--" if method == "FT" else "-"
