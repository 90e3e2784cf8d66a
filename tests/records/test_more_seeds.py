"""Two runs of the same settings under other training seeds, read as one: it is the plan that has all seeds at once."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from reqat.config import Paths, ReqatError, load
from reqat.config.plan import Plan
from reqat.records.more_seeds import with_more_seeds
from reqat.records.pinned import Restored

ROOT = Path(__file__).parents[2]


def restored(plan: Plan, root: Path) -> Restored:
    """As unfolded: a folder with a record an evaluation and stage."""
    folders = {id: root / "evaluations" / id for id in plan.evaluations} | {
        id: root / "stages" / id for id in plan.needed
    }
    for id, folder in folders.items():
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(json.dumps({"id": id, "tier": plan.tier.name}))
    return Restored(root, plan, {id: {"id": id, "tier": plan.tier.name} for id in folders})


def of_seeds(plan: Plan, seeds: set[int]) -> Plan:
    """The part of a plan whose cells are of these training seeds."""
    cells = [cell for cell in plan.cells if cell.training_seed in seeds]
    asked = {cell.evaluation for cell in cells}
    return dataclasses.replace(
        plan, cells=cells, evaluations={id: e for id, e in plan.evaluations.items() if id in asked}
    )


def cells(plan: Plan) -> set[str]:
    return {cell.model_dump_json() for cell in plan.cells}


@pytest.fixture(scope="module")
def whole() -> Plan:
    return load("converged", Paths(ROOT))


@pytest.fixture(scope="module")
def seeds() -> Plan:
    return load("converged-seeds", Paths(ROOT))


def test_parts_read_as_one_are_the_tier_with_all_seeds(tmp_path: Path, whole: Plan, seeds: Plan) -> None:
    run = restored(of_seeds(whole, {0, 1, 2}), tmp_path / "run")
    made = with_more_seeds(run, restored(seeds, tmp_path / "more"))
    assert cells(made.plan) == cells(whole) and made.plan.evaluations.keys() == whole.evaluations.keys()
    assert len(cells(made.plan)) > len(cells(run.plan))
    assert made.records.keys() >= made.plan.needed.keys() | made.plan.evaluations.keys()
    for id in made.plan.evaluations:
        assert json.loads((made.root / "evaluations" / id / "record.json").read_text())["id"] == id
    # The base is measured once, and stays the first run's.
    (base,) = {c.evaluation for c in whole.cells if (c.recipe, c.artifact) == ("base", "claims-rows")}
    assert base in seeds.evaluations and made.records[base]["tier"] == "converged"


def test_a_part_that_is_there_already_adds_nothing(tmp_path: Path, whole: Plan, seeds: Plan) -> None:
    made = with_more_seeds(restored(whole, tmp_path / "run"), restored(seeds, tmp_path / "more"))
    assert cells(made.plan) == cells(whole)


def test_runs_of_other_settings_are_no_more_seeds(tmp_path: Path, whole: Plan) -> None:
    other = load("converged-rates-low", Paths(ROOT))
    with pytest.raises(ReqatError, match="more than the training seed"):
        with_more_seeds(restored(whole, tmp_path / "run"), restored(other, tmp_path / "more"))


def test_a_seed_that_both_trained_unlike_is_refused(tmp_path: Path, whole: Plan, seeds: Plan) -> None:
    part = of_seeds(whole, {0, 1, 2})
    named = [c.model_copy(update={"training_seed": 1}) if c.training_seed == 3 else c for c in seeds.cells]
    with pytest.raises(ReqatError, match="in both"):
        with_more_seeds(
            restored(part, tmp_path / "run"), restored(dataclasses.replace(seeds, cells=named), tmp_path / "more")
        )
