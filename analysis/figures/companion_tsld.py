"""Companion TSLD: evaluation perplexity of the students over their training, a panel a setting."""

from __future__ import annotations

from collections.abc import Mapping
from string import ascii_lowercase
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.report import style
from analysis.report.companions import Found
from analysis.tables.companion_tsld import NAMES

NAME = "companion-tsld"
COMPANION = "tsld"

LOOKS = {
    "gt": (style.GREY, "x"),
    "logit": (style.BLUE, "s"),
    "logit+gt": (style.VERMILION, "D"),
    "tsld": (style.GREEN, "o"),
    "l2l": (style.PURPLE, "^"),
}


def build(found: Found) -> Figure:
    """Evaluation perplexity over the steps of a training, mean over training seeds, the teacher as a line, and rounding
    without training as another where it lies within the panel."""
    groups = list(found.rows.groupby("companion", sort=False))
    columns = 2 if len(groups) == 4 else min(3, len(groups))
    lines = -(-len(groups) // columns)
    fig = style.figure(2.6 * lines, min(style.WIDTH_IN, 1.2 + 3.0 * columns))
    grid = fig.subplots(lines, columns, squeeze=False)
    titles = [_title(rows, found.settings[str(label)]) for label, rows in groups]
    for i, (ax, (label, rows)) in enumerate(zip(grid.flat, groups, strict=False)):
        _curves(ax, rows)
        alike = titles.count(titles[i]) > 1  # settings that differ in something else go by their names
        style.panel(ax, ascii_lowercase[i] if len(groups) > 1 else "", str(label) if alike else titles[i])
    for ax in grid.flat[len(groups) :]:
        ax.set_axis_off()
    for ax in grid[:, 0]:
        ax.set_ylabel("evaluation perplexity")
    fig.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(LOOKS), fontsize=6)
    said = (
        "Means over training seeds (of nats per token), and the lowest and highest seed; each has a teacher of its "
        "own, so the table compares losses seed by seed. Dashed: the teachers' mean. Dotted: rounded, not trained, "
        "where it is not above the panel."
    )
    style.footer(fig, [said, *found.notes])
    return fig


def _title(rows: pd.DataFrame, settings: Mapping[str, Any]) -> str:
    """In two lines: three panels side by side have no room for one."""
    read = ", traces" if settings["text"] == "traces" else ""
    return f"{rows['precision'].iloc[0]}\nin {rows['numbers'].iloc[0]}{read}"


def _curves(ax: Axes, rows: pd.DataFrame) -> None:
    curves = {str(method): perplexities(of_method) for method, of_method in rows.groupby("method")}
    for method, (colour, marker) in LOOKS.items():
        if method in curves:
            at = curves[method]
            ax.plot(at["step"], at["mean"], color=colour, marker=marker, ms=3.5, lw=1, label=NAMES[method])
            ax.fill_between(at["step"], at["low"], at["high"], color=colour, alpha=0.12, lw=0)
    highest = ax.get_ylim()[1]
    for method, line in (("teacher", "--"), ("ptq", ":")):
        if method in curves and (method == "teacher" or curves[method]["mean"].iloc[0] < highest):
            ax.axhline(curves[method]["mean"].iloc[0], color=style.BLACK, lw=0.8, ls=line)
    ax.autoscale_view()  # a line keeps its distance to the edge, too
    ax.set_xlabel("step")


def perplexities(rows: pd.DataFrame) -> pd.DataFrame:
    """Columns step, mean, low, high: the exponential of the nats per token, summed over groups, meaned over seeds, and
    that of the lowest and the highest seed.

    The n-th evaluation of a training is meaned with the n-th of the others, at the mean of their steps: solutions fill
    a different number of rows for each seed.
    """
    sums = rows.groupby(["seed", "step"])[["nats", "tokens"]].sum()
    nats = (sums["nats"] / sums["tokens"]).rename("nats").reset_index()
    turns = nats.assign(turn=nats.groupby("seed").cumcount()).groupby("turn")
    whole = [of_turn for _, of_turn in turns if len(of_turn) == nats["seed"].nunique()]
    nats_TS = np.array([of_turn["nats"].to_numpy() for of_turn in whole])
    curve = {"mean": nats_TS.mean(axis=1), "low": nats_TS.min(axis=1), "high": nats_TS.max(axis=1)}
    steps = [of_turn["step"].mean() for of_turn in whole]
    return pd.DataFrame({"step": steps} | {name: np.exp(values) for name, values in curve.items()})
