"""Table 1 as bars: accuracy of each method at each FP4 precision, at one total budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from analysis.figures._results import (
    METHODS,
    MODEL_OF_PAPER,
    PAPER_AXIS,
    entry_at,
    finish,
    percent_of,
)
from analysis.report import paper, style
from analysis.report.cells import Entry, Results
from analysis.report.document import tokens
from analysis.report.lines import lines
from analysis.report.names import BF16

NAME = "table1-bars"
ARTIFACT = "table1"
NEEDS = "quantized"


def build(results: Results, model: str) -> Figure:
    """What each method reaches at each FP4 precision, at one total budget, beside BF16: Table 1 at a glance.

    One group of bars a precision (PTQ, FT+PTQ, QAT, and the stages of ReQAT), a line for BF16 fine-tuning and one for
    the BF16 base. The budget is the one that claims on the model rest on; the paper's panel takes the same multiple of
    its own QAT budget. PTQ of the base spends no tokens.
    """
    entries = results.of("table1", model=model)
    all_lines, claim = lines(entries), results.plan.tier.claim_total(model)
    precisions = list(dict.fromkeys(e.precision for e in entries if e.precision != BF16))
    fig = style.figure(3.3)
    left, right = fig.subplots(1, 2, width_ratios=[1.75, 1])
    used: list[Entry] = []

    def measured(precision: str, method: str) -> tuple[float, float, float] | None:
        entry = entry_at(all_lines, precision, method, claim)
        if entry is None:
            return None
        used.append(entry)
        return percent_of(results, entry)

    def of_paper(precision: str, method: str) -> tuple[float, float, float] | None:
        value = _paper(precision, method, claim)
        return None if value is None else (value, math.nan, math.nan)

    ours_total = next((e.total_tokens for e in entries if e.multiple == claim), None)
    _bars(left, precisions, measured, labelled=True)
    _bars(right, precisions, of_paper, labelled=False)
    left.set_ylabel("accuracy (%)")
    right.set_ylabel(PAPER_AXIS)
    style.panel(left, "", f"Measured: {model}, {tokens(ours_total)} tokens")
    style.panel(right, "", f"Paper: {MODEL_OF_PAPER}, {tokens(claim * paper.QAT_TOKENS)} tokens", theirs=True)
    handles: list[Artist] = [_patch(m) for m in METHODS if any(entry_at(all_lines, p, m, claim) for p in precisions)]
    handles += [
        Line2D([], [], color=style.colour("FT"), lw=1.2, label="BF16 FT"),
        Line2D([], [], color=style.colour("Baseline"), lw=1.2, ls="--", label="BF16 base"),
    ]
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles), columnspacing=1.2, handlelength=1.3)
    return finish(fig, results, used, "PTQ and the BF16 base spend no tokens.")


def _paper(precision: str, method: str, multiple: int | None) -> float | None:
    found = {paper.multiple(t): v for t, v in paper.by_budget("table1", precision=precision, method=method).items()}
    return found.get(multiple, found.get(None))


def _bars(
    ax: Axes,
    precisions: Sequence[str],
    value: Callable[[str, str], tuple[float, float, float] | None],
    *,
    labelled: bool,
) -> None:
    width = 0.14
    for method, line_style in (("FT", "-"), ("Baseline", "--")):
        found = value(BF16, method)
        if found:
            label = f"BF16 {method}"
            ax.axhline(found[0], color=style.colour(method), lw=0.9, ls=line_style, zorder=2.5, label=label)
            if not math.isnan(found[1]):
                ax.axhspan(found[1], found[2], color=style.colour(method), alpha=0.10, lw=0, zorder=0)
    for i, precision in enumerate(precisions):
        shown = [m for m in METHODS if value(precision, m)]
        for j, method in enumerate(shown):
            found = value(precision, method)
            assert found is not None
            v, lo, hi = found
            x = i + (j - (len(shown) - 1) / 2) * width
            ax.bar(x, v, width * 0.9, color=style.colour(method), edgecolor="white", lw=0.4, zorder=2, label=method)
            if not math.isnan(lo):
                ax.errorbar(x, v, yerr=[[v - lo], [hi - v]], color="#333333", lw=0.8, capsize=1.6, zorder=3)
            if labelled:
                # In the foot of the bar, out of the way of error bars and lines; above a bar too short for it.
                short = lo < 9
                ax.text(
                    x,
                    hi + 1 if short else 1.5,
                    f"{v:.0f}",
                    ha="center",
                    va="bottom",
                    fontsize=6,
                    zorder=4,
                    color="white" if method in ("FT+PTQ", "ReQAT-T", "ReQAT-TQS") and not short else "black",
                )
    ax.set_xticks(range(len(precisions)), [p.replace("-", "\n", 1) for p in precisions])
    ax.tick_params(axis="x", length=0)
    ax.set_xlim(-0.5, len(precisions) - 0.5)
    ax.set_ylim(0, 100)


def _patch(method: str) -> Patch:
    return Patch(facecolor=style.colour(method), label=method)
