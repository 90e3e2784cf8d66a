"""The paper's comparisons: its own differences, and what a measured one says of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
from scipy import stats

from analysis.report import verdicts
from analysis.report.cells import Results
from analysis.report.claims import CLAIMS
from analysis.report.verdicts import paper_differences
from reqat.evaluation.means import minus


def test_paper_differences_from_the_numbers() -> None:
    by_name = {c.name: c for c in CLAIMS}
    assert paper_differences(by_name["ReQAT-TQS reaches BF16 FT"], "NVFP4-W4A4KV4") == pytest.approx(
        [-3.91, 0.11, -1.09, 0.84]
    )
    assert paper_differences(by_name["same traces above different"], "MXFP4-W4A16") == pytest.approx(
        [1.05, 3.76, 2.81, 4.69]
    )
    assert paper_differences(by_name["ReQAT-T above QAT"], "NVFP4-W4A4") == ()
    # One side has no budget: it stands against each of the other's.
    assert paper_differences(by_name["BF16 FT above the base"], "BF16") == pytest.approx(
        [value - 56.83 for value in (63.70, 64.17, 65.46, 64.79)]
    )
    # Means over metrics, and what is lost beyond another task.
    assert paper_differences(by_name["SEM weight 0.1 above 0.5"], "NVFP4-W4A4KV4") == pytest.approx(
        [74.11 - 74.01], abs=0.02
    )
    beyond = by_name["PTQ costs reasoning more than knowledge"]
    assert paper_differences(beyond, "NVFP4-W4A4KV4") == pytest.approx([-6.7 + 2.84], abs=0.05)


@pytest.mark.parametrize(
    ("kind", "value", "lo", "hi", "adjusted", "theirs", "verdict"),
    [
        ("direction", 5.0, 2.0, 8.0, 0.01, (3.0, 4.0), "agrees"),
        ("direction", -5.0, -8.0, -2.0, 0.01, (3.0, 4.0), "disagrees"),
        ("direction", -5.0, -8.0, -2.0, 0.01, (-3.0,), "agrees"),
        ("direction", 5.0, -1.0, 11.0, 0.06, (3.0,), "inconclusive"),
        ("direction", 5.0, 2.0, 8.0, math.nan, (3.0,), "inconclusive"),
        ("direction", 5.0, 2.0, 8.0, 0.01, (0.0, 0.84, -1.57, 0.42), "no direction"),
        ("direction", 5.0, 2.0, 8.0, 0.01, (), "no direction"),
        ("parity", -1.0, -2.9, 1.0, 0.9, (0.0,), "agrees"),
        ("parity", -1.0, -3.1, 1.0, 0.9, (0.0,), "inconclusive"),  # a large p alone shows nothing
        ("parity", -6.0, -9.0, -3.1, 0.001, (0.0,), "disagrees"),
        ("parity", 4.0, 1.0, 7.0, 0.001, (0.0,), "agrees"),
        ("no gain", 2.0, 1.0, 2.9, 0.001, (0.9,), "agrees"),  # a gain too small to matter
        ("no gain", -5.0, -9.0, -1.0, 0.001, (0.9,), "agrees"),
        ("no gain", 2.0, 1.0, 3.1, 0.9, (0.9,), "inconclusive"),
        ("no gain", 6.0, 3.1, 9.0, 0.9, (0.9,), "disagrees"),
    ],
)
def test_verdicts(
    kind: str,
    value: float,
    lo: float,
    hi: float,
    adjusted: float,
    theirs: tuple[float, ...],
    verdict: str,
    results: Results,
) -> None:
    claim = next(c for c in CLAIMS if c.kind == kind)
    entry = results.entries[0]
    made = verdicts.Tested(claim, "m", "NVFP4-W4A4KV4", 2, True, entry, entry, value, lo, hi, 0.01, theirs, adjusted)
    assert made.verdict == verdict


def test_every_printed_side_is_in_the_papers_numbers() -> None:
    for claim in CLAIMS:
        if claim.printed is None:
            continue
        where = claim.a.precision if claim.a.precision in ("BF16", "NVFP4-W4A4KV4") else "NVFP4-W4A4KV4"
        found = paper_differences(claim, where)
        assert found and not any(math.isnan(value) for value in found), claim.name
        # The name says the direction that the numbers have, in all or all but one of them.
        word = re.search(r"\b(above|below)\b", claim.name)
        if claim.kind == "direction" and word and claim.name != "ReQAT-TQS above ReQAT-TQ":
            sign = 1 if word[0] == "above" else -1
            assert sum(value * sign > 0 for value in found) >= len(found) - 1, claim.name


def test_a_claim_is_tested_where_a_plan_has_both_sides(make_results: Callable[..., Results]) -> None:
    results = make_results(
        models={"testbed": {"source": "pinned", "artifacts": ["claims-rows", "table4", "table16", "table15"]}},
        evaluation={"n": 60, "seeds": [0, 1]},
    )
    found = verdicts.tested(results)
    names = {(t.claim.name, t.precision) for t in found}
    assert {("same traces above different", p) for p in ("NVFP4-W4A4KV4", "MXFP4-W4A16")} <= names
    assert ("SEM weight 0.1 above 0.5", "NVFP4-W4A4KV4") in names and ("QAD below QAT", "NVFP4-W4A4KV4") in names
    # Greedy rows of Table 15 are other measurements, and never a side.
    graded = {c.evaluation for t in found for e in (t.a, t.b) for c in e.cells}
    assert not any(results.plan.evaluation(id).decoding.greedy for id in graded)
    primary = {t.claim.name: t.precision for t in found if t.primary}
    assert primary == {c.name: "NVFP4-W4A4KV4" for c in CLAIMS if c.main}
    assert len(found) == len({(t.claim.name, t.precision, t.multiple) for t in found}), "each once, whatever shows it"
    for t in found:
        block = [other for other in found if other.block == t.block]
        quantiles = stats.t.ppf([1 - 0.05 / len(block) / 2, 0.8], t.df)
        assert t.detectable == pytest.approx(t.std_error * quantiles.sum())


def test_reasoning_against_knowledge_is_a_difference_of_differences(results: Results) -> None:
    entries = {(e.precision, e.method, e.multiple): e for e in results.of("table1")}
    base, ptq, ft = entries["BF16", "Baseline", None], entries["NVFP4-W4A4KV4", "PTQ", None], entries["BF16", "FT", 2]
    a, b = results.paired(ptq, base), results.paired(ft, base)
    found = minus(a, b)
    assert found.value == pytest.approx(a.value - b.value)
    assert found.std_error == pytest.approx(math.hypot(a.std_error, b.std_error))
    assert min(a.df, b.df) <= found.df <= a.df + b.df
    assert found.hi - found.value == pytest.approx(stats.t.ppf(0.975, found.df) * found.std_error)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(found.value) / found.std_error, found.df))
