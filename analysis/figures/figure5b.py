"""Figure 5(b-e): where keys are large, before and after RoPE, and what Q-FIT makes of it, in two layers.

The layers are chosen by rule: those for which the search took the smallest and the largest scale exponent.
"""

from __future__ import annotations

from matplotlib.figure import Figure

from analysis.figures._keys import (
    change_words,
    chosen_words,
    draw_error_map,
    draw_paper_choice,
    draw_surface,
    key_notes,
)
from analysis.report import paper, style
from analysis.report.studies import ByKind, one

NAME = "figure5b"
STUDIES = ("keys",)


def build(studies: ByKind) -> Figure:
    """Figure 5(b-e), a row a layer: |K| of one head over tokens and channels, before and after RoPE; the error map."""
    study = one(studies, "keys")
    surfaces, errors = study.table("surfaces"), study.table("errors")
    layers = {which: int(study.settings["layers"][which]) for which in ("smallest", "largest")}
    fig = style.figure(4.6)
    axes = fig.subplots(2, 3, squeeze=False)
    letters = iter("bcde")
    theirs = [paper_choice(name) for name in ("figure5c", "figure5e")]  # smallest scale exponent, then largest
    for row, (which, layer), choice in zip(axes, layers.items(), theirs, strict=True):
        head = study.settings["heads"][layer]
        here = surfaces[surfaces["layer"] == layer]
        letter = next(letters)
        for ax, keys in zip(row[:2], ("before RoPE", "after RoPE"), strict=True):
            image = draw_surface(ax, here[here["keys"] == keys], "c")
            fig.colorbar(image, ax=ax, fraction=0.05, pad=0.02).ax.tick_params(labelsize=6)
            style.panel(ax, letter if keys == "before RoPE" else "", f"|K| {keys}")
            ax.set_xlabel("channel")
        row[0].set_ylabel(f"layer {layer}, head {head}\n({which} \u03b1)\ntoken")
        rows = errors[errors["layer"] == layer]
        image = draw_error_map(row[2], rows)
        draw_paper_choice(row[2], int(choice["layer"]), choice["best alpha_s"], choice["best alpha_m"])
        fig.colorbar(image, ax=row[2], fraction=0.05, pad=0.02).ax.tick_params(labelsize=6)
        row[2].set_xlabel("shift \u03b2")
        row[2].set_ylabel("scale \u03b1")
        style.panel(row[2], next(letters), f"{chosen_words(study, layer)}: {change_words(rows)}")
    said = "; ".join(
        f"layer {choice['layer']:g} ({choice['best alpha_s']:g}, {choice['best alpha_m']:g})" for choice in theirs
    )
    same = len(set(layers.values())) == 1
    notes = [
        *key_notes(study),
        f"Maps: attention error against none, in percent; circle: the chosen point; square: {paper.READ_OFF}.",
        "One scale exponent serves all layers, so both rows are one layer." if same else "",
        f"Paper (R1-Qwen-14B), read off, best (\u03b1, \u03b2): {said}.",
        paper.QFIT_GRID,
    ]
    style.footer(fig, [note for note in notes if note])
    return fig


def paper_choice(artifact: str) -> dict[str, float]:
    """The layer of a panel of the paper and its best point, read off."""
    read = paper.read_off(artifact)
    return {"layer": float(read[0].condition["layer"])} | {r.metric: r.value for r in read}
