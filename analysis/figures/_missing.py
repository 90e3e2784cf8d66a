"""In place of the figure of a benchmark that failed: the reason."""

from __future__ import annotations

import textwrap

from matplotlib.figure import Figure

from analysis.report import style


def missing_figure(reason: str) -> Figure:
    """In place of Figure 6: why it is missing, and what to do."""
    fig = style.figure(1.6)
    lines = [
        "Figure 6 is missing: the benchmark failed.",
        "",
        *textwrap.wrap(reason, 100)[:6],
        "",
        "The next `make figures` tries again; BENCH=no leaves it out.",
    ]
    fig.text(0.5, 0.5, "\n".join(lines), ha="center", va="center", parse_math=False)
    return fig
