"""The CSV beside a figure: what the artists show, read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from analysis.registry import discovered
from analysis.report import drawn, style


def rows_of(fig: Figure) -> list[dict[str, object]]:
    """Rows without their empty columns."""
    return [row.dropna().replace("", np.nan).dropna().to_dict() for _, row in drawn.rows(fig).iterrows()]


@pytest.fixture
def fig() -> Figure:
    return style.figure(2.0)


def test_bars_have_their_ends_their_words_and_their_intervals(fig: Figure) -> None:
    ax = fig.subplots()
    style.panel(ax, "a", "Bars")
    ax.bar([-0.2, 0.8], [3.0, 5.0], 0.4, label="FT")
    ax.errorbar([-0.2, 0.8], [3.0, 5.0], yerr=[[1, 1], [0.5, 2]], fmt="none")
    ax.bar([0.2], [2.0], 0.4, bottom=1.0, label="QAT", yerr=[[0.25], [0.5]])
    ax.set_xticks([0, 1], ["one\nday", "two"])
    common = {"axes": 0, "panel": "(a) Bars", "source": "measured"}
    assert rows_of(fig) == [
        common | {"series": "FT", "at": "one day", "x": -0.2, "y": 3.0, "y_lo": 2.0, "y_hi": 3.5},
        common | {"series": "FT", "at": "two", "x": 0.8, "y": 5.0, "y_lo": 4.0, "y_hi": 7.0},
        common | {"series": "QAT", "at": "one day", "x": pytest.approx(0.2), "y": 3.0, "y_lo": 2.75, "y_hi": 3.5},
    ]


def test_bars_that_end_at_one_place_are_all_there(fig: Figure) -> None:
    ax = fig.subplots()
    ax.barh([0, 1], [100, 40], label="reference")
    ax.barh([0, 1], [0, 60], left=[100, 40], label="candidate")
    found = drawn.rows(fig)
    assert found[["series", "y", "x"]].to_numpy().tolist() == [
        ["reference", 0, 100], ["reference", 1, 40], ["candidate", 0, 100], ["candidate", 1, 100],
    ]  # fmt: skip


def test_lying_bars_and_lying_intervals(fig: Figure) -> None:
    left, right = fig.subplots(1, 2)
    left.barh([0, 1], [30, 40], left=[10, 0], label="share")
    left.set_yticks([0, 1], ["low", "high"])
    right.errorbar([5.0], [1.0], xerr=[[2.0], [1.0]], label="dot", marker="o")
    found = drawn.rows(fig)
    assert list(found["x"]) == [40, 40, 5] and list(found["at"].fillna("")) == ["low", "high", ""]
    assert found.loc[2, ["x_lo", "x_hi"]].tolist() == [3, 6] and found.loc[2, ["y_lo", "y_hi"]].isna().all()


def test_lines_levels_and_what_only_joins_points(fig: Figure) -> None:
    ax = fig.subplots()
    ax.plot([1, 2], [10, 20], label="ours")
    ax.plot([1, 2], [7, 8], gid=style.JOIN)
    ax.plot([3], [30], **style.theirs("paper (read off)"))
    ax.axhline(4, label="level")
    ax.axhline(0)  # a zero line is no number
    ax.axvline(2)
    ax.plot([], [], label="only in the legend")
    ax.set_xticks([1, 2], ["10K", "20K"])  # numbers, not words
    found = drawn.rows(fig)
    assert found[["source", "series", "y"]].to_numpy().tolist() == [
        ["measured", "ours", 10.0], ["measured", "ours", 20.0], ["paper", "paper (read off)", 30.0],
        ["measured", "level", 4.0],
    ]  # fmt: skip
    assert found["at"].isna().all()


def test_a_panel_of_the_papers_is_the_papers(fig: Figure) -> None:
    ours, theirs = fig.subplots(1, 2)
    ours.errorbar([1], [2], yerr=[[0.0], [0.0]], label="x")
    theirs.plot([1], [3], label="x")
    style.panel(theirs, "", "Paper", theirs=True)
    found = drawn.rows(fig)
    assert list(found["source"]) == ["measured", "paper"] and found["y_lo"].isna().all()  # an interval of no width


def test_maps_have_the_middles_of_their_cells(fig: Figure) -> None:
    small, upside, large = fig.subplots(1, 3)
    small.imshow([[1.0, 2.0]], origin="lower", extent=(0, 4, 0, 2))
    upside.imshow([[1.0], [2.0]], origin="upper", extent=(-0.5, 0.5, 1.5, -0.5))
    large.imshow(np.zeros((100, 100)))
    found = drawn.rows(fig)
    assert found[found["axes"] == 0][["x", "y", "z"]].to_numpy().tolist() == [[1, 1, 1], [3, 1, 2]]
    assert found[found["axes"] == 1][["y", "z"]].to_numpy().tolist() == [[0, 1], [1, 2]]  # tokens downwards
    assert not (found["axes"] == 2).any()


def test_the_file_is_what_was_read(fig: Figure, tmp_path: Path) -> None:
    ax = fig.subplots()
    ax.plot([1.0], [1 / 3], label="a, b")
    written = drawn.save(fig, tmp_path, "x")
    assert [path.name for path in written] == ["x.png", "x.pdf", "x.csv"]
    data = pd.read_csv(tmp_path / "x.csv")
    assert tuple(data.columns) == drawn.COLUMNS and data.loc[0, "series"] == "a, b"
    assert data.loc[0, "y"] == pytest.approx(1 / 3, abs=1e-6)


def test_no_table_has_the_name_of_a_figure() -> None:
    """Their files are collected in one folder, and both have a CSV. (Those of companions stay in folders apart.)"""
    both = set(discovered("tables")) & set(discovered("figures"))
    assert not {name for name in both if not name.startswith("companion-")}
