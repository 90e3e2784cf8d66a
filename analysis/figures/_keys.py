"""Parts of Figures 5, 10 and 11: heat maps over tokens and channels, and Q-FIT's error map of one layer."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from analysis.report import paper, style
from analysis.report.document import number
from analysis.report.studies import Study
from analysis.report.study_words import made_notes, method_words


def surface(frame: pd.DataFrame, letter: str) -> tuple[np.ndarray, int, int]:
    """(matrix [tokens, columns], first token, first column) of a table with a row a token and columns such as `c0`."""
    columns = [name for name in frame.columns if name[:1] == letter and name[1:].isdigit()]
    return frame[columns].to_numpy(dtype=float), int(frame["token"].iloc[0]), int(columns[0][1:])


def draw_surface(ax: Axes, frame: pd.DataFrame, letter: str, largest: float | None = None) -> AxesImage:
    """A heat map: columns of the table from left to right, tokens downwards."""
    values, token, column = surface(frame, letter)
    extent = (column - 0.5, column + values.shape[1] - 0.5, token + len(values) - 0.5, token - 0.5)
    image = ax.imshow(values, extent=extent, aspect="auto", cmap="viridis", vmin=0, vmax=largest, interpolation="none")
    ax.grid(False)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(4, integer=True))
    return image


def draw_error_map(ax: Axes, rows: pd.DataFrame) -> AxesImage:
    """Attention error of one layer over its grid, in percent of that without Q-FIT; the chosen point has a circle."""
    table = rows.pivot(index="alpha", columns="beta", values="error")
    alphas, betas = table.index.to_numpy(), table.columns.to_numpy()
    error_AB = table.to_numpy(dtype=float)
    change = 100 * (error_AB / error_AB[0, 0] - 1) if error_AB[0, 0] > 0 else np.zeros_like(error_AB)
    a, b = (float(np.diff(values).mean()) / 2 if len(values) > 1 else 0.5 for values in (alphas, betas))
    extent = (betas[0] - b, betas[-1] + b, alphas[0] - a, alphas[-1] + a)
    reach = float(min(50.0, max(1.0, np.abs(change).max())))
    image = ax.imshow(change, origin="lower", extent=extent, cmap="PuOr_r", vmin=-reach, vmax=reach, aspect="auto")
    best = rows[rows["chosen"].astype(bool)].iloc[0]
    ax.plot(best["beta"], best["alpha"], marker="o", ms=5, mfc="white", mec="black", mew=1.1, label="chosen", ls="none")
    ax.grid(False)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(3))
    return image


def draw_paper_choice(ax: Axes, layer: int, scale: float, shift: float) -> None:
    """The point that the paper's search chose for one of its layers, on a map of ours."""
    look = style.theirs(
        f"{paper.READ_OFF}, layer {layer}", color="black", marker="s", ls="none", mfc="white", alpha=1, zorder=3
    )
    ax.plot(shift, scale, **look)


def chosen_words(study: Study, layer: int) -> str:
    """What the search chose for a layer, as text over a map says it."""
    return f"\u03b1 {study.settings['alpha'][layer]:g}, \u03b2 {study.settings['beta'][layer]:g}"


def change_words(rows: pd.DataFrame) -> str:
    """How much of a layer's attention error is left at the chosen point, against none: `\u22126.6%`."""
    none = rows[(rows["alpha"] == rows["alpha"].min()) & (rows["beta"] == rows["beta"].min())]["error"].iloc[0]
    best = rows[rows["chosen"].astype(bool)]["error"].iloc[0]
    return number(100 * (best / none - 1), sign=True) + "%"


def key_notes(study: Study) -> list[str]:
    """Footer: tier, which model, what it was fitted for."""
    s = study.settings
    return [
        f"{study.tier}; the fine-tuned model in BF16 that Q-FIT of {method_words(s['model']['recipe'])} was "
        f"calibrated on for {s['model']['precision']}, {s['sequences']} sequences of {s['tokens']} tokens.",
        *made_notes(study),
    ]
