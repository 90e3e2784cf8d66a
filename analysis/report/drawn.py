"""What a figure shows, as numbers: the CSV that lies beside every PNG.

The rows are read from the drawn artists, so that the file cannot say anything else than the picture: the points of
lines, the ends of bars, intervals, and the cells of small maps. A row tells the paper's numbers from measured ones in
`source`: the paper's are those in a panel of its own (`style.panel(theirs=True)`) and artists drawn by
`style.theirs`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import PathCollection
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.ticker import FixedLocator

from analysis.report import style
from reqat.config.files import write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = ("axes", "panel", "source", "series", "at", "x", "x_lo", "x_hi", "y", "y_lo", "y_hi", "z")
"""`axes` counts from 0 in the order of drawing; `at` is the word at the place of a categorical axis; `z` a map's value.
Bars have their outer end in `y`, lying ones in `x`. The ends of an interval are empty where none is drawn."""
MOST_CELLS = 2000
"""A map of more cells, such as keys over tokens, is not written out: its study keeps it as a table."""


def rows(fig: Figure) -> pd.DataFrame:
    """What a figure shows, a row a point, bar or cell, with `COLUMNS`."""
    found = [
        {"axes": i, "panel": _panel(ax), **row}
        for i, ax in enumerate(fig.axes)
        if ax.get_visible() and ax.get_label() != "<colorbar>"
        for row in _axes_rows(ax)
    ]
    return pd.DataFrame(found, columns=list(COLUMNS))


def save(fig: Figure, folder: Path, name: str) -> list[Path]:
    """Write `<name>.png`, `<name>.pdf` and `<name>.csv`; returns the files."""
    written = style.save(fig, folder, name)
    path = folder / f"{name}.csv"
    write_file(path, rows(fig).to_csv(index=False, float_format="%.6g", lineterminator="\n"))
    return [*written, path]


def _panel(ax: Axes) -> str:
    return " ".join((ax.get_title(loc="left") or ax.get_title() or ax.get_ylabel()).split())


def _axes_rows(ax: Axes) -> Iterator[dict[str, Any]]:
    whose = "paper" if ax.get_gid() == style.PAPER else None
    words = _at(ax)

    def row(artist: Any, **values: Any) -> dict[str, Any]:
        label = str(artist.get_label())
        source = whose or ("paper" if _gid(artist) == style.PAPER else "measured")
        return {"source": source, "series": "" if label.startswith("_") else label, **words(values), **values}

    # A list: a bar may end where another one does, such as a stacked one of no height.
    bars = [
        row(container, **end)
        for container in ax.containers
        if isinstance(container, BarContainer)
        for end in _ends(container)
    ]
    points: list[dict[str, Any]] = []
    inside: set[int] = set()
    for container in ax.containers:
        if not isinstance(container, ErrorbarContainer):
            continue
        inside |= {id(artist) for part in container.lines if part is not None for artist in _each(part)}
        for point in _intervals(container):
            bar = _bar_under(bars, point)
            if bar is not None:  # the interval of a bar, which is a row already
                bar |= {name: value for name, value in point.items() if name[2:] in ("lo", "hi")}
            elif "x" in point and "y" in point:
                points.append(row(container, **point))
    yield from bars
    yield from points
    for line in ax.get_lines():
        if id(line) in inside or line.get_gid() == style.JOIN:
            continue
        if line.get_transform() == ax.transData:
            for x, y in np.asarray(line.get_xydata(), dtype=float):
                yield row(line, x=float(x), y=float(y))
        elif not str(line.get_label()).startswith("_"):  # a level over the whole width
            yield row(line, y=float(np.asarray(line.get_ydata(), dtype=float)[0]))
    for cloud in ax.collections:
        if isinstance(cloud, PathCollection):
            for x, y in np.asarray(cloud.get_offsets(), dtype=float):
                yield row(cloud, x=float(x), y=float(y))
    for image in ax.images:
        values: np.ndarray = np.ma.filled(np.ma.asarray(image.get_array(), dtype=float), np.nan)
        if values.ndim != 2 or values.size > MOST_CELLS:
            continue
        left, right, bottom, top = image.get_extent()
        if image.origin == "upper":
            bottom, top = top, bottom
        height, width = values.shape
        for i, j in np.ndindex(height, width):
            x, y = left + (j + 0.5) * (right - left) / width, bottom + (i + 0.5) * (top - bottom) / height
            yield row(image, x=float(x), y=float(y), z=float(values[i, j]))


def _each(part: Any) -> Iterable[Any]:
    return part if isinstance(part, list | tuple) else (part,)


def _gid(artist: Any) -> str | None:
    """The mark of an artist, or of the first one of a container."""
    if isinstance(artist, BarContainer):
        return artist.patches[0].get_gid() if artist.patches else None
    if isinstance(artist, ErrorbarContainer):
        return artist.lines[0].get_gid() if artist.lines[0] is not None else None
    return artist.get_gid()  # type: ignore[no-any-return]


def _ends(container: BarContainer) -> Iterator[dict[str, float]]:
    """The middle and the outer end of each bar."""
    for bar in container.patches:
        if container.orientation == "horizontal":
            yield {"x": bar.get_x() + bar.get_width(), "y": bar.get_y() + bar.get_height() / 2}
        else:
            yield {"x": bar.get_x() + bar.get_width() / 2, "y": bar.get_y() + bar.get_height()}


def _intervals(container: ErrorbarContainer) -> Iterator[dict[str, float]]:
    """Points with the ends of their intervals; without `y` (or `x`) where the points themselves are not drawn."""
    line, _, bars = container.lines
    kinds = [name for name, has in (("x", container.has_xerr), ("y", container.has_yerr)) if has]
    segments = {name: bar.get_segments() for name, bar in zip(kinds, bars, strict=True)}
    points = None if line is None else np.asarray(line.get_xydata(), dtype=float)
    count = len(points) if points is not None else len(next(iter(segments.values())))
    for i in range(count):
        point: dict[str, float] = {}
        if points is not None:
            point |= {"x": float(points[i, 0]), "y": float(points[i, 1])}
        for name, ends in segments.items():
            axis = "xy".index(name)
            low, high = (float(end[axis]) for end in ends[i])
            if not np.isnan(low) and not np.isnan(high) and low != high:
                point |= {f"{name}_lo": low, f"{name}_hi": high}
            point.setdefault("xy"[1 - axis], float(ends[i][0][1 - axis]))
        yield point


def _bar_under(bars: list[dict[str, Any]], point: dict[str, float]) -> dict[str, Any] | None:
    """The bar whose end a point is; of several, the first that has no interval yet."""
    names = [name for name in ("x", "y") if name in point]
    found = [bar for bar in bars if all(abs(bar[name] - point[name]) < 1e-9 for name in names)]
    free = [bar for bar in found if not any(name[2:] in ("lo", "hi") for name in bar)]
    return next(iter(free or found), None)


def _at(ax: Axes) -> Any:
    """A function from a row's x and y to the word at its place, on the first axis that has words for ticks."""
    for name, axis in (("x", ax.xaxis), ("y", ax.yaxis)):
        places = _words(axis)
        if places:
            return lambda values, name=name, places=places: (
                {"at": places[min(places, key=lambda at: abs(at - values[name]))]} if name in values else {}
            )
    return lambda values: {}


def _words(axis: Axis) -> dict[float, str]:
    """Place -> word of an axis whose ticks are words."""
    if not isinstance(axis.get_major_locator(), FixedLocator):
        return {}
    texts = [" ".join(tick.get_text().split()) for tick in axis.get_ticklabels()]
    places = dict(zip((float(at) for at in axis.get_ticklocs()), texts, strict=False))
    return places if any(_is_word(text) for text in texts) else {}


def _is_word(text: str) -> bool:
    """Whether a tick is a word, not a number (such as `140K`)."""
    try:
        float(text.replace("\u2212", "-").rstrip("KMBk%"))
    except ValueError:
        return bool(text)
    return False
