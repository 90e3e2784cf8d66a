"""Figure 7: share of low-entropy tokens in the gradient, from a study of kind `gradients`.

The share of the squared gradient at positions of low entropy, step by step, beside the share of tokens that are low:
90% of the gradient from 90% of the tokens would say nothing. Reads `gradients.csv` of its study, never token traces.
"""

from __future__ import annotations

from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.report import style
from analysis.report.studies import ByKind, Study, one
from analysis.report.study_words import made_notes, method_words
from reqat.config.errors import ReqatError
from reqat.evaluation.low_entropy import LOW_NAMES

NAME = "figure7"
STUDIES = ("gradients",)

_WINDOWS = 25  # points that a curve is cut down to, where there are more
_THRESHOLD_LOOKS = ((style.BLUE, "o"), (style.GREEN, "D"), (style.VERMILION, "s"), (style.ORANGE, "^"))


def build(studies: ByKind) -> Figure:
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
        f"{study.tier}; {method_words(model['recipe'])} at {model['precision']}, one training run of "
        f"{study.metrics['steps']:,} steps, a micro-batch every {study.metrics['every']} "
        f"({len(seen):,} in all, {int(seen['tokens'].mean()):,} response tokens each).",
        *made_notes(study),
        "Entropy is that of the model in training; percentiles are the micro-batch's. Bands: 95% intervals clustered "
        "by trace; in (b) the share of tokens is taken as it is.",
    ]
    if same is not None:
        out.append(f"Weights {'bit-identical to' if same else 'differ from'} those of the stage trained without probe.")
    return out
