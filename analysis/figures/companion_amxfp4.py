"""Companion AMXFP4: what each format costs above the unquantized model, and which tensors have one-sided blocks."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.report import style
from analysis.report.companions import Found
from analysis.tables.companion_amxfp4 import UNQUANTIZED, costs, measured
from analysis.tables.companion_amxfp4_blocks import ROLES, shares

NAME = "companion-amxfp4"
COMPANION = "amxfp4"

SHOWN = (
    ("INT4", "FP16"), ("AINT4", "FP16"), ("MXFP4", "PoT"), ("MXFP4", "PoT-R"), ("MXFP4", "E5M2"), ("AMXFP4", "PoT"),
    ("AMXFP4", "E5M2"), ("AMXFP4", "FP16"), ("NVFP4", "E4M3"), ("NVFP4-4/6", "E4M3"),
)  # fmt: skip
LOOKS = {False: (style.VERMILION, "o", "as it is"), True: (style.BLUE, "s", "rotated")}


def build(found: Found) -> Figure:
    """A row a model: costs with 95% intervals over windows; shares of one-sided blocks."""
    rows, blocks = measured(found), shares(found)
    models = list(dict.fromkeys([*rows["model"], *blocks["model"]]))
    fig = style.figure(0.9 + 2.3 * len(models))
    axes = fig.subplots(len(models), 2, squeeze=False)
    letters = iter("abcdefgh")
    for line, model in zip(axes, models, strict=True):
        _costs(line[0], rows[rows["model"] == model])
        style.panel(line[0], next(letters), f"{model}: cost of rounding")
        _shares(line[1], blocks[blocks["model"] == model])
        style.panel(line[1], next(letters), f"{model}: one-sided blocks")
    for ax in axes.flat:
        if ax.get_legend_handles_labels()[0]:
            ax.legend()
            break
    style.footer(fig, ["Bars: 95% intervals over windows.", *found.notes])
    return fig


def _costs(ax: Axes, rows: pd.DataFrame) -> None:
    ax.set_ylabel("nats a token above unquantized")
    if rows.empty:
        return
    table = costs(rows)
    there = {(row.family, row.scale) for row in table.itertuples() if row.family != UNQUANTIZED}
    shown = [cell for cell in SHOWN if cell in there]
    for rotated, (colour, marker, label) in LOOKS.items():
        for i, (family, scale) in enumerate(shown):
            at = table[(table["rotated"] == rotated) & (table["family"] == family) & (table["scale"] == scale)]
            for row in at.itertuples():
                error = np.array([[row.above - row.above_lo], [row.above_hi - row.above]])
                at_x, name = i + (0.12 if rotated else -0.12), label if i == 0 else None
                ax.errorbar([at_x], [row.above], yerr=error, color=colour, marker=marker, ls="none", label=name)
    ax.set_xticks(range(len(shown)), [" ".join(cell) for cell in shown], fontsize=6, rotation=35, ha="right")
    ax.axhline(0, color=style.GREY, lw=0.7)


def _shares(ax: Axes, blocks: pd.DataFrame) -> None:
    ax.set_ylabel("share of blocks (%)")
    if blocks.empty:
        return
    roles = [role for role in ROLES if role in set(blocks["role"])]
    for rotated, (colour, _, label) in LOOKS.items():
        of = blocks[blocks["rotated"] == rotated].set_index("role")["share"]
        places = [i + (0.2 if rotated else -0.2) for i in range(len(roles))]
        ax.bar(places, [100 * of.get(role, np.nan) for role in roles], width=0.38, color=colour, label=label)
    ax.set_xticks(range(len(roles)), roles, fontsize=6)
