"""Every number that was read off the paper's figures is drawn by a figure of ours, and is in the CSV beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from matplotlib.figure import Figure

from analysis.build import maker
from analysis.registry import discovered
from analysis.report import drawn, paper, style
from analysis.report.cells import Results
from tests.analysis import study_folders as made

Value = Callable[[paper.Reported], tuple[str, float]]


def at(column: str, times: float = 1.0) -> Value:
    """In a column of the CSV, in other units."""
    return lambda r: (column, times * r.value)


def above(artifact: str) -> Value:
    """As the difference from the first number of the artifact."""
    return lambda r: ("y", r.value - paper.read_off(artifact)[0].value)


def on_map(r: paper.Reported) -> tuple[str, float]:
    return ("y" if r.metric == "best alpha_s" else "x", r.value)


def damage(r: paper.Reported) -> tuple[str, float]:
    return ("y", (100 if r.metric == "top-1 mismatch" else 1) * r.value)


# Artifact of paper_digitized.csv -> the figure that shows it, and where its numbers are in the CSV beside that.
SHOWN: dict[str, tuple[str, Value]] = {
    "figure1a": ("figure1a", at("y")),
    "figure1b": ("figure1b", at("y")),
    "figure1d": ("figure1d", at("x")),
    "figure2d": ("figure2", at("y", 100 / 8)),
    "figure2e": ("figure2", at("y")),
    "figure2f": ("figure2", damage),
    "figure4a": ("figure4", at("y")),
    "figure4b": ("figure4", at("y")),
    "figure5a": ("figure5a", at("y")),
    "figure5c": ("figure5b", on_map),
    "figure5e": ("figure5b", on_map),
    "figure8": ("figure8", at("y", 100 / 8)),
    "figure10a": ("figure10a", on_map),
    "figure10b": ("figure10b", above("figure10b")),
    "figure11b": ("figure11b", above("figure11b")),
}
# Artifact -> why no figure of ours shows it.
NOT_SHOWN: dict[str, str] = {}


def test_each_figure_that_was_read_off_is_shown_or_said_not_to_be() -> None:
    assert {r.artifact for r in paper.digitized()} == {*SHOWN, *NOT_SHOWN}
    assert not {*SHOWN} & {*NOT_SHOWN} and all(len(reason) > 20 for reason in NOT_SHOWN.values())


@pytest.fixture(scope="module")
def draw(results: Results, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Figure]:
    root = tmp_path_factory.mktemp("studies")
    studies = {
        "pair": [made.pair(root / "pair")],
        "routing": [
            made.routing(root / "nats", "0.6", (0.9, 0.8, 0.6, 0.5)),
            made.routing(root / "percentile", "p75", (0.9, 0.7, 0.8, 0.5)),
        ],
        "noise": [made.noise(root / "noise")],
        "dynamics": [made.dynamics(root / "dynamics")],
        "keys": [made.keys(root / "keys")],
    }

    def figure(name: str) -> Figure:
        build = maker("figures", name)
        with style.context():
            return build(studies) if discovered("figures")[name].studies else build(results, "testbed")

    return figure


@pytest.mark.parametrize("figure", sorted({figure for figure, _ in SHOWN.values()}))
def test_all_of_them_are_in_the_csv_beside_the_figure(draw: Callable[[str], Figure], figure: str) -> None:
    rows = drawn.rows(draw(figure))
    theirs = rows[rows["source"] == "paper"]
    there = Counter((column, round(value, 6)) for column in "xy" for value in theirs[column].dropna())
    asked = [value(r) for name, (shown, value) in SHOWN.items() if shown == figure for r in paper.read_off(name)]
    missing = Counter((column, round(value, 6)) for column, value in asked) - there
    assert not missing
    # ours are beside them, and no number is both
    assert (rows["source"] == "measured").any() and set(rows["source"]) == {"measured", "paper"}
