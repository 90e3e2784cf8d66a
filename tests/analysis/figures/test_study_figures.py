"""Figures 2, 8 and 9 of studies with known numbers: what is drawn is what the files say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from analysis import entropy
from analysis.figures import figure2, figure8, figure9
from analysis.figures.figure2 import visible
from analysis.report import style
from analysis.report.studies import Study
from analysis.report.study_words import method_words, nats
from reqat.config.errors import ReqatError
from tests.analysis import study_folders as made

FIGURES = {"figure2": figure2.build, "figure8": figure8.build, "figure9": figure9.build}
ACCURACIES = (0.9, 0.85, 0.6, 0.5)


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Study]]:
    root = tmp_path_factory.mktemp("studies")
    return {
        "pair": [made.pair(root / "pair")],
        # the percentile comes first: Figure 2 must take the one in nats
        "routing": [
            made.routing(root / "percentile", "p75", (0.9, 0.7, 0.8, 0.5)),
            made.routing(root / "nats", "0.6", ACCURACIES),
        ],
        "noise": [made.noise(root / "noise")],
    }


def draw(make: Callable[..., Figure], studies: dict[str, list[Study]]) -> Figure:
    with style.context():
        fig = make(studies)
        fig.draw_without_rendering()
    return fig


@pytest.fixture(scope="module")
def drawn(studies: dict[str, list[Study]]) -> dict[str, Figure]:
    """Each figure once; to look at only."""
    return {name: draw(make, studies) for name, make in FIGURES.items()}


def texts(fig: Figure) -> str:
    return "\n".join(t.get_text() for t in fig.findobj(lambda a: hasattr(a, "get_text")))  # type: ignore[attr-defined]


def panel(fig: Figure, title: str) -> Axes:
    (found,) = [ax for ax in fig.axes if ax.get_title(loc="left").startswith(title)]
    return found


def heights(ax: Axes) -> list[float]:
    return [bar.get_height() for container in ax.containers for bar in getattr(container, "patches", [])]


@pytest.mark.parametrize("name", FIGURES)
def test_the_footer_says_n_seeds_tier_and_arithmetic(drawn: dict[str, Figure], name: str) -> None:
    words = texts(drawn[name]).replace("\n", " ")
    for part in ("Tier synthetic", "12 problems, 2 sampling seeds", "fake-quantized, CPU", "clustered by problem"):
        assert part in words
    assert "Commit 0123456789" in words and made.CAND in words


@pytest.mark.parametrize("name", FIGURES)
def test_same_studies_same_picture(studies: dict[str, list[Study]], drawn: dict[str, Figure], name: str) -> None:
    def pixels(fig: Figure) -> bytes:
        canvas = fig.canvas
        assert isinstance(canvas, FigureCanvasAgg)
        canvas.draw()
        return bytes(canvas.buffer_rgba())

    assert pixels(drawn[name]) == pixels(draw(FIGURES[name], studies))


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_lies_outside(drawn: dict[str, Figure], name: str) -> None:
    fig = drawn[name]
    width, height = fig.get_size_inches() * fig.dpi
    for ax in fig.axes:
        ticks = []
        for axis in (ax.xaxis, ax.yaxis) if ax.axison else ():
            lo, hi = sorted(axis.get_view_interval())  # ticks beyond are not drawn
            ticks += [tick.label1 for tick in axis.get_major_ticks() if lo <= tick.get_loc() <= hi]
        labels = [ax.xaxis.label, ax.yaxis.label] if ax.axison else []
        for artist in (*ax.texts, ax._left_title, *labels, *ticks):
            if artist.get_visible() and artist.get_text().strip():
                box = artist.get_window_extent()
                assert box.x0 > 0 and box.x1 < width and box.y0 > 0 and box.y1 < height, artist


def test_figure2_routing_and_noise(drawn: dict[str, Figure]) -> None:
    fig = drawn["figure2"]
    policies = panel(fig, "(d)")
    bars = [p.get_height() for p in policies.patches]  # type: ignore[attr-defined]
    assert bars == pytest.approx([100 * a for a in ACCURACIES])
    (theirs,) = policies.get_lines()[-1:]
    assert list(np.round(theirs.get_xdata())) == [3, 2, 1, 0]  # all FP4 first, as in the file
    assert list(theirs.get_ydata()) == [12.5, 37.5, 87.5, 75] and theirs.get_label() == "paper (read off)"
    choosers = panel(fig, "(c)")
    reference, candidate = ([p.get_width() for p in c.patches] for c in choosers.containers)  # type: ignore[union-attr]
    assert candidate == pytest.approx([0, 30, 70, 100]) and reference == pytest.approx([100, 70, 30, 0])
    lines = {c.get_label(): c.lines[0].get_xydata() for c in panel(fig, "(e)").containers}  # type: ignore[union-attr]
    np.testing.assert_allclose(lines["surest 25%"], [[0, 90], [0.2, 50], [0.5, 10]])
    np.testing.assert_allclose(lines["least sure 25%"], [[0, 90], [0.2, 80], [0.5, 70]])


def test_figure2_tokens_and_damage(studies: dict[str, list[Study]], drawn: dict[str, Figure]) -> None:
    fig, pair = drawn["figure2"], studies["pair"][0]
    tokens = pair.table("entropy-by-token").sort_values("value")
    shown = [t.get_text() for t in panel(fig, "(a)").texts][:-1]  # the last is the range
    assert shown == [visible(t) for t in tokens["token"][: len(tokens) // 2]] and len(shown) >= 3
    least = [t.get_text() for t in panel(fig, "Least sure token").texts][:-1]
    assert not set(shown) & set(least) and least[0] == visible(tokens["token"].iloc[-1])
    damage = pair.table("tail-and-mismatch")
    mismatch = damage[damage["statistic"] == "top-1 mismatch"]["value"].to_numpy()
    drawn = panel(fig, "Other top token").containers[0].lines[0].get_ydata()  # type: ignore[union-attr]
    np.testing.assert_allclose(drawn, 100 * mismatch)


def test_figure2_shows_both_distributions(studies: dict[str, list[Study]], drawn: dict[str, Figure]) -> None:
    fig = drawn["figure2"]
    ax = panel(fig, "(b)")
    rows = studies["pair"][0].table("examples")
    rows = rows[rows["example"] == "derailment"]
    ticks = [t.get_text() for t in ax.get_xticklabels()]
    lines = {line.get_label(): line for line in ax.get_lines()}
    for label, name in ((made.REF, "BF16"), (made.CAND, "NVFP4")):
        own = rows[rows["label"] == label].set_index("token")["probability"]
        xy = np.asarray(lines[name].get_xydata())
        found = {ticks[round(x)]: y for x, y in xy}
        assert found == pytest.approx({visible(t): p for t, p in own.items() if visible(t) in ticks})
        assert len(found) >= 2
    assert ax.get_xlabel().startswith("\u201c\u2026 is 1 + 1 = \u25a1")
    # the other position is the first of its response: nothing stands before it
    assert panel(fig, "Least sure where").get_xlabel().startswith("\u201c\u2026 \u25a1")


def test_figure8_has_a_panel_a_threshold(drawn: dict[str, Figure]) -> None:
    fig = drawn["figure8"]
    assert len(fig.axes) == 4
    first, second = panel(fig, "(a)"), panel(fig, "(b)")
    assert "p75 (4e\u22123 nats)" in first.get_title(loc="left") and "0.6 nats" in second.get_title(loc="left")
    assert [p.get_height() for p in second.patches] == pytest.approx([100 * a for a in ACCURACIES])  # type: ignore[attr-defined]
    feet = [t.get_text() for t in second.texts if "of 24" in t.get_text()]
    assert feet == ["22\nof 24", "20\nof 24", "14\nof 24", "12\nof 24"]  # 24 responses each, to the nearest whole
    (theirs,) = [line for line in second.get_lines() if line.get_label() == "paper (counted)"]
    assert list(theirs.get_ydata()) == [75, 62.5, 12.5, 37.5]
    assert "paper (counted)" not in {line.get_label() for line in first.get_lines()}  # whose threshold is no nats
    over = [t.get_text() for t in second.texts if "p=" in t.get_text()]
    assert over == ["\u22125.0\np=0.75", "\u221230.0\np=0.75", "\u221240.0\np=0.75"]  # three comparisons at 0.25


def test_figure8_writes_nothing_over_anything_where_bars_are_low(tmp_path: Path) -> None:
    low = {"routing": [made.routing(tmp_path / "low", "0.6", (0.9, 0.2, 0.0, 0.0))]}
    policies = panel(draw(FIGURES["figure8"], low), "(a)")
    boxes = [text.get_window_extent() for text in policies.texts]
    assert len(boxes) == 4  # one in the first bar, one over each of the others
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_figure9_is_the_tables(studies: dict[str, list[Study]], drawn: dict[str, Figure]) -> None:
    fig, pair = drawn["figure9"], studies["pair"][0]
    errors = pair.table("derailment-shares")
    assert heights(panel(fig, "(b)")) == pytest.approx(100 * errors[errors["statistic"] == "error"]["value"].to_numpy())
    shares = pair.table("divergence-shares").dropna(subset=["threshold"])
    expected = [*shares[shares["pairs"] == "all"]["value"], *shares[shares["pairs"] == "derailed"]["value"]]
    expected += list(errors[errors["statistic"] == "low entropy"]["value"])
    assert heights(panel(fig, "(a)")) == pytest.approx([100 * value for value in expected])
    # all of the planted: responses part at a word, and go wrong at a digit that the reference is sure of
    assert errors.set_index("which").loc["wrong digit", "value"] == 1
    words = texts(fig).replace("\n", " ")
    ends = dict(pair.table("divergence-shares").query("threshold.isna()").set_index("pairs")[["lo", "hi"]].T)
    lo, hi = 100 * ends["derailed"]
    assert f"part; 25.0% [{lo:.1f}, {hi:.1f}] derail (BF16 right, NVFP4 wrong)" in words
    lo, hi = 100 * ends["reversed"]
    assert lo == 0 < hi and f"and 0.0% [0.0, {hi:.1f}] go the other way (BF16 wrong, NVFP4 right)" in words


def test_figure9_sets_the_transcripts_of_one_problem_side_by_side(
    studies: dict[str, list[Study]], drawn: dict[str, Figure], tmp_path: Path
) -> None:
    found = figure9.example(studies["noise"][0])
    assert found is not None
    sigma, frame = found
    assert sigma == 0.2 and list(frame.index) == ["none", "high", "low"]
    assert list(frame["response"]) == [
        f"So p3 costs $1 + 1 = {n} in {c}." for c, n in (("none", 2), ("high-0.2", 2), ("low-0.2", 3))
    ]
    words = [t for ax in drawn["figure9"].axes for t in ax.texts if t.get_fontfamily() == ["DejaVu Sans Mono"]]
    left = {round(t.get_position()[0]) for t in words if t.get_text() == "So"}
    assert len(left) == 3  # columns
    by_column = [[t for t in words if x <= t.get_position()[0] < x + figure9._COLUMNS] for x in sorted(left)]
    assert [" ".join(t.get_text() for t in column).replace(r"\$", "$") for column in by_column] == list(
        frame["response"]
    )
    grey = [[t.get_color() == style.GREY for t in column] for column in by_column]
    assert [sum(column) for column in grey] == [0, 9, 7]  # up to the condition's name, and up to the 3
    assert by_column[2][-1].get_color() == style.VERMILION and by_column[1][-1].get_color() == "black"
    # no such problem: one that is wrong with any noise will do, and of none the figure says so
    spoilt = made.noise(tmp_path / "spoilt", {("p2", 0): (True, False, False, 5), ("p4", 1): (True, True, True, 4)})
    other = figure9.example(spoilt)
    assert other is not None and "p2" in other[1].loc["none", "response"]
    firm = made.noise(tmp_path / "firm", {("p4", 1): (True, True, True, 4)})
    assert figure9.example(firm) is None
    assert "no answer that noise spoils" in texts(draw(figure9.build, studies | {"noise": [firm]}))


def test_values_stand_over_bars_too_low_to_be_seen(studies: dict[str, list[Study]], drawn: dict[str, Figure]) -> None:
    ax = panel(drawn["figure9"], "(a)")
    assert len(ax.texts) == len(heights(ax))
    for text, height in zip(ax.texts, heights(ax), strict=True):
        assert float(text.get_text()) == pytest.approx(height, abs=0.51 if height >= 10 else 0.05 * height)
        assert text.get_position()[1] > height


def test_what_a_short_study_lacks_is_said(studies: dict[str, list[Study]], tmp_path: Path) -> None:
    quiet = studies | {"pair": [made.pair(tmp_path / "quiet", wrong=(), more_than=10**6)]}
    assert "no response derailed" in texts(draw(figure9.build, quiet))
    words = texts(draw(figure2.build, quiet))
    assert "no such position" in words and "no token type is seen often enough" in words


def test_what_is_missing_is_named(studies: dict[str, list[Study]], tmp_path: Path) -> None:
    with pytest.raises(ReqatError, match="no study of kind 'noise'"):
        figure2.build({k: v for k, v in studies.items() if k != "noise"})
    made.conditions(tmp_path, [{"condition": "all-reference", "accuracy": 0.5, "touched": 0.0}])
    broken = made.study(tmp_path, "routing", "nats", made.TWO, threshold="0.6")
    with pytest.raises(ReqatError, match="no condition 'low-reference'"):
        figure8.build({"routing": [broken]})


# -- the examples ----------------------------------------------------------------------------------------------------
def test_examples_are_the_extremes_and_their_rows_are_the_files(tmp_path: Path) -> None:
    folder = made.traces(tmp_path, (2, 7, 9))
    parted = entropy.first_divergences(folder, made.REF, made.CAND)
    wrong = entropy.derailments(folder, made.REF, made.CAND)
    found = entropy.examples(folder, made.REF, made.CAND, parted, wrong)
    tokens = pq.read_table(tmp_path / "tokens.parquet").to_pandas()
    # planted: the rise of the wrong digit grows with the problem's number; the first word of problem 4 is least sure
    for name, problem, source, position in (("derailment", "p9", made.CAND, 5), ("high entropy", "p4", made.REF, 0)):
        rows = found[found["example"] == name]
        assert set(rows["problem"]) == {problem} and set(rows["position"]) == {position} and set(rows["seed"]) == {0}
        traces = folder.traces.set_index(["problem", "seed", "source"])["trace"]
        own = tokens[(tokens["trace"] == traces[problem, 0, source]) & (tokens["position"] == position)]
        row = own.iloc[0]
        for label in (made.REF, made.CAND):
            own = rows[rows["label"] == label].sort_values("rank")
            assert list(own["token"]) == [made.WORDS[i] for i in row[f"top_{label}"]]
            np.testing.assert_allclose(own["probability"], row[f"top_prob_{label}"])
        assert rows["entropy_reference"].iloc[0] == pytest.approx(float(row[f"entropy_{made.REF}"]))
    assert found[found["example"] == "derailment"]["context"].iloc[0] == " is 1 + 1 ="
    assert found[found["example"] == "derailment"]["taken"].iloc[0] == " 3"
    nothing = entropy.examples(folder, made.REF, made.CAND, parted.assign(entropy=np.nan), wrong.iloc[:0])
    assert nothing.empty and list(nothing.columns) == list(found.columns)


def test_top_tokens_beyond_the_end_are_refused(tmp_path: Path) -> None:
    folder = made.traces(tmp_path, ())
    with pytest.raises(IndexError, match="token"):
        folder.top_at(made.REF, folder.n_tokens)


def test_words() -> None:
    assert visible(" The") == "\u2423The" and visible("\n") == "\u21b5" and visible("$") == r"\$"
    assert [nats(x) for x in (0.0, 1.234, 0.0042, 2e-10)] == ["0", "1.2", "4e\u22123", "2e\u221210"]


def test_a_recipe_is_called_by_its_method() -> None:
    assert [method_words(r) for r in ("reqat-tq", "ft-ptq", "qat", "ft")] == ["ReQAT-TQ", "FT+PTQ", "QAT", "FT"]
