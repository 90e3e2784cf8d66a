"""Training, seen from inside: Figures 4 and 7 of studies of the kinds `dynamics` and `gradients`.

Figure 4 asks what training and rounding did to a model's certainty: for each model, the entropy it has on the same
verified traces, against the base's, in percentile bins of the base's entropy. A fine-tuned model read in BF16 differs
from one trained quantized by both; the fine-tuned model rounded, in the arithmetic of the others, tells them apart.
Figure 7 asks which tokens training listened to: the share
of the squared gradient at positions of low entropy, step by step. That share is drawn beside the share of *tokens*
that are low, for 90% of the gradient from 90% of the tokens would say nothing.

Each reads one CSV of its study (`dynamics.csv`, `gradients.csv`), never token traces.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures.figure2 import ByKind, one
from analysis.report import style
from reqat.config.errors import ReqatError
from reqat.evaluation.low_entropy import LOW_NAMES

if TYPE_CHECKING:
    from analysis.report.studies import Study

# How labels of models are drawn that are no method of their own: QAT on the traces of fine-tuning is ReQAT-T.
_SAME, _DIFFERENT = "ReQAT-T", "FT+QAT"
_FALLBACK = ("PTQ", "FT+PTQ", "ReQAT-TQ", "Baseline")
_WINDOWS = 25  # points that a curve is cut down to, where there are more
_THRESHOLD_LOOKS = ((style.BLUE, "o"), (style.GREEN, "D"), (style.VERMILION, "s"), (style.ORANGE, "^"))


def looks(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each model: those of the method that its label names, else one that is still free."""
    spare = iter(_FALLBACK)
    out: dict[str, dict[str, Any]] = {}
    taken: set[str] = set()
    for label in labels:
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


# -- Figure 4 --------------------------------------------------------------------------------------------------------
def figure4(studies: ByKind) -> Figure:
    """Figure 4: (a) mean change of entropy against the base, (b) entropy over the base's, by bin of the base's entropy.

    Axes are logarithmic where the numbers span more than a decade: the change, of either sign, on a symmetric
    logarithm. Raises `ReqatError` without a study of kind `dynamics`.
    """
    study = one(studies, "dynamics")
    data = study.table("dynamics")
    labels = list(dict.fromkeys(data["label"]))
    fig = style.figure(3.3)
    left, right = fig.subplots(1, 2)
    _by_bin(left, data[data["statistic"] == "change"], labels)
    _by_bin(right, data[data["statistic"] == "normalized"], labels)
    change, ratio = (data.loc[data["statistic"] == name, "value"].abs() for name in ("change", "normalized"))
    left.axhline(0, color="#333333", lw=0.7)
    right.axhline(1, color="#333333", lw=0.7)
    if _decades(change) > 1:
        left.set_yscale("symlog", linthresh=_linear_below(change), linscale=0.5)
        low, high = left.get_ylim()
        left.set_ylim(low * 2 if low < 0 else low, high * 2 if high > 0 else high)  # room beyond the outermost decade
    if _decades(ratio) > 1:
        right.set_yscale("log")
    left.set_ylabel("change of entropy (nats)")
    right.set_ylabel("entropy / base's entropy")
    style.panel(left, "a", "Change against the base")
    style.panel(right, "b", "Relative to the base")
    handles, names = left.get_legend_handles_labels()
    columns = -(-len(names) // -(-len(names) // 5))  # at most five, rows as full as each other
    fig.legend(handles, names, loc="outside upper center", ncols=columns, columnspacing=1.4)
    style.footer(fig, _dynamics_notes(study, data, labels))
    return fig


def _dynamics_notes(study: Study, data: pd.DataFrame, labels: Sequence[str]) -> list[str]:
    first = data[(data["label"] == labels[0]) & (data["statistic"] == "change")]
    at: dict[str, list[str]] = {}
    for label in ("base", *labels):
        at.setdefault(study.settings["precisions"][label], []).append(label)
    arithmetic = "; ".join(f"{precision}: {', '.join(names)}" for precision, names in at.items())
    return [
        f"Tier {study.settings['tier']}; verified solutions of {int(first['clusters'].max()):,} validation problems, "
        f"{int(first['n'].sum()):,} tokens, read by all models.",
        f"{arithmetic}.",
        *_made(study),
        "Bars: 95% intervals clustered by problem; one training run each. Bins hold equal counts of tokens.",
    ]


def _made(study: Study) -> list[str]:
    """Arithmetic and commit, as every footer says them."""
    from analysis.report.cells import arithmetic_of, commit_of

    return [f"Arithmetic: {arithmetic_of(study.record)}.", f"Commit {commit_of(study.record)}."]


def _by_bin(ax: Axes, data: pd.DataFrame, labels: Sequence[str]) -> None:
    """One point a model and bin with its interval, models side by side."""
    drawn = looks(labels)
    step = 0.7 / max(len(labels), 2)
    for i, label in enumerate(labels):
        part = data[data["label"] == label].sort_values("bin")
        x = part["bin"].to_numpy(dtype=float) + (i - (len(labels) - 1) / 2) * step
        value, lo, hi = (part[name].to_numpy(dtype=float) for name in ("value", "lo", "hi"))
        ax.errorbar(x, value, yerr=[value - lo, hi - value], ls="none", lw=0.9, label=label, **drawn[label])
    first = data[data["label"] == labels[0]].sort_values("bin")
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


# -- Figure 7 --------------------------------------------------------------------------------------------------------
def figure7(studies: ByKind) -> Figure:
    """Figure 7: (a) the share of low-entropy tokens in the gradient along training, (b) over their share of tokens.

    Raises `ReqatError` without a study of kind `gradients`, and for one that lacks a threshold of
    :mod:`reqat.evaluation.low_entropy`.
    """
    study = one(studies, "gradients")
    data = study.table("gradients")
    thresholds = list(dict.fromkeys(data["threshold"]))
    missing = [name for name in LOW_NAMES if name not in thresholds]
    if missing:
        raise ReqatError(
            f"{study.path}: gradients.csv has no rows of threshold {missing[0]!r} (it has {', '.join(thresholds)}); "
            f"run the study again (reqat study {study.id} --force)."
        )
    fig = style.figure(3.0)
    left, right = fig.subplots(1, 2)
    ordered = [*LOW_NAMES, *(name for name in thresholds if name not in LOW_NAMES)]
    for threshold, (colour, marker) in zip(ordered, cycle(_THRESHOLD_LOOKS), strict=False):
        curve = smoothed(data[data["threshold"] == threshold])
        x = curve["step"].to_numpy(dtype=float)
        look: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 3, "lw": 1.1}
        left.plot(x, 100 * curve["c_low"], label=_below(threshold), **look)
        lo, hi = (curve[end].clip(0, 1) for end in ("lo", "hi"))  # a share cannot be beyond; NaN leaves a gap
        left.fill_between(x, 100 * lo, 100 * hi, color=colour, alpha=0.15, lw=0)
        left.plot(x, 100 * curve["low_share"], color=colour, lw=0.9, ls=":")
        share = curve["low_share"].where(curve["low_share"] > 0)  # no low token, no ratio
        right.plot(x, curve["c_low"] / share, **look)
        right.fill_between(x, lo / share, hi / share, color=colour, alpha=0.15, lw=0)
    left.plot([], [], color=style.GREY, lw=0.9, ls=":", label="their share of tokens")
    left.set_ylim(0, 100)
    left.set_ylabel("share of squared gradient (%)")
    right.axhline(1, color="#333333", lw=0.7)
    right.set_ylim(bottom=0)
    right.set_ylabel("gradient / tokens")
    for ax in (left, right):
        ax.set_xlabel("optimizer step")
        ax.margins(x=0.02)
    style.panel(left, "a", "Gradient of low-entropy tokens")
    style.panel(right, "b", "Share of gradient over share of tokens")
    fig.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4, columnspacing=1.4)
    style.footer(fig, _gradient_notes(study, data))
    return fig


