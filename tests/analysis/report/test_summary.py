"""The claims over all models: which test stands for a claim, and what several verdicts come to."""

from __future__ import annotations

from dataclasses import replace

import pytest

from analysis.report import summary, verdicts
from analysis.report.cells import Results
from analysis.report.claims import CLAIMS
from reqat.config.errors import ReqatError


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (["agrees", "agrees"], "reproduced"),
        (["agrees", "inconclusive", "inconclusive"], "reproduced (1 of 3)"),
        (["disagrees", "inconclusive"], "not reproduced"),
        (["disagrees", "agrees"], "depends on the model"),
        (["inconclusive", "no direction"], "inconclusive"),
        (["no direction"], "no direction"),
    ],
)
def test_inconclusive_models_decide_nothing(given: list[str], word: str) -> None:
    assert summary.overall(given) == word


def test_a_claim_stands_for_its_primary_test(results: Results) -> None:
    (run,) = summary.tests_of(results, "results/x")
    other = replace(run, heading="other", by_claim={k: v for k, v in run.by_claim.items() if "traces" in k})
    table = summary.build([run, other])
    found = verdicts.tested(results)
    assert list(dict.fromkeys(table.data["claim"])) == [c.name for c in CLAIMS if c.name in run.by_claim]
    assert set(table.data["claim"]) == {t.claim.name for t in found}
    for name, t in run.by_claim.items():
        same = [other for other in found if other.claim.name == name]
        assert t.primary == any(s.primary for s in same)
        if any(s.precision == "NVFP4-W4A4KV4" and s.multiple == 3 for s in same):
            assert t.precision == "NVFP4-W4A4KV4"
    row = table.data[(table.data["claim"] == "ReQAT-TQS above QAT")].iloc[0]
    expected = next(t for t in found if t.primary and t.claim.name == "ReQAT-TQS above QAT")
    assert (row["difference"], row["p_holm"], row["training_seeds"]) == (expected.value, expected.holm, 3)
    assert row["overall"] == "reproduced" and len(table.data[table.data["model"] == "other"]) == len(other.by_claim)
    assert len(table.sections[0]) == sum(c.main for c in CLAIMS) and table.latex()


def test_without_a_claim_there_is_no_table() -> None:
    with pytest.raises(ReqatError, match="reqat pin"):
        summary.build([])
