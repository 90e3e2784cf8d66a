"""Figures 4 and 7: every number drawn is one of the study's files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from analysis.figures.figure4 import build as figure4
from analysis.figures.figure4 import looks
from analysis.figures.figure7 import build as figure7
from analysis.figures.figure7 import smoothed
from analysis.report import style
from analysis.report.studies import Study
from reqat.config.errors import ReqatError
from tests.analysis import study_folders as made
from tests.analysis.study_folders import study

LABELS, FP4 = made.LABELS, made.CAND


@pytest.fixture
def dynamics(tmp_path: Path) -> Study:
    return made.dynamics(tmp_path / "dynamics")


@pytest.fixture
def gradients(tmp_path: Path) -> Study:
    rng = np.random.default_rng(1)
    rows = []
    for step in range(0, 300, 5):
        for threshold, share in (("percentile 25", 0.25), ("percentile 75", 0.75), ("0.6 nats", 0.8)):
            c = share * rng.uniform(0.5, 1.0)
            rows.append(
                {"step": step, "steps": 300, "threshold": threshold, "nats": 0.1, "c_low": c, "lo": c - 0.05}
                | {"hi": c + 0.05, "c_high": 1 - c, "low_share": share, "low_tokens": 10, "tokens": 40, "clusters": 4}
            )
    folder = tmp_path / "gradients"
    folder.mkdir()
    pd.DataFrame(rows).to_csv(folder / "gradients.csv", index=False)
    made = study(folder, "gradients", "gradients", {"model": FP4}, model={"recipe": "qat", "precision": FP4})
    made.record["metrics"] = {"steps": 300, "every": 5, "looks": 60, "same_weights": True}
    return made


def words(fig) -> str:
    return " ".join(text.get_text() for text in fig.findobj(lambda a: hasattr(a, "get_text")))


def test_figure4_draws_every_value_with_its_interval(dynamics: Study) -> None:
    data = dynamics.table("dynamics")
    with style.context():
        fig = figure4({"dynamics": [dynamics]})
    change, over_qat, paper, over_base = fig.axes
    for ax, statistic in ((change, "change"), (over_base, "normalized")):
        drawn = {container.get_label(): container for container in ax.containers}
        assert set(drawn) == set(LABELS)
        for label in LABELS:
            part = data[(data["label"] == label) & (data["statistic"] == statistic)]
            points, _, (bars,) = drawn[label]
            np.testing.assert_allclose(points.get_ydata(), part["value"])
            np.testing.assert_allclose([s[:, 1] for s in bars.get_segments()], part[["lo", "hi"]])
            assert (np.round(points.get_xdata()) == part["bin"]).all()
        low, high = ax.get_ylim()
        assert low < data.loc[data["statistic"] == statistic, "lo"].min()
        assert high > data.loc[data["statistic"] == statistic, "hi"].max()
    ratios = data[data["statistic"] == "normalized"].set_index(["label", "bin"])["value"]
    for label in LABELS:
        (ours,) = [line for line in over_qat.get_lines() if line.get_label() == label]
        np.testing.assert_allclose(ours.get_ydata(), ratios[label] / ratios["QAT"])
    same = next(line for line in over_qat.get_lines() if "same, paper (read off)" in str(line.get_label()))
    assert list(same.get_ydata()) == [0.57, 0.92, 0.98, 1.0]
    assert list(same.get_xdata()) == [0, 1, 2, 3]  # in the middle of our bins, of which there are as many
    assert list(paper.get_lines()[0].get_ydata()) == [0.0022, 0.0242, 0.166, 0.304]
    said = words(fig)
    assert "1,006 tokens" in said and "40 validation problems" in said
    assert "BF16: base, FT; NVFP4-W4A4KV4: QAT" in said.replace("\n", " ")


def test_growing_budgets_stand_in_the_first_panel_alone_darker_for_larger_ones(tmp_path: Path) -> None:
    budgets = ["FT 4 + QAT 4", "FT 4 + QAT 0.5", "FT 4 + QAT 1"]
    several = made.dynamics(tmp_path / "several", [*LABELS, *budgets])
    with style.context():
        change, over_qat, _, over_base = figure4({"dynamics": [several]}).axes
    drawn = {container.get_label(): container.lines[0] for container in change.containers}
    assert set(drawn) == {*LABELS, *budgets}
    assert drawn[budgets[1]].get_alpha() < drawn[budgets[2]].get_alpha() < drawn[budgets[0]].get_alpha()
    others = {line.get_label() for line in over_qat.get_lines()} | {c.get_label() for c in over_base.containers}
    assert set(LABELS) <= others and not others & set(budgets)


def test_models_look_different_and_like_their_methods() -> None:
    drawn = looks([*LABELS, "FT rounded", "something new"])
    assert len({(look["color"], look["marker"]) for look in drawn.values()}) == len(drawn)
    for label, method in (
        ("FT", "FT"),
        ("QAT", "QAT"),
        ("FT+QAT same traces", "ReQAT-T"),
        ("ReQAT-TQS", "ReQAT-TQS"),
        ("FT rounded", "FT+PTQ"),
    ):
        assert drawn[label] == style.line(method)
    with pytest.raises(ReqatError, match="fewer models"):
        looks([f"model {i}" for i in range(10)])


def test_figure7_draws_windows_of_looks_beside_the_share_of_tokens(gradients: Study) -> None:
    data = gradients.table("gradients")
    with style.context():
        fig = figure7({"gradients": [gradients]})
    left, right = fig.axes
    for threshold, name in (("percentile 25", "below the 25th percentile"), ("0.6 nats", "below 0.6 nats")):
        part = data[data["threshold"] == threshold].sort_values("step")
        mean = part["c_low"].to_numpy().reshape(20, 3).mean(1)
        line = next(line for line in left.lines if line.get_label() == name)
        np.testing.assert_allclose(line.get_ydata(), 100 * mean)
        np.testing.assert_allclose(line.get_xdata(), part["step"].to_numpy().reshape(20, 3).mean(1))
        ratio = next(other for other in right.lines if other.get_color() == line.get_color())
        np.testing.assert_allclose(ratio.get_ydata(), mean / part["low_share"].iloc[0])
        colour = to_rgb(line.get_color())
        band = next(band for band in right.collections if to_rgb(band.get_facecolor()[0]) == colour)
        ends = band.get_datalim(right.transData).intervaly
        half = 0.05 / np.sqrt(3)
        np.testing.assert_allclose(
            ends, [(mean.min() - half) / part["low_share"].iloc[0], (mean.max() + half) / part["low_share"].iloc[0]]
        )
        assert any(np.allclose(other.get_ydata(), 100 * part["low_share"].iloc[0]) for other in left.lines[:-1])
    assert "bit-identical" in words(fig)
    gradients.record["metrics"]["same_weights"] = False
    with style.context():
        assert "differ from" in words(figure7({"gradients": [gradients]}))


def test_figure7_draws_every_threshold_of_the_file_and_misses_none(gradients: Study) -> None:
    data = gradients.table("gradients")
    further = data[data["threshold"] == "0.6 nats"].assign(threshold="1.5 nats")
    pd.concat([data, further]).to_csv(gradients.path / "gradients.csv", index=False)
    with style.context():
        left = figure7({"gradients": [gradients]}).axes[0]
    assert [line.get_label() for line in left.lines if line.get_label().startswith("below")] == [
        "below the 25th percentile",
        "below the 75th percentile",
        "below 0.6 nats",
        "below 1.5 nats",
    ]
    data[data["threshold"] != "percentile 75"].to_csv(gradients.path / "gradients.csv", index=False)
    with style.context(), pytest.raises(ReqatError, match="'percentile 75'"):
        figure7({"gradients": [gradients]})


def test_few_looks_keep_their_own_intervals(gradients: Study) -> None:
    part = gradients.table("gradients").query("threshold == 'percentile 25'").head(7)
    curve = smoothed(part)
    np.testing.assert_allclose(curve[["step", "c_low", "lo", "hi"]], part[["step", "c_low", "lo", "hi"]])


def test_a_window_of_looks_has_the_half_width_of_their_mean(gradients: Study) -> None:
    part = gradients.table("gradients").query("threshold == 'percentile 75'")
    curve = smoothed(part)  # 60 looks in windows of 3, each 0.05 on either side
    np.testing.assert_allclose((curve["hi"] - curve["lo"]) / 2, 0.05 / np.sqrt(3))


def test_bands_near_the_ends_are_as_wide_as_elsewhere_and_cut_only_when_drawn(gradients: Study) -> None:
    data = gradients.table("gradients")
    top = data["threshold"] == "0.6 nats"
    data.loc[top, ["c_low", "lo", "hi"]] = [0.99, 0.94, 1.04]
    bottom = data["threshold"] == "percentile 25"
    data.loc[bottom, ["c_low", "lo", "hi"]] = [0.02, -0.03, 0.07]
    data.to_csv(gradients.path / "gradients.csv", index=False)
    half = 0.05 / np.sqrt(3)
    for which, value in ((top, 0.99), (bottom, 0.02)):
        curve = smoothed(data[which])
        np.testing.assert_allclose(curve[["lo", "hi"]], [[value - half, value + half]] * 20)
    with style.context():
        left = figure7({"gradients": [gradients]}).axes[0]
    drawn = np.concatenate([path.vertices[:, 1] for band in left.collections for path in band.get_paths()])
    assert drawn.min() == 0 and drawn.max() == 100


def test_a_window_with_an_unknown_interval_has_no_band(gradients: Study) -> None:
    part = gradients.table("gradients").query("threshold == 'percentile 75'").sort_values("step").copy()
    part.iloc[4, part.columns.get_indexer(["lo", "hi"])] = np.nan  # a micro-batch of a single trace, in window 1
    curve = smoothed(part)
    assert curve["lo"].isna().tolist() == curve["hi"].isna().tolist() == [i == 1 for i in range(20)]
    assert curve["c_low"].notna().all()


def test_without_their_studies_there_is_nothing_to_draw() -> None:
    for figure, kind in ((figure4, "dynamics"), (figure7, "gradients")):
        with pytest.raises(ReqatError, match=kind):
            figure({})


def test_files_are_the_same_bytes_each_time(dynamics: Study, gradients: Study, tmp_path: Path) -> None:
    for figure, kind, one in ((figure4, "dynamics", dynamics), (figure7, "gradients", gradients)):
        files = []
        for run in ("a", "b"):
            with style.context():
                files.append([p.read_bytes() for p in style.save(figure({kind: [one]}), tmp_path / run, kind)])
        assert files[0] == files[1]
