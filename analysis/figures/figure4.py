"""Figure 4: change of token entropies by training and rounding, from a study of kind `dynamics`.

For each model, the entropy that it has on the same verified traces, against the base's, in percentile bins of the
base's entropy. A fine-tuned model read in BF16 differs from one trained quantized by both; the fine-tuned model
rounded, in the arithmetic of the others, tells them apart. Reads `dynamics.csv` of its study, never token traces.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures._results import MODEL_OF_PAPER
from analysis.report import paper, style
from analysis.report.studies import ByKind, Study, one
from analysis.report.study_words import made_notes
from reqat.config.errors import ReqatError

NAME = "figure4"
STUDIES = ("dynamics",)

# How labels of models are drawn that are no method of their own: QAT on the traces of fine-tuning is ReQAT-T.
_SAME, _DIFFERENT, _QAT = "ReQAT-T", "FT+QAT", "QAT"
_FALLBACK = ("PTQ", "FT+PTQ", "ReQAT-TQ", "Baseline")
# `FT 4 + QAT 0.5`: QAT of so many budgets behind a whole fine-tuning. Darker for larger ones, as the paper's; (a) alone
# has them.
_BUDGET = re.compile(r"FT \S+ \+ QAT (\S+)")


def looks(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each model: those of the method that its label names, else one that is still free."""
    spare = iter(_FALLBACK)
    out: dict[str, dict[str, Any]] = {}
    taken: set[str] = set()
    budgets = _budgets(labels)
    for label in labels:
        if label in budgets:
            shade = _shade(budgets.index(label), len(budgets))
            out[label] = {**style.line(_SAME), "marker": ".", "markersize": 8.0, "alpha": shade}
            continue
        if re.search(r"\bsame\b", label):
            method = _SAME
        elif re.search(r"\bdifferent\b", label):
            method = _DIFFERENT
        else:
            method = re.split(r"[ ,(]", label)[0]
            if re.search(r"\brounded\b", label):
                method += "+PTQ"
        while method not in style.COLOURS or method in taken:
            try:
                method = next(spare)
            except StopIteration:
                raise ReqatError(f"{label}: no look is left for a model of figure4; name fewer models.") from None
        taken.add(method)
        out[label] = style.line(method)
    return out


def _budgets(labels: Sequence[str]) -> list[str]:
    """Those of a growing budget of QAT, the smallest first."""
    found = {label: float(match[1]) for label in labels if (match := _BUDGET.fullmatch(label))}
    return sorted(found, key=lambda label: found[label])


def _shade(i: int, of: int) -> float:
    """Opacity of the i-th of so many budgets."""
    return 0.25 + 0.75 * (i + 1) / of


