"""Companion NCE: accuracy against cost, and where channels went against what two bits cost each layer."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.report import style
from analysis.report.companions import Found
from analysis.tables.companion_nce import arms, per_seed
from analysis.tables.companion_nce_layers import layers

NAME = "companion-nce"
COMPANION = "nce"

LOOKS = {
    "original": (style.BLACK, "o"),
    "widened": (style.GREY, "s"),
    "uniform": (style.SKY, "v"),
    "random": (style.ORANGE, "x"),
    "tas": (style.BLUE, "D"),
    "nce": (style.VERMILION, "*"),
}


def build(found: Found) -> Figure:
    """A row of panels each of the settings: (a) two-bit test accuracy against multiplications, a small mark a seed and
    a large one with its interval the mean; (b) NCE's channels as a share of the original's, and the error of each
    layer's output in two bits."""
    names = list(dict.fromkeys(found.rows["companion"]))
    fig = style.figure(0.9 + 2.4 * len(names))
    axes = fig.subplots(len(names), 2, squeeze=False)
    means, by_layer = arms(found), layers(found)
    letters = iter("abcdefghijklmnop")
    for (left, right), name in zip(axes, names, strict=True):
        rows = found.rows[found.rows["companion"] == name]
        _accuracy(left, rows, means[means["companion"] == name])
        style.panel(left, next(letters), "two bits: accuracy against cost" + (f", {name}" if len(names) > 1 else ""))
        _layers(right, by_layer[by_layer["companion"] == name])
        style.panel(right, next(letters), "where NCE put channels")
    axes[0][0].legend(ncols=2, fontsize=6.5)
    style.footer(fig, ["Bars: 95% intervals over training seeds.", *found.notes])
    return fig


def _accuracy(ax: Axes, rows: pd.DataFrame, means: pd.DataFrame) -> None:
    seeds = per_seed(rows)
    for row in means.itertuples():
        colour, marker = LOOKS[str(row.arm)]
        of_arm = seeds[seeds["arm"] == row.arm]
        ax.plot(of_arm["macs"] / 1e6, 100 * of_arm["two_bit"], ls="none", marker=".", ms=3, color=colour, alpha=0.5)
        error = None
        if not np.isnan(row.two_bit_lo):
            error = 100 * np.array([[row.two_bit - row.two_bit_lo], [row.two_bit_hi - row.two_bit]])
        ax.errorbar([row.macs / 1e6], [100 * row.two_bit], yerr=error, color=colour, marker=marker, label=str(row.arm))
    ax.set_xlabel("multiplications an image (10$^6$)")
    ax.set_ylabel("test accuracy (%)")


def _layers(ax: Axes, rows: pd.DataFrame) -> None:
    places = np.arange(len(rows))
    ax.bar(places, rows["width_nce"] / rows["original"], color=style.VERMILION, width=0.7)
    ax.axhline(1, color=style.BLACK, lw=0.7)
    ax.set_ylabel("channels over the original's")
    ax.set_xticks(places, rows["layer"], rotation=90, fontsize=6)
    other = ax.twinx()
    other.plot(places, 100 * rows["output_error"], color=style.BLUE, marker="o", ls="none")
    other.set_ylabel("error of the output in two bits (%)", color=style.BLUE)
    other.grid(False)