def _below(threshold: str) -> str:
    """`percentile 25` -> `below the 25th percentile`; `0.6 nats` -> `below 0.6 nats`."""
    percentile = threshold.removeprefix("percentile ")
    return f"below {threshold}" if percentile == threshold else f"below the {percentile}th percentile"


def smoothed(part: pd.DataFrame) -> pd.DataFrame:
    """The curve of one threshold: windows of neighbouring looks where there are many.

    `c_low` and `low_share` are means of a window's looks; `lo` and `hi` add its looks' half widths as of independent
    batches, and may lie outside of [0, 1]. They are NaN where a look of the window has no interval: what the others
    know is not how sure their mean is.
    """
    part = part.sort_values("step")
    window = max(1, -(-len(part) // _WINDOWS))
    rows = []
    for at in range(0, len(part), window):
        looks_at = part.iloc[at : at + window]
        value = float(looks_at["c_low"].mean())
        squares = ((looks_at["hi"] - looks_at["lo"]) / 2) ** 2
        half = float(np.sqrt(squares.sum(skipna=False))) / len(looks_at)
        rows.append(
            {
                "step": float(looks_at["step"].mean()),
                "c_low": value,
                "lo": value - half,
                "hi": value + half,
                "low_share": float(looks_at["low_share"].mean()),
            }
        )
    return pd.DataFrame(rows)


def _gradient_notes(study: Study, data: pd.DataFrame) -> list[str]:
    model = study.settings["model"]
    seen = data[data["threshold"] == data["threshold"].iloc[0]]
    same = study.metrics.get("same_weights")
    out = [
        f"Tier {study.settings['tier']}; {model['recipe']} at {model['precision']}, one training run of "
        f"{study.metrics['steps']:,} steps, a micro-batch every {study.metrics['every']} "
        f"({len(seen):,} in all, {int(seen['tokens'].mean()):,} response tokens each).",
        *_made(study),
        "Entropy is that of the model in training; percentiles are the micro-batch's. Bands: 95% intervals clustered "
        "by trace; in (b) the share of tokens is taken as it is.",
    ]
    if same is not None:
        out.append(f"Weights {'bit-identical to' if same else 'differ from'} those of the stage trained without probe.")
    return out
