"""Figure 11(a): the inputs of one down_proj before and after block rotation."""

from __future__ import annotations

from matplotlib.figure import Figure

from analysis.figures._keys import draw_surface, key_notes
from analysis.report import style
from analysis.report.studies import ByKind, one

NAME = "figure11a"
STUDIES = ("keys",)


def build(studies: ByKind) -> Figure:
    """Figure 11(a): |input| of one down_proj on tokens x inputs around its largest value, as it is and rotated."""
    study = one(studies, "keys")
    s = study.settings
    data = study.table("inputs")
    fig = style.figure(3.2)
    axes = fig.subplots(1, 2, sharey=True)
    for ax, name, letter in zip(axes, ("before", "after"), "a ", strict=True):
        image = draw_surface(ax, data[data["inputs"] == f"{name} rotation"], "d")
        fig.colorbar(image, ax=ax, fraction=0.05, pad=0.02)
        largest = s["largest_input"][name]
        style.panel(ax, letter.strip(), f"{name.capitalize()} rotation: at most {largest:.3g}")
        ax.set_xlabel(f"input of {s['down_proj'].removeprefix('model.')}")
    axes[0].set_ylabel("token")
    style.footer(
        fig,
        [
            *key_notes(study),
            f"Absolute inputs around the largest; block Hadamard rotation of {s['rotation']}, which spreads one "
            f"outlier over its block and divides it by \u221a{s['rotation']}. The layer is the one whose largest "
            "input is most times its root mean square. Each panel has a scale of its own.",
            "Paper (R1-Qwen-14B): about 3,100 before and 550 after, over 32 inputs, read off.",
        ],
    )
    return fig
