"""Companion NN-LUT: the error of each table over its function's range, and what models lose."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.report import style
from analysis.report.companions import Found
from analysis.tables.companion_nnlut import EXACT, LINEAR, NAMES, NLI, NN_LUT, RELEASED, _models, scored
from analysis.tables.companion_nnlut_fits import FORMULAS

NAME = "companion-nnlut"
COMPANION = "nnlut"

LOOKS = {LINEAR: style.GREY, NN_LUT: style.VERMILION, NLI: style.BLUE, RELEASED: style.SKY}
_LEAST = 1e-7
_MARKERS = ("o", "s", "^", "D", "v", "P")


def build(found: Found) -> Figure:
    """A panel a function: absolute error over x; and a panel for what models lose."""
    curves = found.rows[found.rows["what"] == "curve"]
    functions = list(dict.fromkeys(curves["function"]))
    models = dict(_models(found.rows))
    panels = len(functions) + bool(models)
    rows = -(-panels // 2)
    fig = style.figure(0.9 + 1.9 * rows)
    axes = list(fig.subplots(rows, 2, squeeze=False).flat)
    letters = iter("abcdefgh")
    for ax, function in zip(axes, functions, strict=False):
        _errors(ax, str(function), curves[curves["function"] == function])
        style.panel(ax, next(letters), FORMULAS[str(function)])
    if functions:
        axes[0].legend(fontsize=6)
    if models:
        ax = axes[len(functions)]
        _losses(ax, models)
        style.panel(ax, next(letters), "What models lose")
    for ax in axes[panels:]:
        ax.set_axis_off()
    about = "Tables of one size; float32 arithmetic. Errors of NN-LUT: first training seed. Bars: 95% intervals."
    style.footer(fig, [about, *found.notes])
    return fig


def _errors(ax: Axes, function: str, rows: pd.DataFrame) -> None:
    for method, colour in LOOKS.items():
        part = rows[rows["method"] == method]
        if len(part):
            ax.plot(part["x"], part["error"].clip(lower=_LEAST), color=colour, lw=0.9, label=NAMES[method])
    ax.set_yscale("log")
    if function in ("reciprocal", "rsqrt"):
        ax.set_xscale("log")
    ax.set_xlabel("x")
    ax.set_ylabel("absolute error", fontsize=7)


def _losses(ax: Axes, models: dict[tuple[str, str, str], dict[tuple[str, str, str, bool], np.ndarray]]) -> None:
    """Relative to the margin of "no loss", so that nats and points share an axis."""
    from analysis.tables.companion_nnlut import MARGINS

    arms = [(LINEAR, False), (NLI, False), (RELEASED, False), (NN_LUT, False), (NN_LUT, True)]
    for shift, (about, seen) in enumerate(models.items()):
        kind, model, precision = about
        for place, (method, calibrated) in enumerate(arms):
            arm = (method, "fp32", "all", calibrated)
            row = scored(kind, seen, arm) if arm in seen and method != EXACT else {}
            if "loss" in row:
                value, low, high = (row[name] / MARGINS[kind] for name in ("loss", "loss_lo", "loss_hi"))
                at = place + 0.12 * (shift - (len(models) - 1) / 2)
                ax.plot([at, at], [low, high], color=LOOKS[method], lw=0.9)
                label = f"{model}, {'unquantized' if precision == 'BF16' else precision}" if place == 0 else None
                ax.plot(at, value, _MARKERS[shift % len(_MARKERS)], color=LOOKS[method], ms=3.5, label=label)
    ax.axhline(1.0, color=style.GREY, lw=0.7, ls=":")
    ax.axhline(0.0, color=style.BLACK, lw=0.6)
    ax.set_yscale("symlog", linthresh=1.0)
    ax.margins(y=0.08)  # so that no marker is cut
    ax.set_xticks(range(len(arms)), [_tick(*arm) for arm in arms], fontsize=6)
    ax.set_ylabel("loss / margin of no loss", fontsize=7)
    ax.legend(fontsize=5.5, loc="lower left")


def _tick(method: str, calibrated: bool) -> str:
    short = {LINEAR: "equally\nspaced", NLI: "NLI", RELEASED: "NLI,\nreleased", NN_LUT: "NN-LUT"}
    return short[method] + (",\ncalibrated" if calibrated else "")
