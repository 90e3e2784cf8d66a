"""Accuracy by response length against the rows themselves, and ReSET's table against a study with known outcomes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.report import paper
from analysis.report.cells import Results
from analysis.report.document import Table
from analysis.tables._grid import table6
from analysis.tables.reset import reset
from reqat.config.errors import ReqatError
from tests.analysis import study_folders
from tests.analysis.report.test_document import check_latex

COMPARED = ["Baseline", "FT", "PTQ", "FT+PTQ", "QAT", "ReQAT-TQS"]


# -- accuracy by response length -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def by_length(results: Results) -> Table:
    return table6(results)


def rows_of(results: Results, evaluations: str) -> pd.DataFrame:
    folders = [results.root / "evaluations" / id for id in evaluations.split()]
    return pd.concat([pd.read_parquet(folder / "outcomes.parquet") for folder in folders], ignore_index=True)


def test_bins_cover_every_response_once_and_hold_what_the_outcomes_say(results: Results, by_length: Table) -> None:
    data = by_length.data[by_length.data["source"] == "measured"]
    assert list(dict.fromkeys(data["method"])) == COMPARED
    everything = []
    for evaluations, group in data.groupby("evaluations"):
        rows = rows_of(results, str(evaluations))
        everything.append(rows["n_tokens"])
        assert group["n_responses"].sum() == len(rows)
        for row in group.itertuples():
            inside = rows[(rows["n_tokens"] >= row.tokens_lo) & (rows["n_tokens"] <= row.tokens_hi)]
            assert len(inside) == row.n_responses and inside["problem_id"].nunique() == row.n_problems
            assert row.value == pytest.approx(100 * inside["correct"].mean())
            assert row.unfinished == pytest.approx(1 - inside["finished"].mean())
            assert row.lo <= row.value <= row.hi
    pooled = pd.concat(everything)
    ends = sorted(set(data["tokens_hi"]))
    assert len(ends) == 4 and ends[-1] == pooled.max() and min(data["tokens_lo"]) == pooled.min()
    for end, quantile in zip(ends, (0.25, 0.5, 0.75, 1), strict=True):
        assert np.mean(pooled < end) < quantile <= np.mean(pooled <= end)


def test_the_paper_stands_beside_and_says_how_many(by_length: Table) -> None:
    theirs = [i for i, column in enumerate(by_length.columns) if column.group.startswith("Paper")]
    lines = {row[1].text: row for section in by_length.sections for row in section}
    assert [by_length.columns[i].name for i in theirs] == ["0-8K", "8-16K", "16-24K", "24-32K"]
    last = lines["ReQAT-TQS"][theirs[-1]]
    (reported,) = paper.select("table6", method="ReQAT", response_tokens="24-32K")
    assert (last.text, last.detail) == (f"{reported.value:.1f}", f"n={reported.condition['n']}")
    paper_rows = by_length.data[by_length.data["source"] == "paper"]
    assert len(paper_rows) == len(paper.select("table6")) and set(paper_rows["precision"]) == {"BF16", "NVFP4-W4A4KV4"}


def test_its_three_forms_can_be_read(by_length: Table) -> None:
    check_latex(by_length.latex(), len(by_length.columns))
    assert len(pd.read_csv(io.StringIO(by_length.csv()))) == len(by_length.data)
    assert "testbed: " in by_length.markdown()


# -- ReSET -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def ablation(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return reset({"reset": [study_folders.reset(tmp_path_factory.mktemp("studies") / "reset")]})


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
        reset({"reset": [broken]})
    with pytest.raises(ReqatError, match="no study of kind 'reset'"):
        reset({})
