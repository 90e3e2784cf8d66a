"""Named sets of problems, and recipes of several epochs, in the plan of the testbed's tier with one more artifact."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from reqat.config import Plan, ReqatError, TrainSettings, load_catalogue, load_tier, plan
from reqat.config.base import merge, parse
from reqat.config.recipe import Artifact
from reqat.config.tier import Tier
from reqat.tasks import problems

ROOT = Path(__file__).parents[2]
CATALOGUE = load_catalogue(ROOT / "config")
# One short artifact is enough beside the one that is added.
USUAL = {"models": {"testbed": {"artifacts": ["table2"]}}, "only": {"recipes": None, "precisions": None}}
TESTBED = merge(load_tier("testbed", ROOT / "config").model_dump(mode="json"), USUAL)
TESTBED["evaluation"]["sets"] = {}


def make(**changes: object) -> Plan:
    return plan(parse(Tier, merge(TESTBED, changes), "test").check(CATALOGUE), CATALOGUE)


WITHOUT = make()

SETS = {
    "long": {"families": {"chain_sum": {"min_terms": 18, "max_terms": 18}}, "n": 50, "seeds": [5, 6]},
    "validation": {"split": "validation", "n": 40},
    "again": {},
}
NAMED = [{"recipes": ["base", "qat"], "precisions": ["NVFP4-W4A4KV4"], "problems": ["own", *SETS]}]


def with_artifact(rows: list[dict], sets: dict = SETS, **changes: object) -> Plan:
    """The testbed's plan with one more artifact of these rows, `extra`."""
    artifact = parse(Artifact, {"title": "extra", "rows": rows}, "test")
    catalogue = CATALOGUE.model_copy(update={"artifacts": {**CATALOGUE.artifacts, "extra": artifact}})
    changes = {"models": {"testbed": {"artifacts": ["table2", "extra"]}}, "evaluation": {"sets": sets}} | changes
    return plan(parse(Tier, merge(TESTBED, changes), "test").check(catalogue), catalogue)


def test_a_named_set_grades_the_same_models_on_other_problems():
    made = with_artifact(NAMED)
    assert set(WITHOUT.needed) <= set(made.stages)
    cells = {
        (c.recipe, c.multiple, c.problems): made.evaluation(c.evaluation) for c in made.cells if c.artifact == "extra"
    }
    assert {key[2] for key in cells} == {"own", *SETS}
    for (recipe, multiple, name), evaluation in cells.items():
        own = cells[recipe, multiple, "own"]
        assert evaluation.stage == own.stage and evaluation.decoding == own.decoding
        asked = SETS.get(name, {})
        assert evaluation.problems == own.problems.model_copy(update={k: v for k, v in asked.items() if k != "seeds"})
        assert evaluation.seeds == tuple(asked.get("seeds", own.seeds))
        assert (evaluation.id == own.id) == (name in ("own", "again")), "the same problems are graded once"
    restored = Plan.restore(made.dump(), "test")
    assert [c.problems for c in restored.cells] == [c.problems for c in made.cells]


def test_sets_that_nothing_names_rename_nothing_and_old_cells_are_on_the_tiers_own():
    made = make(evaluation={"sets": SETS})
    assert set(made.evaluations) == set(WITHOUT.evaluations) and set(made.stages) == set(WITHOUT.stages)
    old = WITHOUT.dump()
    for cell in old["cells"]:
        del cell["problems"]
    assert {c.problems for c in Plan.restore(old, "test").cells} == {"own"}


@pytest.mark.parametrize(
    ("sets", "named"),
    [
        ({"lang": {}}, "'long'.*'lang'"),
        ({"own": {}}, "own"),
        ({"Long Ones": {}}, "Long Ones"),
        ({"long": {"families": {}}}, "families"),
        ({"long": {"seeds": []}}, "seeds"),
        ({"long": {"seeds": [1, 1]}}, "twice"),
        ({"long": {"many": 3}}, "many"),
    ],
)
def test_a_set_that_is_missing_or_no_set_is_refused(sets: dict, named: str):
    with pytest.raises(ReqatError, match=named):
        with_artifact([{"recipes": ["base"], "precisions": ["BF16"], "problems": ["long"]}], sets)


@pytest.mark.parametrize("name", ["testbed", "converged"])
def test_editions_are_disjoint_and_their_validation_is_of_another_split(name: str) -> None:
    tier = load_tier(name, ROOT / "config")
    sets = [*(f"edition-{k}" for k in range(1, 5)), "validation"]
    found = {name: tier.problem_set(name)[0].model_copy(update={"n": 50}) for name in sets}
    asked = {name: {p.id for p in problems(s.families, s.split, s.n, s.seed)} for name, s in found.items()}
    assert found["validation"].split == "validation" and {found[name].split for name in sets[:4]} == {"test"}
    for name, ids in asked.items():
        assert len(ids) == 50
        assert not any(ids & others for other, others in asked.items() if other != name)
    terms = [s.families["chain_sum"] for s in found.values()][:4]
    assert all(a["max_terms"] < b["min_terms"] for a, b in itertools.pairwise(terms)), "of rising difficulty"


EPOCHS = [f"ft-epochs{k}" for k in range(1, 6)]
TAQ = [f"ft4-taq{k}" for k in range(1, 6)]


def test_epochs_have_a_total_of_their_own_and_share_their_traces():
    made = with_artifact(
        [
            {"recipes": EPOCHS, "precisions": ["BF16", "NVFP4-W4A4KV4"]},
            {"recipes": [*TAQ, "ft4-reqat"], "precisions": ["NVFP4-W4A4KV4"], "totals": "claim"},
        ],
        claim_seeds={"seeds": [0, 7], "recipes": [*EPOCHS, *TAQ], "precisions": ["NVFP4-W4A4KV4"]},
    )
    qat = made.tier.budget.qat_tokens
    cells = [c for c in made.cells if c.artifact == "extra"]
    spent = {name: k for k, name in enumerate(EPOCHS, 1)} | {name: 4 + k for k, name in enumerate(TAQ, 1)}
    for cell in cells:
        lineage = [
            s for s in made.lineage(made.evaluation(cell.evaluation).stage) if isinstance(s.settings, TrainSettings)
        ]
        assert cell.multiple == spent.get(cell.recipe, 5)
        assert cell.total_tokens == cell.multiple * qat == sum(s.budget_tokens for s in lineage)
        for stage in lineage:
            assert stage.settings.traces.tokens == qat and stage.settings.traces.skip_tokens == 0
    of = {(c.recipe, c.precision): made.evaluation(c.evaluation) for c in cells if c.training_seed == 0}
    for name in EPOCHS:
        assert of[name, "BF16"].stage == of[name, "NVFP4-W4A4KV4"].stage, "rounding to nearest needs no stage"
    parents = {made.stage(of[name, "NVFP4-W4A4KV4"].stage).parent for name in TAQ}
    assert parents == {of["ft-epochs4", "BF16"].stage}
    seeds = {(c.recipe, c.precision): set() for c in cells}
    for cell in cells:
        seeds[cell.recipe, cell.precision].add(cell.training_seed)
    assert seeds["ft-epochs2", "NVFP4-W4A4KV4"] == seeds["ft4-taq5", "NVFP4-W4A4KV4"] == {0, 7}
    assert seeds["ft-epochs2", "BF16"] == seeds["ft4-reqat", "NVFP4-W4A4KV4"] == {0}
