"""Figure 5(a): what a quantized KV cache costs, and which part of ReQAT gives it back."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures._results import MODEL_OF_PAPER, PAPER_AXIS, finish, percent_of
from analysis.report import paper, style
from analysis.report.cells import Results
from analysis.report.document import tokens

NAME = "figure5a"
ARTIFACT = "figure5"
NEEDS = "trained"

_WORDS = {"ReQAT-T": "TAQ", "ReQAT-TS": "+SEM", "ReQAT-TQ": "+Q-FIT", "ReQAT-TQS": "+both"}


def build(results: Results, model: str) -> Figure:
    """Figure 5(a): TAQ at W4A4, then at W4A4KV4 alone, with SEM, with Q-FIT and with both; the paper's, read off."""
    entries = results.of("figure5", model=model)
    fig = style.figure(2.9)
    left, right = fig.subplots(1, 2)
    ours = [(e.precision, e.method, percent_of(results, e)) for e in entries]
    _bars(left, ours)
    read = paper.read_off("figure5a")
    _bars(right, [(r.precision, r.method, (r.value, r.value, r.value)) for r in read])
    left.set_ylabel("accuracy (%)")
    right.set_ylabel(PAPER_AXIS)
    total = next((e.total_tokens for e in entries if e.total_tokens), None)
    style.panel(left, "a", f"Measured: {model}, {tokens(total)} tokens")
    style.panel(right, "", f"Paper, read off: {MODEL_OF_PAPER}, {tokens(5 * paper.QAT_TOKENS)} tokens", theirs=True)
    return finish(fig, results, entries, "Bars begin at the lower end of the axis. Paper: to about 0.1 points.")


def _bars(ax: Axes, rows: list[tuple[str, str, tuple[float, float, float]]]) -> None:
    """A bar a (precision, method, (value, lo, hi)), from a bottom that lets differences be seen."""
    low, high = min(lo for _, _, (_, lo, _) in rows), max(hi for _, _, (_, _, hi) in rows)
    bottom = max(0.0, low - max(2.0, 0.6 * (high - low)))
    for i, (_, method, (value, lo, hi)) in enumerate(rows):
        ax.bar(i, value - bottom, 0.72, bottom=bottom, color=style.colour(method), zorder=2)
        if hi > lo:
            ax.errorbar(
                i, value, yerr=[[value - lo], [hi - value]], ecolor="#333333", elinewidth=0.8, capsize=2, zorder=3
            )
        ax.annotate(f"{value:.1f}", (i, hi), (0, 2), textcoords="offset points", ha="center", fontsize=7)
    ax.set_ylim(bottom, high + 0.15 * (high - bottom))
    ax.set_xticks(range(len(rows)), [f"{_WORDS.get(m, m)}\n{p.removeprefix('NVFP4-')}" for p, m, _ in rows], fontsize=7)
    ax.tick_params(axis="x", length=0)
