"""Parts that several figures draw: a line with intervals over percentiles, groups of bars with intervals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd


def draw_interval_line(ax: Any, x: Any, rows: pd.DataFrame, colour: str, marker: str, label: str) -> None:
    """A line through ``rows``' values with their intervals; none where an interval is unknown."""
    value, lo, hi = (rows[name].to_numpy() for name in ("value", "lo", "hi"))
    known = ~np.isnan(lo)
    error = np.where(known, [value - lo, hi - value], 0.0).clip(min=0)
    ax.errorbar(x, value, yerr=error, color=colour, marker=marker, markersize=3.5, linewidth=1.1, label=label)


def percentiles(rows: pd.DataFrame) -> Any:
    """The middle of each bin, in percentiles of the reference's entropy."""
    return (rows["bin"].to_numpy() + 0.5) * 100 / (rows["bin"].max() + 1)


def draw_bars(ax: Any, ticks: list[str], series: list[tuple[str, pd.DataFrame, str]]) -> None:
    """Groups of bars in percent, with intervals: one group a tick, one bar a series of (label, rows, colour)."""
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
    ax.set_xticks(np.arange(len(ticks)), ticks)
