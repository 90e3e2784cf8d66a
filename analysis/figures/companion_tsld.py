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
    """Evaluation perplexity over the steps of a training, mean over training seeds, the teacher as a line."""
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
    style.footer(fig, ["Means over training seeds (of nats per token). Dashed: the teacher.", *found.notes])
    return fig


def _title(rows: pd.DataFrame, settings: Mapping[str, Any]) -> str:
    """In two lines: three panels side by side have no room for one."""
    read = ", traces" if settings["text"] == "traces" else ""
    return f"{rows['precision'].iloc[0]}\nin {rows['numbers'].iloc[0]}{read}"


def _curves(ax: Axes, rows: pd.DataFrame) -> None:
    for method, (colour, marker) in LOOKS.items():
        at = perplexities(rows[rows["method"] == method])
        if len(at):
            ax.plot(at.index, at.to_numpy(), color=colour, marker=marker, ms=3.5, lw=1, label=NAMES[method])
    teacher = perplexities(rows[rows["method"] == "teacher"])
    if len(teacher):
        ax.axhline(teacher.iloc[0], color=style.BLACK, lw=0.8, ls="--")
    ax.set_xlabel("step")


def perplexities(rows: pd.DataFrame) -> pd.Series:
    """Step -> exponential of the nats per token, summed over groups, meaned over seeds.

    The n-th evaluation of a training is meaned with the n-th of the others, at the mean of their steps: solutions fill
    a different number of rows for each seed.
    """
    sums = rows.groupby(["seed", "step"])[["nats", "tokens"]].sum()
    nats = (sums["nats"] / sums["tokens"]).rename("nats").reset_index()
    turns = nats.assign(turn=nats.groupby("seed").cumcount()).groupby("turn")
    whole = turns["seed"].count() == nats["seed"].nunique()
    means = turns[["step", "nats"]].mean()[whole]
    return pd.Series(np.exp(means["nats"].to_numpy()), index=means["step"].to_numpy())
