"""Parts that several figures draw: lines with intervals over percentiles, bars with intervals, panels of a pair."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from analysis.report import style

KIND_COLOURS = {"digit": style.BLUE, "operator": style.VERMILION, "other": "#333333"}


def draw_interval_line(ax: Any, x: Any, rows: pd.DataFrame, colour: str, marker: str, label: str) -> None:
    """A line through ``rows``' values with their intervals; none where an interval is unknown."""
    value, lo, hi = (rows[name].to_numpy() for name in ("value", "lo", "hi"))
    known = ~np.isnan(lo)
    error = np.where(known, [value - lo, hi - value], 0.0).clip(min=0)
    ax.errorbar(x, value, yerr=error, color=colour, marker=marker, markersize=3.5, linewidth=1.1, label=label)


def percentiles(rows: pd.DataFrame) -> Any:
    """The middle of each bin, in percentiles of the reference's entropy."""
    return (rows["bin"].to_numpy() + 0.5) * 100 / (rows["bin"].max() + 1)


def draw_bars(ax: Any, ticks: list[str], series: list[tuple[str, pd.DataFrame, str]], *, written: bool = False) -> None:
    """Groups of bars in percent, with intervals: one group a tick, one bar a series of (label, rows, colour).

    ``written``: each with its value over it, so that one too low to be seen is not taken for one that is missing."""
    width = 0.8 / len(series)
    for j, (label, rows, colour) in enumerate(series):
        value, lo, hi = (100 * rows[name].to_numpy(dtype=float) for name in ("value", "lo", "hi"))
        x = np.arange(len(ticks)) + (j - (len(series) - 1) / 2) * width
        known = ~np.isnan(value)
        error = np.array([value - lo, hi - value])[:, known].clip(min=0)
        ax.bar(
            x[known],
            value[known],
            width * 0.92,
            yerr=error,
            color=colour,
            label=label or None,
            error_kw={"linewidth": 0.9},
        )
        if written:
            for at, height, end in zip(x[known], value[known], hi[known], strict=True):
                said = f"{height:.0f}" if height >= 10 or height == 0 else f"{height:.1g}"
                ax.text(at, max(height, end) + 2, said, color=colour, ha="center", fontsize=6.2, zorder=5)
    ax.set_xticks(np.arange(len(ticks)), ticks)


def in_percent(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with value and interval times 100."""
    return rows.assign(**{name: 100 * rows[name] for name in ("value", "lo", "hi")})


def draw_damage(left: Any, right: Any, frame: pd.DataFrame) -> None:
    """Tail-mass ratio (left) and top-1 mismatch (right) by bin, from the rows of ``damage_by_bin``."""
    for statistic, colour, marker in (
        ("tail ratio (geometric mean)", style.BLUE, "o"),
        ("tail ratio (of means)", style.ORANGE, "s"),
    ):
        rows = frame[frame["statistic"] == statistic]
        words = statistic.removeprefix("tail ratio (").removesuffix(")")
        draw_interval_line(left, percentiles(rows), rows, colour, marker, words)
    left.axhline(1, color=style.GREY, lw=0.8)
    bottom, top = left.get_ylim()
    if top > 20:
        left.set_yscale("log")
    left.set_ylim(top=top * 8 if top > 20 else top + 0.35 * (top - bottom))  # room for the legend
    left.set_ylabel("tail mass, ratio")
    left.legend(loc="upper left")
    rows = frame[frame["statistic"] == "top-1 mismatch"]
    draw_interval_line(right, percentiles(rows), in_percent(rows), style.VERMILION, "D", "")
    right.set_ylabel("top-1 mismatch (%)")
    right.set_ylim(0, None)


def draw_kinds(ax: Any, frame: pd.DataFrame) -> None:
    """Share of digits and of operators by bin, from the rows of ``kinds_by_bin``."""
    for kind, marker in (("digit", "o"), ("operator", "s")):
        rows = frame[frame["kind"] == kind]
        draw_interval_line(ax, percentiles(rows), in_percent(rows), KIND_COLOURS[kind], marker, f"{kind}s")
    ax.set_ylabel("share of tokens (%)")
    ticks = [tick for tick in ax.get_yticks() if 0 <= tick <= 100]
    ax.set_ylim(0, 1.22 * ax.get_ylim()[1])  # room for the legend
    ax.set_yticks(ticks)


def draw_divergences(ax: Any, shares: pd.DataFrame, errors: pd.DataFrame | None) -> None:
    """Share of first divergences (``shares``) and of first errors (``errors``; None where no response derailed) at
    tokens below each threshold; dashed, the share of all tokens."""
    below = shares[shares["threshold"] != ""]
    chances = below[below["pairs"] == "all"]
    series = [
        ("first divergence, all pairs", chances, style.SKY),
        ("first divergence, derailed pairs", below[below["pairs"] == "derailed"], style.BLUE),
    ]
    if errors is not None:
        wrong = errors[errors["statistic"] == "low entropy"]
        series.append(("first wrong token, derailed pairs", wrong, style.VERMILION))
    draw_bars(ax, [f"below\n{name}" for name in chances["threshold"]], series, written=True)
    for i, chance in enumerate(chances["chance"]):
        ax.plot([i - 0.45, i + 0.45], [100 * chance] * 2, color=style.BLACK, lw=1.0, ls="--", zorder=4)
    ax.plot([], [], color=style.BLACK, lw=1.0, ls="--", label="all tokens")
    ax.set_ylim(0, 165)  # room for the legend
    ax.set_yticks(range(0, 101, 25))
    ax.set_ylabel("share (%)")
    ax.legend(loc="upper left", fontsize=6.5)


def draw_first_errors(ax: Any, errors: pd.DataFrame | None) -> None:
    """What went wrong first in derailed responses, a bar a kind of error; None: no response derailed."""
    if errors is None:
        ax.set_axis_off()
        ax.text(0.5, 0.5, "no response derailed", ha="center", transform=ax.transAxes, fontsize=7)
        return
    kinds = errors[errors["statistic"] == "error"]
    draw_bars(ax, [str(kind).replace(" ", "\n") for kind in kinds["which"]], [("", kinds, style.VERMILION)])
    ax.set_ylim(0, 100)
    ax.set_ylabel("derailed responses (%)")
