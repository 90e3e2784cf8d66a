"""Figure 9: at which tokens responses differ first and go wrong, and what goes wrong first."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from analysis.entropy import outcome_shares
from analysis.report import style
from analysis.report.plots import draw_bars
from analysis.report.studies import ByKind, one, optional
from analysis.report.study_words import notes, roles

NAME = "figure9"
STUDIES = ("pair",)


def build(studies: ByKind) -> Figure:
    """Figure 9: at which tokens the responses of a pair part and go wrong, and what goes wrong first."""
    pair = one(studies, "pair")
    shares, errors = pair.table("divergence-shares"), optional(pair, "derailment-shares")
    shares = shares.assign(threshold=shares["threshold"].fillna(""))
    fig = style.figure(2.9)
    left, right = fig.subplots(1, 2)
    below = shares[shares["threshold"] != ""]
    derailed = below[below["pairs"] == "derailed"]
    series = [
        ("first divergence, all pairs", below[below["pairs"] == "all"], style.SKY),
        ("first divergence, derailed pairs", derailed, style.BLUE),
    ]
    if errors is not None:
        series.append(
            ("first wrong token, derailed pairs", errors[errors["statistic"] == "low entropy"], style.VERMILION)
        )
    chances = below[below["pairs"] == "all"]
    draw_bars(left, [f"below\n{name}" for name in chances["threshold"]], series)
    for i, chance in enumerate(chances["chance"]):
        left.plot([i - 0.45, i + 0.45], [100 * chance] * 2, color=style.BLACK, lw=1.0, ls="--", zorder=4)
    left.plot([], [], color=style.BLACK, lw=1.0, ls="--", label="all tokens")
    left.set_ylim(0, 165)  # room for the legend
    left.set_yticks(range(0, 101, 25))
    left.set_ylabel("share (%)")
    left.legend(loc="upper left", fontsize=6.5)
    style.panel(left, "a", f"{roles(pair)[0]} entropy where responses go apart")
    parted = shares[(shares["threshold"] == "") & (shares["pairs"] == "all")].iloc[0]
    ends = outcome_shares(pair.table("first-divergences")).set_index("pairs")
    a, b = roles(pair)
    derail, back = (_with_interval(ends.loc[name]) for name in ("derailed", "reversed"))
    words = (
        f"Of {int(parted['n']):,} pairs of responses {_with_interval(parted)} part; {derail} derail ({a} right, "
        f"{b} wrong) and {back} go the other way ({a} wrong, {b} right); sampling alone would do both as often."
    )
    derailed_n = 0 if errors is None else int(errors[errors["statistic"] == "error"]["n"].max())
    style.panel(right, "b", f"What goes wrong first ({derailed_n:,} derailed)")
    if errors is None:
        right.set_axis_off()
        right.text(0.5, 0.5, "no response derailed", ha="center", transform=right.transAxes, fontsize=7)
    else:
        kinds = errors[errors["statistic"] == "error"]
        draw_bars(right, [str(k).replace(" ", "\n") for k in kinds["which"]], [("", kinds, style.VERMILION)])
        right.set_ylim(0, 100)
        right.set_ylabel("derailed responses (%)")
    style.footer(fig, [*notes(pair), words])
    return fig


def _with_interval(row: pd.Series) -> str:
    """`12.3% [9.0, 16.1]` of a share and its interval."""
    value, lo, hi = (100 * float(row[name]) for name in ("value", "lo", "hi"))
    return f"{value:.1f}% [{lo:.1f}, {hi:.1f}]"
