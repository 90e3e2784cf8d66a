"""The claims as a run tests them: which comparisons there are, and what each is tested against and adjusted with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from scipy import stats

from analysis.report import pooled, verdicts
from analysis.report.cells import Results
from analysis.report.claims import CLAIMS, comparisons, family_at, of_other_elements
from analysis.tables.claims import build
from reqat.config.paths import read_plan
from reqat.evaluation.means import detectable, minus
from reqat.evaluation.statistics import holm

ROOT = Path(__file__).parents[3]
FP4 = "NVFP4-W4A4KV4"
ROWS = {"source": "pinned", "artifacts": ["claims-rows"]}
SEEDS = {"seeds": [0, 1, 2], "recipes": ["ft", "qat", "reqat-t", "reqat-tq", "reqat-tqs"], "precisions": ["BF16", FP4]}
SMALL = {"n": 60, "seeds": [0, 1]}


def test_a_claim_is_tested_where_a_plan_has_both_sides(make_results: Callable[..., Results]) -> None:
    results = make_results(
        models={"testbed": {"source": "pinned", "artifacts": ["claims-rows", "table4", "table16", "table15"]}},
        evaluation=SMALL,
    )
    found = verdicts.tested(results)
    names = {(t.claim.name, t.precision) for t in found}
    assert {("same traces above different", p) for p in (FP4, "MXFP4-W4A16")} <= names
    assert ("SEM weight 0.1 above 0.5", FP4) in names and ("QAD below QAT", FP4) in names
    # Greedy rows of Table 15 are other measurements, and never a side.
    graded = {c.evaluation for t in found for e in (*t.a, *t.b) for c in e.cells}
    assert not any(results.plan.evaluation(id).decoding.greedy for id in graded)
    primary = {t.claim.name: t.precision for t in found if t.primary}
    assert primary == {c.name: FP4 for c in CLAIMS if c.main}
    assert len(found) == len({(t.claim.name, t.precision, t.multiple) for t in found}), "each once, whatever shows it"
    for t in found:
        if t.testable:
            assert t.detectable == pytest.approx(detectable(t.std_error, t.df, alpha=0.05 / t.comparisons))


def test_p_is_of_what_a_claim_says(results: Results) -> None:
    found = verdicts.tested(results)
    by_kind = {t.claim.kind: t for t in found if t.testable and t.precision == FP4}
    assert by_kind["parity"].p == pytest.approx(
        2 * stats.t.sf(abs(by_kind["parity"].value + 3) / by_kind["parity"].std_error, by_kind["parity"].df)
    )
    same = by_kind["direction"]
    assert same.p == pytest.approx(results.paired(same.a[0], same.b[0]).p)
    for t in found:
        assert (t.verdict in ("agrees", "disagrees", "inconclusive")) == t.testable == (not math.isnan(t.p))
        # What counts is the seeds that both sides have; three of Q-FIT's against one of half of it are one.
        trained = {seed for e in (*t.a, *t.b) for seed in e.training_seeds if e.total_tokens is not None}
        assert t.seeds == len(trained)
        assert t.seeds != 1 or t.verdict in ("one training seed", "no direction", "at the floor")
    assert {t.seeds for t in found} == {0, 1, 3}
    assert next(t for t in found if t.claim.name == "PTQ below the BF16 base").testable, "nothing is trained there"


def test_what_neither_side_can_do_is_not_tested(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "FLOOR", 0.65)
    found = verdicts.tested(results)
    for t in found:
        assert len(t.a) == len(t.b) == 1
        highest = max(results.estimate(side[0]).value for side in (t.a, t.b))
        assert t.at_floor == (highest < 0.65), t.claim.name
        assert not t.at_floor or t.verdict in ("at the floor", "no direction")
    assert 0 < sum(t.at_floor for t in found) < len(found)


def test_families_do_not_hang_on_which_cells_are_there(make_results: Callable[..., Results], tmp_path: Path) -> None:
    few = make_results(models={"testbed": ROWS}, claim_seeds=SEEDS, evaluation=SMALL)
    part = Results(
        dataclasses.replace(few.plan, cells=[c for c in few.plan.cells if c.recipe not in ("ft-qat-different", "ptq")]),
        few.root,
    )
    sizes, adjusted = [], []
    for results in (few, part):
        found = verdicts.tested(results)
        sizes.append({t.block: t.comparisons for t in found if t.testable})
        primary = [t for t in found if t.primary and t.testable]
        p = [t.p for t in primary]
        assert [t.holm for t in primary] == pytest.approx(holm([*p, *[1.0] * (5 - len(p))])[: len(p)])
        adjusted.append({(t.claim.name, t.block): t.holm for t in found if t.testable})
    assert sizes[0] == sizes[1] and sizes[0]["primary"] == 5
    assert len(adjusted[0]) > len(adjusted[1]) >= 4
    context = [c for c in family_at(FP4, few.plan.tier, "testbed") if verdicts.hypothesis(c, FP4)[1]]
    assert sizes[0][FP4] == len(context) > sum(t.block == FP4 for t in verdicts.tested(few))
    # Three totals: a primary claim is context at the two others. What has no direction is in no family.
    assert [c.name for c in context].count("ReQAT-T above QAT") == 2
    assert "ReQAT-TQS above ReQAT-TQ" not in {c.name for c in context}
    assert verdicts.missing(verdicts.tested(few), "testbed") == []
    assert verdicts.missing(verdicts.tested(part), "testbed") == ["same traces above different"]
    assert any("same traces above different" in note for note in build(part).footer), "it is named"


def test_claims_about_the_element_of_keys_compare_with_that_element() -> None:
    """The first pinned run had E1M2 in its row ReQAT-T, and the paper's E2M1 in a row of Table 5 alone."""
    plan = read_plan(ROOT / "results" / "2026-11-26-overnight" / "plan.json")
    elements = {"E1M2 and scale above ReQAT-T": ("E1M2", "E2M1"), "Q-FIT above E1M2 and shift": ("E1M2", "E1M2")}
    found = {c.claim.name: c for c in comparisons(plan)}
    for name, wanted in elements.items():
        sides = [plan.evaluation(side[0][0].evaluation).precision for side in (found[name].a, found[name].b)]
        assert tuple(precision.kv_element for precision in sides) == wanted
    assert of_other_elements(plan) == []
    without = dataclasses.replace(plan, cells=[c for c in plan.cells if c.recipe != "qfit-none"])
    assert "E1M2 and scale above ReQAT-T" not in {c.claim.name for c in comparisons(without)}
    assert "E1M2 and scale above ReQAT-T" in {claim.name for claim in of_other_elements(without)}


