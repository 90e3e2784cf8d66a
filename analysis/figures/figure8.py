"""Figure 8: routed decoding at every threshold that the tier asks for."""

from __future__ import annotations

from matplotlib.figure import Figure

from analysis.figures._routing import draw_choosers, draw_paper_policies, draw_policies, threshold_words
from analysis.report import style
from analysis.report.studies import ByKind, several
from analysis.report.study_words import notes

NAME = "figure8"
STUDIES = ("routing",)


def build(studies: ByKind) -> Figure:
    """Figure 8: the four routing policies at every threshold that the tier asks for, and who chose how many tokens.

    Over each bar: the difference from the reference alone, in points, with its paired p-value, adjusted (Holm) over the
    comparisons of its study.
    """
    routings = several(studies, "routing")
    fig = style.figure(4.3, min(style.WIDTH_IN, 1.0 + 3.1 * len(routings)))
    axes = fig.subplots(2, len(routings), squeeze=False, sharey="row", height_ratios=[1.7, 1])
    said = ""
    for i, routing in enumerate(routings):
        draw_policies(axes[0, i], routing, differences=True)
        style.panel(axes[0, i], chr(ord("a") + i), threshold_words(routing).capitalize())
        if not str(routing.settings["threshold"]).startswith("p"):  # the paper's threshold is in nats
            said = draw_paper_policies(axes[0, i], "figure8")
        draw_choosers(axes[1, i], routing)
        if i:
            axes[0, i].set_ylabel("")
    words = (
        "Over the bars: difference from the reference alone in points, p of the paired test, "
        "adjusted for the comparisons at its threshold (Holm)."
    )
    style.footer(fig, [*notes(*routings), words, *([said] if said else [])])
    return fig
