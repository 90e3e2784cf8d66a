"""The table of the claims: every difference computed anew, p-values adjusted within their block."""

from __future__ import annotations

import dataclasses
import io
from dataclasses import replace

import pandas as pd
import pytest

from analysis.report import verdicts
from analysis.report.cells import Results
from analysis.report.claims import CLAIMS
from analysis.tables import claims
from analysis.tables.claims import build
from reqat.evaluation.statistics import holm


def test_claims_table(results: Results) -> None:
    table = build(results)
    data = pd.read_csv(io.StringIO(table.csv()), keep_default_na=False, na_values=[""])
    primary = data[data["block"] == "primary"]
    # Table 4's artifact has the control on other traces at MXFP4-W4A16 alone.
    assert primary["claim"].tolist() == [c.name for c in CLAIMS if c.main and "traces" not in c.name]
    assert primary["p_holm"].tolist() == pytest.approx(holm([*primary["p"], 1.0])[:4])
    for block, group in data.groupby("block"):
        tested = group[group["p"].notna()]
        size = verdicts.family_size(results, "testbed", str(block))
        assert len(tested) <= size and set(tested["comparisons"]) <= {size}
        assert tested["p_holm"].tolist() == pytest.approx(holm(tested["p"].tolist(), comparisons=size)), block
    row = primary[primary["claim"] == "ReQAT-TQS above QAT"].iloc[0]
    entries = {(e.precision, e.method, e.multiple): e for e in results.of("table1")}
    a, b = (entries["NVFP4-W4A4KV4", m, 3] for m in ("ReQAT-TQS", "QAT"))
    assert row["difference"] == pytest.approx(100 * (results.estimate(a).value - results.estimate(b).value))
    assert row["verdict"] == "agrees" and row["training_seeds"] == "0 1 2"
    assert row["evaluations_b"].split() == [c.evaluation for c in b.cells]
    assert len(verdicts.tested(results)) == len(data)
    # Table 1's seven at three precisions and Table 4's, at three totals; FT+PTQ once more at NVFP4-W4A16.
    # The seven at every total, the others at the one that claims rest on.
    every = {c.name for c in CLAIMS if c.every_budget}
    assert set(data.loc[data["multiple"].isin([2, 4]), "claim"]) == every - {"soft mask above binary"}
    assert len(data[data["claim"].isin(every)]) == 3 * 3 * 7 + 3 + 1
    untested = data["verdict"].isin(["one training seed", "no direction", "at the floor"])
    assert (data["detectable"].isna() == untested).all() and (data["p_holm"].isna() == untested).all()
    assert (data["lo"] < data["hi"]).all(), "differences and intervals are there, tested or not"
    # A number of the paper stands at its own precision alone.
    traces = data[data["claim"] == "same traces above different"]
    assert set(traces["precision"]) == {"MXFP4-W4A16"} and traces["paper_mean"].notna().all()
    assert (data["paper_mean"].notna() & data["paper_of"].notna()).sum() == 0


def test_tokens_are_those_of_the_side_that_trains(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    found = verdicts.tested(results)[0]
    idle = dataclasses.replace(found, a=tuple(dataclasses.replace(e, total_tokens=None) for e in found.a))
    monkeypatch.setattr("analysis.tables.claims.tested", lambda _: [idle])
    data = pd.read_csv(io.StringIO(build(results).csv()))
    assert found.b[0].total_tokens and data["total_tokens"].tolist() == [found.b[0].total_tokens]


def test_a_number_of_another_precision_is_left_out_and_that_precision_named(results: Results) -> None:
    table = build(results)
    heads = [column.name for column in table.columns]
    cells = [dict(zip(heads, row, strict=True)) for section in table.sections for row in section]
    (far,) = [c for c in cells if c["Claim"].text == "FT+PTQ below BF16 FT" and c["Precision"].text == "NVFP4-W4A16"]
    assert far["mean (points)"].text == "\u2013" and far["Verdict"].text == "no direction"
    assert any("Holm" in note and "primary 5" in note for note in table.footer)


def test_the_total_is_that_of_the_side_that_trains(results: Results) -> None:
    t = next(t for t in verdicts.tested(results) if t.b[0].total_tokens)
    untrained = next(e for e in results.of("table1") if e.recipe == "ptq")
    row = claims._row(results, replace(t, a=(untrained,)))
    assert row["total_tokens"] == t.b[0].total_tokens
