"""In place of the figure of a companion none of whose parts is there: why, and what to install."""

from __future__ import annotations

import textwrap

from matplotlib.figure import Figure

from analysis.report import style
from analysis.report.companions import Found


def missing_figure(found: Found) -> Figure:
    """A panel of words."""
    fig = style.figure(1.6)
    lines = [f"Companion {found.kind}: no part of it could run.", ""]
    lines += [line for note in found.absences for line in textwrap.wrap(note, 100)[:4]]
    fig.text(0.5, 0.5, "\n".join(lines), ha="center", va="center", parse_math=False)
    return fig
