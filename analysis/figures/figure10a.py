"""Figure 10(a): key profiles of several layers, and what Q-FIT chose for each."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.figures._keys import change_words, chosen_words, draw_error_map, draw_paper_choice, key_notes
from analysis.report import paper, style
from analysis.report.studies import ByKind, one

NAME = "figure10a"
STUDIES = ("keys",)

_MOST = 4  # layers that a figure has room for, as in the paper


def build(studies: ByKind) -> Figure:
    """Figure 10(a), a column a layer: largest |K| by channel before RoPE, by token after it, and the error map."""
    study = one(studies, "keys")
    profiles, errors = study.table("profiles"), study.table("errors")
    layers = shown_layers(int(profiles["layer"].max()) + 1)
    fig = style.figure(5.0)
    axes = fig.subplots(3, len(layers), squeeze=False, sharey="row", height_ratios=[1, 1, 1.25])
    points: dict[str, dict[str, float]] = {}
    for r in paper.read_off("figure10a"):
        points.setdefault(r.condition["layer"], {})[r.metric] = r.value
    of_paper = list(points.items())
    picked = [round(i) for i in np.linspace(0, len(of_paper) - 1, len(layers))]  # from the first to the last, as ours
    theirs = {layer: of_paper[i] for layer, i in zip(layers, picked, strict=True)}
    for column, layer in zip(axes.T, layers, strict=True):
        here = profiles[profiles["layer"] == layer]
        for ax, along, colour in ((column[0], "channel", style.BLUE), (column[1], "token", style.VERMILION)):
            rows = here[here["along"] == along]
            ax.plot(rows["index"], rows["largest"], color=colour, lw=1.0)
            ax.set_xlabel(along)
            ax.set_xlim(0, rows["index"].max())
            ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        channels = int((here["along"] == "channel").sum())
        column[0].axvline(channels / 2, color=style.GREY, lw=0.8, ls=":")
        style.panel(
            column[0], "a" if layer == layers[0] else "", f"layer {layer}, head {study.settings['heads'][layer]}"
        )
        rows = errors[errors["layer"] == layer]
        draw_error_map(column[2], rows)
        name, choice = theirs[layer]
        draw_paper_choice(column[2], int(name), choice["best alpha_s"], choice["best alpha_m"])
        column[2].set_xlabel("shift \u03b2")
        column[2].set_title(f"{chosen_words(study, layer)}: {change_words(rows)}", fontsize=7.5, loc="left")
    for row in axes[:2]:
        row[0].set_ylim(0, 1.05 * max(float(line.get_ydata().max()) for ax in row for line in ax.get_lines()[:1]))
    axes[0, 0].set_ylabel("before RoPE:\nlargest |K|")
    axes[1, 0].set_ylabel("after RoPE:\nlargest |K|")
    axes[2, 0].set_ylabel("scale \u03b1")
    said = ", ".join(f"layer {k} ({v['best alpha_s']:g}, {v['best alpha_m']:g})" for k, v in points.items())
    style.footer(
        fig,
        [
            *key_notes(study),
            "Dotted: half of the channels; RoPE turns r with r + D/2. Maps: attention error against none, purple less "
            "and orange more, each layer on a scale of its own; circle: the chosen point; square: "
            f"{paper.READ_OFF}, of as many layers from its first to its last.",
            f"Paper (R1-Qwen-14B), read off, best (\u03b1, \u03b2): {said}. {paper.QFIT_GRID}",
        ],
    )
    return fig


def shown_layers(count: int) -> list[int]:
    """The layers that are drawn: all, or as many as there is room for, evenly from the first to the last."""
    return sorted({round(x) for x in np.linspace(0, count - 1, min(count, _MOST))})