def build(studies: ByKind) -> Figure:
    """Figure 4, by bin of the base's entropy: (a) mean change of entropy against the base, (b) entropy over that of
    QAT, and below them the paper's (a), and ours over the base's entropy.

    Axes are logarithmic where the numbers span more than a decade: the change, of either sign, on a symmetric
    logarithm. (b) divides two means that were measured against the base, so it has no intervals. Raises `ReqatError`
    without a study of kind `dynamics`.
    """
    study = one(studies, "dynamics")
    data = study.table("dynamics")
    labels = list(dict.fromkeys(data["label"]))
    changes, ratios = (data[data["statistic"] == name] for name in ("change", "normalized"))
    fig = style.figure(5.9)
    (left, right), (theirs, below) = fig.subplots(2, 2, height_ratios=[1.15, 1])
    few = [label for label in labels if label not in _budgets(labels)]
    _by_bin(left, changes, labels)
    _over_qat(right, ratios, few)
    _paper_changes(theirs)
    _by_bin(below, ratios[ratios["label"].isin(few)], few)
    for ax, level in ((left, 0), (right, 1), (below, 1)):
        ax.axhline(level, color="#333333", lw=0.7)
    change = changes["value"].abs()
    if _decades(change) > 1:
        left.set_yscale("symlog", linthresh=_linear_below(change), linscale=0.5)
        low, high = left.get_ylim()
        left.set_ylim(low * 2 if low < 0 else low, high * 2 if high > 0 else high)  # room beyond the outermost decade
    theirs.set_yscale("log")
    if _decades(ratios[ratios["label"].isin(few)]["value"].abs()) > 1:
        below.set_yscale("log")
    left.set_ylabel("change of entropy (nats)")
    theirs.set_ylabel("change of entropy (nats)")
    right.set_ylabel("entropy / QAT's entropy")
    below.set_ylabel("entropy / base's entropy")
    style.panel(left, "a", "Change against the base")
    style.panel(right, "b", "Relative to QAT")
    style.panel(theirs, "", f"(a) of the paper, read off: {MODEL_OF_PAPER}", theirs=True)
    style.panel(below, "", "Relative to the base")
    theirs.legend(loc="lower right", fontsize=6)
    light = [line for line in right.get_lines() if line.get_gid() == style.PAPER]
    low, high = right.get_ylim()
    right.set_ylim(low - 0.3 * (high - low), high)  # room for the legend
    right.legend(handles=light, loc="lower right", fontsize=6)
    handles, names = left.get_legend_handles_labels()
    columns = -(-len(names) // -(-len(names) // 5))  # at most five, rows as full as each other
    fig.legend(handles, names, loc="outside upper center", ncols=columns, columnspacing=1.4)
    style.footer(fig, _dynamics_notes(study, data, labels))
    return fig


def _over_qat(ax: Axes, ratios: pd.DataFrame, labels: Sequence[str]) -> None:
    """Entropies over that of QAT, ours filled and the paper's light; of a study without QAT the paper's alone."""
    drawn = looks(labels)
    by = {label: ratios[ratios["label"] == label].sort_values("bin")["value"].to_numpy(float) for label in labels}
    if _QAT in by:
        step = 0.7 / max(len(labels), 2)
        for i, label in enumerate(labels):
            x = np.arange(len(by[label])) + (i - (len(labels) - 1) / 2) * step
            ax.plot(x, by[label] / by[_QAT], ls="none", label=label, **drawn[label])
    _bin_axis(ax, ratios[ratios["label"] == labels[0]].sort_values("bin"))
    bins = len(by[labels[0]])
    for method, value in _of_paper("figure4b").items():
        look = style.line(_SAME if "same" in method else _DIFFERENT if "different" in method else _QAT)
        light = style.theirs(f"{method}, {paper.READ_OFF}", color=look["color"], marker=look["marker"])
        ax.plot((np.arange(len(value)) + 0.5) * bins / len(value) - 0.5, value, **light)  # bins of equal counts, too


def _paper_changes(ax: Axes) -> None:
    """The paper's (a): FT, QAT, and QAT on growing budgets after FT, darker for larger ones."""
    series = _of_paper("figure4a")
    after = [method for method in series if "+" in method]
    for method, value in series.items():
        look = style.line(_SAME if method in after else method.split()[0])
        alpha = _shade(after.index(method), len(after)) if method in after else 1.0
        ax.plot(range(len(value)), value, lw=0.8, ls=":", label=method, alpha=alpha, **look)
    bins = dict.fromkeys(next(iter(r.condition)) for r in paper.read_off("figure4a"))
    ax.set_xticks(range(len(bins)), [words.removeprefix("entropy percentile ") + "%" for words in bins])
    ax.set_xlim(-0.4, len(bins) - 0.6)
    ax.set_xlabel("percentile of the base's entropy")


def _of_paper(artifact: str) -> dict[str, list[float]]:
    """Method -> its values by bin, as read off."""
    out: dict[str, list[float]] = {}
    for r in paper.read_off(artifact):
        out.setdefault(r.method, []).append(r.value)
    return out


def _dynamics_notes(study: Study, data: pd.DataFrame, labels: Sequence[str]) -> list[str]:
    first = data[(data["label"] == labels[0]) & (data["statistic"] == "change")]
    at: dict[str, list[str]] = {}
    for label in ("base", *labels):
        at.setdefault(study.settings["precisions"][label], []).append(label)
    arithmetic = "; ".join(f"{precision}: {', '.join(names)}" for precision, names in at.items())
    return [
        f"{study.tier}; verified solutions of {int(first['clusters'].max()):,} validation problems, "
        f"{int(first['n'].sum()):,} tokens, read by all models.",
        f"{arithmetic}.",
        *made_notes(study),
        *(["FT 4 + QAT 0.5: four QAT budgets of fine-tuning, then half a budget of QAT."] if _budgets(labels) else []),
        "(b) divides two of the means below it, so it has no intervals; the paper divides by QAT of 280M tokens.",
        "Bars: 95% intervals clustered by problem; one training run each. Bins hold equal counts of tokens.",
    ]


def _by_bin(ax: Axes, data: pd.DataFrame, labels: Sequence[str]) -> None:
    """One point a model and bin with its interval, models side by side."""
    drawn = looks(labels)
    step = 0.7 / max(len(labels), 2)
    for i, label in enumerate(labels):
        part = data[data["label"] == label].sort_values("bin")
        x = part["bin"].to_numpy(dtype=float) + (i - (len(labels) - 1) / 2) * step
        value, lo, hi = (part[name].to_numpy(dtype=float) for name in ("value", "lo", "hi"))
        ax.errorbar(x, value, yerr=[value - lo, hi - value], ls="none", lw=0.9, label=label, **drawn[label])
    _bin_axis(ax, data[data["label"] == labels[0]].sort_values("bin"))


def _bin_axis(ax: Axes, first: pd.DataFrame) -> None:
    """A tick a bin with the base's mean entropy in it, from the rows of one model."""
    bins = len(first)
    ends = [f"{100 * b / bins:.0f}\u2013{100 * (b + 1) / bins:.0f}%" for b in range(bins)]
    means = [f"{value:.2g}" if value >= 0.01 else _power(value) for value in first["entropy_mean"]]
    ax.set_xticks(range(bins), [f"{end}\n{mean}" for end, mean in zip(ends, means, strict=True)])
    ax.set_xlim(-0.55, bins - 0.45)
    for edge in range(bins - 1):
        ax.axvline(edge + 0.5, color="#E3E3E3", lw=0.6)
    ax.set_xlabel("percentile of the base's entropy; its mean (nats)")


def _power(value: float) -> str:
    """`1.1e-05` as a power of ten."""
    if not value > 0:
        return "0"
    exponent = int(np.floor(np.log10(value)))
    return rf"${value / 10.0**exponent:.1f}\cdot10^{{{exponent}}}$"


def _decades(values: pd.Series) -> float:
    """How many powers of ten the values other than 0 span."""
    positive = values[values > 0]
    return float(np.log10(positive.max() / positive.min())) if len(positive) else 0.0


def _linear_below(values: pd.Series) -> float:
    """Where the symmetric logarithm turns linear: the power of ten below the smallest value."""
    positive = values[values > 0]
    return float(10.0 ** np.floor(np.log10(positive.min()))) if len(positive) else 1.0
