"""One look for every figure: fonts, sizes, colours, the footer, and files that are the same bytes each time.

Colours are Okabe and Ito's eight (and one more), told apart with every common colour blindness; each method also has a
marker of its own and its own place or label, so that a figure survives a grey printer. A method has the same colour in
every figure.
Figures go through the Agg canvas directly: no pyplot state, no display, no user's matplotlibrc.
"""

from __future__ import annotations

import contextlib
import io
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure

from reqat.config.files import write_file

# Okabe & Ito 2008, "Color Universal Design"
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
GREY = "#7F7F7F"
WINE = "#882255"  # of Paul Tol's muted scheme, likewise told apart: the eight above are taken

PAPER = "paper"
"""Mark (`gid`) of panels and artists that show the paper's numbers."""
JOIN = "join"
"""Mark of a line that only joins points which other artists draw."""

COLOURS = {
    "Baseline": GREY,
    "FT": BLACK,
    "PTQ": SKY,
    "FT+PTQ": BLUE,
    "QAT": ORANGE,
    "FT+QAT": PURPLE,
    "QAD": WINE,
    "ReQAT-T": GREEN,
    "ReQAT-TS": YELLOW,
    "ReQAT-TQ": PURPLE,
    "ReQAT-TQS": VERMILION,
}
MARKERS = {
    "Baseline": "x",
    "FT": "o",
    "PTQ": "v",
    "FT+PTQ": "^",
    "QAT": "s",
    "FT+QAT": "P",
    "QAD": "X",
    "ReQAT-T": "D",
    "ReQAT-TS": "h",
    "ReQAT-TQ": "p",
    "ReQAT-TQS": "*",
}
MARKER_SIZES = {"*": 8.5, "p": 6.0, "D": 4.6}  # equal visual weight

WIDTH_IN = 7.2  # full text width of a two-column page, inches
DPI = 200

RC: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same letters on every machine
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.labelsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.3,
    "lines.markersize": 5,
    "errorbar.capsize": 2.0,
    "pdf.fonttype": 42,  # TrueType: text stays text, and editable
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
    "svg.hashsalt": "reqat",
    "path.simplify": True,
}


def colour(method: str) -> str:
    """The method's colour. Raises ValueError on a method that has none, so that no two share one by accident."""
    if method not in COLOURS:
        raise ValueError(f"no colour for method {method!r}; give it one in analysis/report/style.py")
    return COLOURS[method]


def line(method: str) -> dict[str, Any]:
    """Keyword arguments of `plot` and `errorbar` that make a method's line or point."""
    marker = MARKERS[method]
    return {
        "color": colour(method),
        "marker": marker,
        "markersize": MARKER_SIZES.get(marker, 5.0),
        "markeredgecolor": "white" if marker != "x" else colour(method),
        "markeredgewidth": 0.4,
    }


@contextlib.contextmanager
def context() -> Iterator[None]:
    """`with style.context():` draws under this style and nothing else, whatever the user's matplotlibrc says."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(RC)  # type: ignore[arg-type]  # the stub wants literal keys
        yield


def figure(height_in: float, width_in: float = WIDTH_IN) -> Figure:
    """An empty figure with constrained layout, on the Agg canvas."""
    fig = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasAgg(fig)
    return fig


def footer(fig: Figure | SubFigure, notes: Sequence[str]) -> None:
    """Tier, n, seeds, arithmetic, in small print under everything (of a figure of subfigures: under the last row)."""
    width_chars = round(22 * fig.bbox.width / fig.dpi)  # of 6-point letters
    # supxlabel takes part in the constrained layout, so that the axes make room for it.
    small = fig.supxlabel("", fontsize=6, color="#555555", x=0.01, ha="left")
    whole = fig if isinstance(fig, Figure) else fig.figure
    renderer = FigureCanvasAgg(whole).get_renderer()
    while True:  # a line of wide letters can be too long for the page
        small.set_text("\n".join(textwrap.wrap("  ".join(notes), width_chars, break_on_hyphens=False)))
        if small.get_window_extent(renderer).width <= 0.99 * fig.bbox.width or width_chars <= 40:
            return
        width_chars -= 2


def panel(ax: Axes, letter: str, title: str, *, theirs: bool = False) -> None:
    """Left-aligned panel title with its letter; grey for a panel of the paper's numbers."""
    ax.set_title(f"({letter}) {title}" if letter else title, loc="left", color=GREY if theirs else "black")
    if theirs:
        ax.set_gid(PAPER)


def theirs(label: str = "", **look: Any) -> dict[str, Any]:
    """Keyword arguments of `plot` for numbers of the paper on the axes of ours: light, behind what was measured, and
    marked as the paper's in the figure's CSV.
    """
    base = {"color": GREY, "lw": 0.8, "ls": ":", "ms": 4, "mfc": "none", "mew": 0.8, "alpha": 0.65, "zorder": 1.5}
    return {**base, **look, "gid": PAPER, "label": label}


def save(fig: Figure, folder: Path, name: str) -> list[Path]:
    """Write `<name>.png` (200 dpi) and `<name>.pdf`, without date or version inside, whole or not at all."""
    fig.draw_without_rendering()
    fig.set_layout_engine("none")  # laid out once: the same places in both files, in half the time
    paths = []
    for suffix, metadata in (
        ("png", {"Software": None}),
        ("pdf", {"CreationDate": None, "Creator": None, "Producer": None, "Title": name}),
    ):
        path = folder / f"{name}.{suffix}"
        drawn = io.BytesIO()  # so that an error of the disk is one, and not one of an encoder
        fig.savefig(drawn, format=suffix, metadata=metadata)
        write_file(path, drawn.getvalue())
        paths.append(path)
    return paths
