"""Companion on KD for QAT of encoders: what each loss recovers of the teacher's attention, layer by layer."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.report import style
from analysis.report.companions import Found
from analysis.tables.companion_encoders import HIDDEN, MAP, OUTPUT, PTQ, SCORE, named

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
MEASURES = {"map_kl_nats": "KL of attention maps (nats)", "output_error": "error of attention outputs"}


def build(found: Found) -> Figure:
    """A row a task: divergence of attention maps and error of attention outputs over layers, means over seeds."""
    layers = found.rows[found.rows["layer"].notna()]
    tasks = list(layers.groupby("task", sort=False))
    fig = style.figure(0.8 + 2.1 * len(tasks))
    axes = fig.subplots(len(tasks), 2, squeeze=False)
    letters = iter("abcdefgh")
    for line, (task, rows) in zip(axes, tasks, strict=True):
        for ax, (measure, label) in zip(line, MEASURES.items(), strict=True):
            _layers(ax, rows, measure)
            ax.set_ylabel(label, fontsize=7)
            style.panel(ax, next(letters, ""), str(task).replace("_", " ").capitalize())
    axes[0][0].legend(fontsize=6)
    style.footer(fig, ["Means over training seeds; logarithmic axes.", *found.notes])
    return fig


def _layers(ax: Axes, rows: pd.DataFrame, measure: str) -> None:
    for method, (colour, marker) in LOOKS.items():
        at = rows[rows["method"] == method].groupby("layer")[measure].mean()
        if len(at):
            ax.plot(at.index + 1, at.to_numpy(), color=colour, marker=marker, ms=3.5, lw=1, label=named(method))
    ax.set_yscale("log")
    ax.set_xlabel("layer")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