def test_masks_of_sem_are_compared_on_the_editions_that_they_are_graded_on(
    make_results: Callable[..., Results],
) -> None:
    sets = {
        f"edition-{k}": {"n": 10 * k, "families": {"chain_sum": {"min_terms": k, "max_terms": k}}} for k in (2, 3, 4)
    }
    sets = {f"edition-{i}": value for i, value in enumerate(sets.values(), 1)}
    results = make_results(
        models={"testbed": {"source": "pinned", "artifacts": ["table12"]}},
        evaluation={"n": 20, "seeds": [0, 1], "sets": sets},
    )
    found = [t for t in verdicts.tested(results) if t.claim.name == "soft mask above binary"]
    assert [(t.precision, t.multiple) for t in found] == [("MXFP4-W4A4", m) for m in (2, 3, 4)]
    for t in found:
        assert [e.problems for e in t.a] == ["edition-1", "edition-2", "edition-3"]
        soft, binary = (
            [e for e in results.of("table12") if e.conditions["sem_mask"] == mask and e.multiple == t.multiple]
            for mask in ("soft", "binary")
        )
        d = pooled.paired(results, soft, binary)
        assert (t.value, t.lo, t.hi) == pytest.approx((100 * d.value, 100 * d.lo, 100 * d.hi)) and d.n_problems == 90
        assert t.verdict == "no direction" and t.within_noise, "1.8 points on 90 problems"


def test_reasoning_against_knowledge_is_a_difference_of_differences(results: Results) -> None:
    entries = {(e.precision, e.method, e.multiple): e for e in results.of("table1")}
    base, ptq, ft = entries["BF16", "Baseline", None], entries[FP4, "PTQ", None], entries["BF16", "FT", 2]
    a, b = results.paired(ptq, base), results.paired(ft, base)
    found = minus(a, b)
    assert found.value == pytest.approx(a.value - b.value)
    assert found.std_error == pytest.approx(math.hypot(a.std_error, b.std_error))
    assert min(a.df, b.df) <= found.df <= a.df + b.df
    assert found.hi - found.value == pytest.approx(stats.t.ppf(0.975, found.df) * found.std_error)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(found.value) / found.std_error, found.df))
