"""Figure 9: at which tokens responses differ first and go wrong, and what goes wrong first."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from analysis.entropy import outcome_shares
from analysis.report import style
from analysis.report.plots import draw_divergences, draw_first_errors
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
    draw_divergences(left, shares, errors)
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
    draw_first_errors(right, errors)
    style.footer(fig, [*notes(pair), words])
    return fig


def _with_interval(row: pd.Series) -> str:
    """`12.3% [9.0, 16.1]` of a share and its interval."""
    value, lo, hi = (100 * float(row[name]) for name in ("value", "lo", "hi"))
    return f"{value:.1f}% [{lo:.1f}, {hi:.1f}]"
