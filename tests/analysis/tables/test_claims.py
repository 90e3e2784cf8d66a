"""The table of the claims: every difference computed anew, p-values adjusted within their block."""

from __future__ import annotations

import io

import pandas as pd
import pytest

from analysis.report import verdicts
from analysis.report.cells import Results
from analysis.report.claims import CLAIMS
from analysis.tables.claims import build
from reqat.evaluation.statistics import holm


def test_claims_table(results: Results) -> None:
    data = pd.read_csv(io.StringIO(build(results).csv()), keep_default_na=False, na_values=[""])
    primary = data[data["block"] == "primary"]
    assert primary["claim"].tolist() == [c.name for c in CLAIMS if c.main]
    assert primary["p_holm"].tolist() == pytest.approx(holm(primary["p"].tolist()))
    for block, group in data.groupby("block"):
        assert group["p_holm"].tolist() == pytest.approx(holm(group["p"].tolist())), block
    row = primary[primary["claim"] == "ReQAT-TQS above QAT"].iloc[0]
    entries = {(e.precision, e.method, e.multiple): e for e in results.of("table1")}
    a, b = (entries["NVFP4-W4A4KV4", m, 3] for m in ("ReQAT-TQS", "QAT"))
    assert row["difference"] == pytest.approx(100 * (results.estimate(a).value - results.estimate(b).value))
    assert row["verdict"] == "agrees" and row["training_seeds"] == "0 1 2"
    found = verdicts.tested(results)
    assert len(found) == len(data)
    # Table 1's seven at three precisions and Table 4's, at three totals; FT+PTQ once more at NVFP4-W4A16.
    # The eight of Tables 1 and 4 at every total, the others at the one that claims rest on.
    every = {c.name for c in CLAIMS if c.every_budget}
    assert set(data.loc[data["multiple"].isin([2, 4]), "claim"]) == every - {"PTQ below the BF16 base"}
    assert len(data[data["claim"].isin(every) & data["multiple"].notna()]) == 3 * 3 * 7 + 3 + 1
    assert (data["detectable"] > 0).all()
