"""Companion on KD for QAT of encoders: what each loss recovers of the teacher's attention, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from analysis.report import style
from analysis.report.companions import Found
from analysis.tables.companion_encoders import HIDDEN, MAP, OUTPUT, PTQ, SCORE, headings, named

NAME = "companion-encoders"
COMPANION = "encoders"

LOOKS = {
    PTQ: (style.GREY, "x"),
    HIDDEN: (style.SKY, "v"),
    SCORE: (style.VERMILION, "D"),
    MAP: (style.BLUE, "s"),
    OUTPUT: (style.GREEN, "o"),
    "map+output": (style.PURPLE, "^"),
}
OTHERS = (style.BLUE, style.GREEN, style.PURPLE, style.SKY)
MEASURES = {"map_kl_nats": "KL of attention maps (nats)", "output_error": "error of attention outputs"}


def build(found: Found) -> Figure:
    """A row of settings and task: divergence of attention maps and error of attention outputs over layers, means over
    seeds."""
    layers = found.rows[found.rows["layer"].notna()]
    groups, names = list(layers.groupby(["companion", "task"], sort=False)), headings(layers)
    fig = style.figure(1.1 + 2.1 * len(groups))
    axes = fig.subplots(len(groups), 2, squeeze=False)
    others = [method for method in dict.fromkeys(layers["method"]) if method not in LOOKS]  # mixes of a sweep
    looks = LOOKS | {method: (OTHERS[i % len(OTHERS)], ".") for i, method in enumerate(others)}
    letters, explained = iter("abcdefgh"), dict[str, Line2D]()
    for line, (key, rows) in zip(axes, groups, strict=True):
        for ax, (measure, label) in zip(line, MEASURES.items(), strict=True):
            _layers(ax, rows, measure, looks)
            ax.set_ylabel(label, fontsize=7)
            style.panel(ax, next(letters, ""), names[key])
        explained |= {str(drawn.get_label()): drawn for drawn in line[0].get_lines()}
    # Above all panels: the lines leave no corner of a panel free.
    fig.legend(list(explained.values()), list(explained), loc="outside upper center", ncols=min(3, len(explained)))
    style.footer(fig, ["Means over training seeds; logarithmic axes.", *found.notes])
    return fig


def _layers(ax: Axes, rows: pd.DataFrame, measure: str, looks: Mapping[str, tuple[str, str]]) -> None:
    for method, (colour, marker) in looks.items():
        at = rows[rows["method"] == method].groupby("layer")[measure].mean()
        if len(at):
            ax.plot(at.index + 1, at.to_numpy(), color=colour, marker=marker, ms=3.5, lw=1, label=named(method))
    ax.set_yscale("log")
    ax.set_xlabel("layer")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
