"""Figures 3, 5(b-e), 10(a) and 11(a), of studies with known numbers: what is drawn is what the files say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from analysis.figures import figure3, figure5b, figure10a, figure11a
from analysis.report import style
from analysis.report.studies import Study
from reqat.config.errors import ReqatError
from tests.analysis import study_folders as made
from tests.analysis.figures.test_figures import off_the_page, texts

LAYERS, TOKENS, CHANNELS, ALPHA, BETA = made.LAYERS, made.TOKENS, made.CHANNELS, made.ALPHA, made.BETA


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return made.keys(tmp_path_factory.mktemp("keys"))


STAGES = [
    {"kind": "finetune", "precision": "BF16", "tokens": 600_000, "skip_tokens": 0,
     "objective": [{"name": "nll", "weight": 1.0}]},
    {"kind": "qfit", "precision": made.CAND, "grid": 20, "sequences": 32, "sequence_tokens": 192},
    {"kind": "qat", "precision": f"{made.CAND}:kv_element=E1M2", "tokens": 200_000, "skip_tokens": 0,
     "objective": [{"name": "nll", "weight": 1.0}, {"name": "sem", "weight": 0.1}]},
]  # fmt: skip


@pytest.fixture
def overview(tmp_path: Path) -> Study:
    strip = pd.DataFrame(
        {
            "token": [" so", " 2", " *", " 4", " =", " 8"],
            "chosen": [False, False, False, True, False, False],
            "entropy": [1.3, 0.8, 0.5, 0.2, 0.2, 0.1],
            "weight": [0.0, 0.0, 0.6, 0.9, 0.9, 1.0],
            "p BF16": [0.1, 0.2, 0.3, 0.99, 0.5, 0.6],
            "p QAT": [0.1, 0.2, 0.3, 0.71, 0.5, 0.6],
            "p QAT with SEM": [0.1, 0.2, 0.3, 0.83, 0.5, 0.6],
        }
    )
    strip.to_csv(tmp_path / "strip.csv", index=False)
    precisions = {"bf16": made.REF, "qat": made.CAND, "sem": made.CAND}
    return made.study(tmp_path, "overview", "overview", precisions, stages=STAGES, percentile=0.75)


def said(fig: Figure) -> str:
    return " ".join(t.get_text().replace("\n", " ") for t in texts(fig))


def test_figure5b_shows_the_two_layers_of_the_rule(keys: Study) -> None:
    surfaces = keys.table("surfaces")
    with style.context():
        fig = figure5b.build({"keys": [keys]})
        assert off_the_page(fig) == []
    panels = [ax for ax in fig.axes if ax.get_xlabel()]
    assert [ax.images[0].get_array().shape for ax in panels] == [(TOKENS, CHANNELS), (TOKENS, CHANNELS), (4, 4)] * 2
    for row, layer in ((panels[:3], 3), (panels[3:], 1)):
        for ax, words in zip(row[:2], ("before RoPE", "after RoPE"), strict=True):
            rows = surfaces[(surfaces["layer"] == layer) & (surfaces["keys"] == words)]
            np.testing.assert_allclose(ax.images[0].get_array(), rows[[f"c{i}" for i in range(CHANNELS)]])
        assert f"layer {layer}, head 1" in row[0].get_ylabel()
        change = row[2].images[0].get_array()
        none = 1 + ALPHA[layer] ** 2 + 0.25
        assert change.min() == pytest.approx(100 * (1 / none - 1)) and change[0, 0] == 0
        point, theirs = row[2].get_lines()
        assert (point.get_xdata()[0], point.get_ydata()[0]) == (0.5, ALPHA[layer])
        choice = {3: (0.4, 0.0), 1: (0.05, 0.85)}[layer]  # the paper's smallest and largest scale exponent
        assert (theirs.get_xdata()[0], theirs.get_ydata()[0]) == choice
    assert "read off, best (α, β): layer 13 (0, 0.4); layer 1 (0.85, 0.05)" in said(fig)
    assert "ReQAT-TQ" in said(fig) and "Tier synthetic" in said(fig)


def test_figure10a_draws_profiles_of_layers_from_first_to_last(keys: Study) -> None:
    assert figure10a.shown_layers(48) == [0, 16, 31, 47] and figure10a.shown_layers(2) == [0, 1]
    layers = figure10a.shown_layers(LAYERS)
    with style.context():
        fig = figure10a.build({"keys": [keys]})
        assert off_the_page(fig) == []
    axes = np.array(fig.axes).reshape(3, len(layers))
    for column, layer in zip(axes.T, layers, strict=True):
        for ax, size in ((column[0], CHANNELS), (column[1], TOKENS)):
            x, y = ax.get_lines()[0].get_data()
            assert list(x) == list(range(size)) and list(y) == pytest.approx(
                [1 + layer + i / size for i in range(size)]
            )
            assert ax.get_ylim()[0] == 0 and ax.get_ylim()[1] > LAYERS  # of the last layer
        assert list(column[0].get_lines()[1].get_xdata()) == [CHANNELS / 2] * 2
        point, theirs = column[2].get_lines()
        assert (point.get_xdata()[0], point.get_ydata()[0]) == (BETA[layer], ALPHA[layer])
    first, last = (axes[2, i].get_lines()[1] for i in (0, -1))
    assert (first.get_label(), *first.get_xydata()[0]) == ("paper (read off), layer 0", 0.35, 0.35)
    assert (last.get_label(), *last.get_xydata()[0]) == ("paper (read off), layer 47", 0.4, 0.2)
    assert "layer 47 (0.2, 0.4)" in said(fig) and "its maps show 20 x 10" in said(fig)


def test_figure11a_shows_inputs_as_they_are_and_rotated(keys: Study) -> None:
    data = keys.table("inputs")
    with style.context():
        fig = figure11a.build({"keys": [keys]})
        assert off_the_page(fig) == []
    panels = [ax for ax in fig.axes if ax.get_xlabel()]
    for ax, words, largest in zip(panels, ("before", "after"), ("31", "5.5"), strict=True):
        rows = data[data["inputs"] == f"{words} rotation"]
        np.testing.assert_allclose(ax.images[0].get_array(), rows[[f"d{32 + i}" for i in range(64)]])
        assert ax.images[0].get_extent() == [31.5, 95.5, 14.5, 4.5]
        assert ax.get_title(loc="left").endswith(f"at most {largest}")
        assert ax.get_xlabel() == "input of layers.2.mlp.down_proj"


def test_figure3_draws_the_stages_and_the_position(overview: Study) -> None:
    with style.context():
        fig = figure3.build({"overview": [overview]})
        assert off_the_page(fig) == []
    boxes, weights, bars = fig.axes
    assert [bar.get_height() for bar in weights.patches] == [0.0, 0.0, 0.6, 0.9, 0.9, 1.0]
    assert [bar.get_facecolor() == weights.patches[3].get_facecolor() for bar in weights.patches].count(True) == 1
    assert [bar.get_height() for bar in bars.patches] == [0.99, 0.71, 0.83]
    assert [t.get_text() for t in weights.get_xticklabels()][3] == "\u24234\n0.2"
    words = [t.get_text() for t in boxes.texts]
    assert [w for w in words if w.startswith("Stage")] == ["Stage 1: fine-tuning", "Stage 1.5: Q-FIT", "Stage 2: QAT"]
    assert "BF16\n600K tokens\nloss: NLL" in words
    assert f"{made.CAND}\nthe first 200K tokens\nof the same traces\nloss: NLL + 0.1 SEM" in words
    assert any("20 x 20 points a layer\non 32 x 192 tokens" in w for w in words)
    different = STAGES[2] | {"skip_tokens": 600_000}
    assert "same traces" not in " ".join(figure3.stage_words(different))
    strip = overview.table("strip")
    strip.assign(chosen=False).to_csv(overview.path / "strip.csv", index=False)
    with pytest.raises(ReqatError, match="marks 0 tokens as chosen"):
        figure3.build({"overview": [overview]})
