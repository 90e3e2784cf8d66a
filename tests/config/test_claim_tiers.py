"""The tiers that claims are tested in have what their protocol says."""

from __future__ import annotations

from pathlib import Path

from reqat.config import Paths, Plan, Stage, load

ROOT = Path(__file__).parents[2]


def test_real_weights_have_the_rows_of_their_protocol():
    """results/protocols/2026-11-29-claims.md, deviation 14: the rows of `converged`, smaller, one training seed."""
    found = load("smollm-claims", Paths(ROOT))
    tier = found.tier
    assert (tier.budget.qat_tokens, tier.budget.totals, tier.budget.claim_total) == (8_192, [4], 4)
    assert {(e.problems.n, e.seeds) for e in found.evaluations.values()} == {(40, (0,))}

    def rows(plan: Plan) -> set[tuple[str, str]]:
        return {(c.recipe, c.precision) for c in plan.cells if c.artifact == "claims-rows"}

    assert rows(found) == rows(load("converged", Paths(ROOT)))
    for recipe, precision in rows(found):
        cells = [c for c in found.cells if (c.artifact, c.recipe, c.precision) == ("claims-rows", recipe, precision)]
        assert {c.training_seed for c in cells} == {0}, recipe
    assert {c.evaluation for c in found.cells} == {c.evaluation for c in found.cells if c.artifact == "claims-rows"}
    assert "once quantized to 4-bit integers" in tier.title, "every caption has the title"


def test_the_converged_testbed_has_the_size_and_rates_of_its_protocol():
    """results/protocols/2026-11-29-claims.md, deviations 17 (seeds), 7 (rates), 8 (total) and 9 (responses)."""
    found = load("converged", Paths(ROOT))
    tier = found.tier
    assert (tier.budget.qat_tokens, tier.budget.totals, tier.budget.claim_total) == (200_000, [4], 4)
    rows = [c for c in found.cells if c.artifact == "claims-rows"]
    own = {c.evaluation for c in rows if c.problems == "own"}
    graded = {(e.problems.split, e.problems.n, e.seeds) for id, e in found.evaluations.items() if id in own}
    assert own and graded == {("test", 1000, (0, 1))}
    for recipe, precision in {(c.recipe, c.precision) for c in rows}:
        seeds = {c.training_seed for c in rows if (c.recipe, c.precision) == (recipe, precision)}
        assert seeds == ({0} if recipe in ("base", "ptq") else {0, 1, 2, 3, 4}), recipe
    rates = {
        (stage.kind, parent_trains): {
            s.settings.training.lr
            for s in found.needed.values()
            if s.kind == stage.kind and (_trained_before(found, s)) == parent_trains
        }
        for stage in found.needed.values()
        if stage.kind in ("finetune", "qat")
        for parent_trains in [_trained_before(found, stage)]
    }
    # Fine-tuning and QAT from the base; every second stage.
    assert rates == {("finetune", False): {3e-4}, ("qat", False): {3e-4}, ("qat", True): {1e-4}}


def _trained_before(found: Plan, stage: Stage) -> bool:
    return any(s.kind in ("finetune", "qat") for s in list(found.lineage(stage.id))[1:])
