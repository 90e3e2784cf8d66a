"""Companion schedules: the best speed found so far over measurements, a panel for each table."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analysis.report import searches, style
from analysis.report.companions import Found
from reqat.evaluation.means import Mean

NAME = "companion-schedules"
COMPANION = "schedules"

LOOKS: dict[str, dict[str, Any]] = {
    "uniform": {"color": style.GREY, "ls": ":"},
    "autotvm": {"color": style.BLUE, "ls": "--"},
    "autotvm_filter": {"color": style.ORANGE, "ls": "-."},
    "distinctive": {"color": style.VERMILION, "ls": "-"},
}
_COLUMNS = 3


def build(found: Found) -> Figure:
    """Means over seeds with their 95% intervals; the dotted line is the target."""
    panels = list(found.rows.groupby(["companion", "part"], sort=False))
    rows = math.ceil(len(panels) / _COLUMNS)
    fig = style.figure(2.2 * rows + 0.5)
    axes = fig.subplots(rows, min(_COLUMNS, len(panels)), squeeze=False).ravel()
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    for ax, (letter, ((companion, part), of_part)) in zip(axes, enumerate(panels), strict=False):
        _draw(ax, of_part)
        ax.axhline(100 * float(found.settings[companion]["target"]), color=style.BLACK, lw=0.7, ls=":")
        title = part if companion == COMPANION else f"{part} ({companion})"
        modelled = "" if set(of_part["unit"]) == {searches.MEASURED} else ", modelled"
        style.panel(ax, chr(ord("a") + letter), title + modelled)
        ax.set_xlabel("measurements")
        ax.set_ylabel("best so far (% of the optimum)" if letter % _COLUMNS == 0 else "")
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=len(handles))
    seeds = found.rows["seed"].nunique()
    style.footer(fig, [f"Means over {seeds} seeds; bands: 95% intervals.", *found.noted(arithmetic=False)])
    return fig


def _draw(ax: Any, rows: pd.DataFrame) -> None:
    curve = rows[rows["measure"] == "best"]
    counts = sorted(curve["measurements"].unique())
    lowest = curve.groupby(["method", "measurements"])["value"].mean().min()
    ax.set_ylim(max(0, 100 * lowest - 5), 101.5)  # of few seeds a band can be wider than what there is
    for method in searches.methods_in(rows):
        means = [searches.mean_of(searches.by_seed(rows, "best", method, n)) for n in counts]
        look = LOOKS.get(method, {})
        ax.plot(
            counts,
            [100 * (m.value if isinstance(m, Mean) else m) for m in means],
            label=searches.title_of(method),
            **look,
        )
        known = [m for m in means if isinstance(m, Mean)]
        if len(known) == len(counts):
            lo, hi = [100 * m.lo for m in known], [100 * m.hi for m in known]
            ax.fill_between(counts, lo, hi, color=look.get("color"), alpha=0.15, lw=0)
