"""Figure 9: at which tokens responses differ first and go wrong, what goes wrong first, and one problem answered three
times: without noise, with noise on the least sure decisions, and on the surest.
"""

from __future__ import annotations

import textwrap
from itertools import takewhile
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.entropy import outcome_shares
from analysis.report import style
from analysis.report.plots import draw_divergences, draw_first_errors
from analysis.report.studies import ByKind, Study, one, optional, responses
from analysis.report.study_words import notes, roles

NAME = "figure9"
STUDIES = ("pair", "noise")

_SIGMA = 0.2  # the paper's
# Transcripts are set in letters of one width, so that each word has a place and a colour of its own.
_SIZE = 6.0  # points
_PITCH = 0.602 * _SIZE  # points from letter to letter
_COLUMNS, _GAP, _LINES = 44, 3, 16  # letters of a line, letters between two transcripts, lines at most
_LINE_IN = 1.35 * _SIZE / 72


def build(studies: ByKind) -> Figure:
    """Figure 9: at which tokens the responses of a pair part and go wrong, what goes wrong first, and three transcripts
    of one problem.
    """
    pair, noise = one(studies, "pair"), one(studies, "noise")
    shares, errors = pair.table("divergence-shares"), optional(pair, "derailment-shares")
    shares = shares.assign(threshold=shares["threshold"].fillna(""))
    chosen = example(noise)
    texts = {} if chosen is None else {role: _lines(str(row["response"])) for role, row in chosen[1].iterrows()}
    text_in = _LINE_IN * (2 + max(map(len, texts.values()), default=2)) + 0.6  # and the footer
    fig = style.figure(2.5 + text_in)
    rows: Any = fig.subfigures(2, 1, height_ratios=[2.5, text_in])
    left, right = rows[0].subplots(1, 2)
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
    said = _transcripts(rows[1].subplots(), noise, chosen, texts)
    style.footer(rows[1], [*notes(pair, noise), words, said])
    return fig


def example(noise: Study) -> tuple[float, pd.DataFrame] | None:
    """The noise and the three transcripts that stand for a noise study, or None.

    Of all problems and seeds that are right without noise, wrong with noise on the surest decisions and, if there are
    any, right with noise on the least sure ones: the shortest response without noise. Noise is the study's nearest to
    the paper's 0.2. Rows are `none`, `high` and `low`, with the columns of :class:`reqat.evaluation.Outcomes`.
    """
    sigma = min((float(s) for s in noise.settings["sigmas"]), key=lambda s: (abs(s - _SIGMA), s))
    names = {"none": "none", "high": f"high-{sigma:g}", "low": f"low-{sigma:g}"}
    found = {
        role: responses(noise, name).set_index(["problem_id", "seed"]).sort_index() for role, name in names.items()
    }
    flipped = found["none"]["correct"] & ~found["low"]["correct"]
    wanted = flipped & found["high"]["correct"]
    wanted = wanted if wanted.any() else flipped
    if not wanted.any():
        return None
    at = found["none"]["n_tokens"][wanted].idxmin()
    return sigma, pd.DataFrame({role: frame.loc[at] for role, frame in found.items()}).T


def _transcripts(ax: Axes, noise: Study, chosen: tuple[float, pd.DataFrame] | None, texts: dict[str, list[str]]) -> str:
    """Draw the three transcripts, by lines, side by side; returns what the footer says of them."""
    share = f"{100 * float(noise.settings['share']):g}%"
    titles = {"none": "No noise", "high": f"Noise on the least sure {share}", "low": f"Noise on the surest {share}"}
    ax.set_axis_off()
    ax.set_xlim(0, 72 * (style.WIDTH_IN - 0.09) / _PITCH)  # letters; the layout keeps 0.04 inches at either side
    ax.set_ylim(max(map(len, texts.values()), default=2), -2)
    for i, (role, title) in enumerate(titles.items()):
        x = i * (_COLUMNS + _GAP)
        frame = None if chosen is None else chosen[1]
        end = "" if frame is None else f": {'right' if frame.loc[role, 'correct'] else 'wrong'}"
        ax.text(x, -1.3, f"{'(c) ' if i == 0 else ''}{title}{end}", fontsize=8.5, va="center")
        if frame is None:
            continue
        plain, answer = (str(frame.loc[name, "response"]).split() for name in ("none", role))
        same = 0 if role == "none" else shared_words(plain, answer)
        _write(ax, x, texts[role], same, "black" if frame.loc[role, "correct"] else style.VERMILION)
    if chosen is None:
        ax.text(0, 0.5, "no answer that noise spoils", fontsize=7)
        return "(c) No problem is right without noise and wrong with noise on the surest decisions."
    sigma, frame = chosen
    family = str(frame.loc["none", "family"]).replace("_", " ")
    return (
        f"(c) One problem ({family}) and seed, noise \u03c3 {sigma:g}; grey: as without noise. Chosen by rule: the "
        "shortest response that is right without noise and wrong with noise on the surest decisions."
    )


def shared_words(a: list[str], b: list[str]) -> int:
    """How many words two texts have in common from the start."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _lines(text: str) -> list[str]:
    """A response in lines, the first of them where there are too many."""
    lines = [line for part in text.strip().splitlines() for line in textwrap.wrap(part, _COLUMNS)]
    return lines if len(lines) <= _LINES else [*lines[: _LINES - 1], "..."]


def _write(ax: Axes, left: int, lines: list[str], same: int, colour: str) -> None:
    """Lines of words, the first ``same`` of them in grey."""
    seen = 0
    for y, line in enumerate(lines):
        x = left
        for word in line.split():
            tint = style.GREY if seen < same else colour
            ax.text(x, y, word.replace("$", r"\$"), family="DejaVu Sans Mono", fontsize=_SIZE, color=tint, va="center")
            x += len(word) + 1
            seen += 1


def _with_interval(row: pd.Series) -> str:
    """`12.3% [9.0, 16.1]` of a share and its interval."""
    value, lo, hi = (100 * float(row[name]) for name in ("value", "lo", "hi"))
    return f"{value:.1f}% [{lo:.1f}, {hi:.1f}]"
