"""ReSET's table, of a study with known outcomes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from analysis.report.document import Table
from analysis.tables.reset import build
from reqat.config.errors import ReqatError
from tests.analysis import study_folders
from tests.analysis.report.test_document import check_latex


@pytest.fixture(scope="module")
def ablation(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return build({"reset": [study_folders.reset(tmp_path_factory.mktemp("studies") / "reset")]})


def test_reset_blocks_are_the_model_its_controls_and_bf16(ablation: Table) -> None:
    lines = [[(row[0].text, row[1].text) for row in section] for section in ablation.sections]
    quantized = study_folders.CAND
    assert lines == [
        [
            (quantized, "T 0.6, top-p 0.95"),
            (quantized, "ReSET, T 0.3 or 1, tau0 0.05 nats"),
            (quantized, "ReSET, T 0.1 or 1, tau0 0.05 nats"),
        ],
        [(quantized, "greedy")],
        [("BF16", "T 0.6, top-p 0.95")],
    ]


def test_reset_numbers(ablation: Table) -> None:
    plain, warm = ablation.sections[0][:2]
    assert (plain[2].text, plain[2].detail, plain[3].text) == ("50.0", "[40.0, 55.0]", "\u2013")
    assert (warm[3].text, warm[3].detail) == ("+12.5", "[+2.5, +22.5], p=0.084")  # the second of three: twice 0.0421
    assert (warm[4].text, warm[5].text) == ("40.5", "12.5")  # three of 24 responses cut off
    greedy = ablation.sections[1][0]
    assert (greedy[3].text, greedy[5].text) == ("\u2013", "25.0")  # other seeds: no pairs; three of 12 cut off
    # what the paper reports stands beside the line that it is about, and nowhere else
    assert [c.text for c in plain[6:]] == ["39.6", "52.4", "62.5", "70.4", "74.4"]
    assert [c.text for c in warm[6:]] == ["43.8", "54.0", "64.9", "72.1", "77.5"]
    rest = [ablation.sections[0][2], greedy, ablation.sections[2][0]]
    assert {c.text for row in rest for c in row[6:]} == {"\u2013"}
    measured = ablation.data[ablation.data["source"] == "measured"].set_index("condition")
    assert measured.loc["bf16", "difference"] == pytest.approx(25) and measured.loc["bf16", "precision"] == "BF16"
    assert measured["p_holm"].dropna().to_dict() == pytest.approx({"reset": 0.0842, "reset-0.1": 0.5, "bf16": 3e-4})
    assert measured.loc["reset", "p"] == 0.0421 and np.isnan(measured.loc["quantized", "p"])


def test_reset_says_what_it_rests_on(ablation: Table) -> None:
    words = " ".join(ablation.footer)
    for part in (
        "Tier synthetic",
        "12 problems, 2 sampling seeds",
        "fake-quantized, CPU",
        "2,903 tokens of 20 held-out",
    ):
        assert part in words
    check_latex(ablation.latex(), len(ablation.columns))


def test_a_study_without_the_plain_model_is_refused(tmp_path: Path) -> None:
    study_folders.conditions(tmp_path, [{"condition": "reset", "accuracy": 0.5}])
    broken = study_folders.study(tmp_path, "reset", "reset", {"quantized": "NVFP4-W4A4KV4", "reference": "BF16"})
    with pytest.raises(ReqatError, match="no condition 'quantized'"):
        build({"reset": [broken]})
    with pytest.raises(ReqatError, match="no study of kind 'reset'"):
        build({})
