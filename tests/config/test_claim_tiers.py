"""The tiers that claims are tested in have what their protocol says."""

from __future__ import annotations

from pathlib import Path

from reqat.config import Paths, Plan, load

ROOT = Path(__file__).parents[2]


def test_real_weights_have_the_rows_of_their_protocol():
    """results/protocols/2026-11-29-claims.md: the same rows as `converged`, two training seeds, 200 problems x 2."""
    found = load("smollm-claims", Paths(ROOT))
    tier = found.tier
    assert (tier.budget.qat_tokens, tier.budget.totals, tier.budget.claim_total) == (30_000, [4], 4)
    assert {(e.problems.n, e.seeds) for e in found.evaluations.values()} == {(200, (0, 1))}

    def rows(plan: Plan) -> set[tuple[str, str]]:
        return {(c.recipe, c.precision) for c in plan.cells if c.artifact == "claims-rows"}

    assert rows(found) == rows(load("converged", Paths(ROOT)))
    for recipe, precision in rows(found):
        cells = [c for c in found.cells if (c.artifact, c.recipe, c.precision) == ("claims-rows", recipe, precision)]
        assert {c.training_seed for c in cells} == ({0} if recipe in ("base", "ptq") else {0, 1}), recipe
    assert {c.evaluation for c in found.cells} == {c.evaluation for c in found.cells if c.artifact == "claims-rows"}
    assert "once quantized to 4-bit integers" in tier.title, "every caption has the title"
