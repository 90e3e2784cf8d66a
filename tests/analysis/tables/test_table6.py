"""Accuracy by response length, against the rows themselves."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest

from analysis.report import paper
from analysis.report.cells import Results
from analysis.report.document import Table
from analysis.tables.table6 import build
from tests.analysis.report.test_document import check_latex

COMPARED = ["Baseline", "FT", "PTQ", "FT+PTQ", "QAT", "ReQAT-TQS"]


@pytest.fixture(scope="module")
def by_length(results: Results) -> Table:
    return build(results)


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
