"""Studies: what a user can get wrong in config/studies.yaml, where models are looked up, and what an id covers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from reqat.config import Paths, ReqatError, load
from reqat.config.cost import seconds
from reqat.config.paths import made
from reqat.config.plan import Plan
from reqat.config.stage import QFitSettings
from reqat.config.studies import KINDS, PlannedStudy, load_studies, sem_term, study_called
from reqat.pipeline.likelihoods import model_runs
from reqat.pipeline.studies import RUNNERS

ROOT = Path(__file__).parents[2]
BF16, FP4 = {"recipe": "ft", "precision": "BF16"}, {"recipe": "ft-ptq", "precision": "NVFP4-W4A4KV4"}
ROUTING: dict[str, Any] = {
    "kind": "routing",
    "reference": BF16,
    "candidate": FP4,
    "threshold": 0.6,
    "n": 4,
    "seeds": [0, 1],
}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return load("smoke", Paths(ROOT))


def written(folder: Path, *studies: dict[str, Any], tier: str = "smoke") -> Path:
    (folder / "studies.yaml").write_text(yaml.safe_dump({"tiers": {tier: list(studies)}}))
    return folder


def one(folder: Path, plan: Plan, study: dict[str, Any]) -> PlannedStudy:
    (found,) = load_studies(plan, written(folder, study)).values()
    return found


@pytest.mark.parametrize("tier", ["smoke", "laptop", "overnight", "smollm-claims"])
def test_the_tiers_studies_stand_on_stages_that_its_tables_need(tier: str) -> None:
    plan = load(tier, Paths(ROOT))
    studies = load_studies(plan, ROOT / "config")
    assert {study.kind for study in studies.values()} == set(KINDS)
    for id, study in studies.items():
        assert id == study.id and id.startswith(f"study-{study.kind}-")
        assert PlannedStudy.model_validate(study.model_dump(mode="json")).id == id
        assert set(study.inputs.values()) <= set(plan.needed)
        for model in study.models.values():
            graded = {(e.stage, e.precision) for e in plan.evaluations.values()}
            assert (model.stage, model.precision) in graded, "a study measures a model that a table shows"


def test_models_are_those_of_the_cells(tmp_path: Path, plan: Plan) -> None:
    study = one(tmp_path, plan, ROUTING)
    for role, choice in (("reference", BF16), ("candidate", FP4)):
        (cell, *_) = [
            c
            for c in plan.cells
            if (c.recipe, c.precision, c.training_seed) == (choice["recipe"], choice["precision"], 0)
        ]
        graded = plan.evaluation(cell.evaluation)
        assert (study.models[role].stage, study.models[role].precision) == (graded.stage, graded.precision)
    how = plan.tier.evaluation
    assert study.problems is not None and study.decoding == how.decoding
    assert (study.problems.split, study.problems.n, study.problems.seed) == (how.split, 4, how.problem_seed)


def test_a_training_seed_can_be_chosen(tmp_path: Path) -> None:
    plan = load("overnight", Paths(ROOT))
    noise = {"kind": "noise", "sigmas": [0.1], "n": 4, "seeds": [0]}
    asked = [noise | {"name": f"seed {seed}", "model": {**BF16, "seed": seed}} for seed in (0, 2)]
    found = load_studies(plan, written(tmp_path, *asked, tier="overnight")).values()
    assert [plan.stage(study.models["model"].stage).seed for study in found] == [0, 2]


@pytest.mark.parametrize(
    "change",
    [
        {"n": 5},
        {"seeds": [0, 2]},
        {"threshold": "p75"},
        {"name": "another"},
        {"candidate": {"recipe": "qat", "precision": "NVFP4-W4A4KV4"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_a_number_changes_the_id(tmp_path: Path, plan: Plan, change: dict[str, Any]) -> None:
    assert one(tmp_path, plan, ROUTING).id != one(tmp_path, plan, ROUTING | change).id


def test_problems_and_trained_stages_are_part_of_the_id(tmp_path: Path, plan: Plan) -> None:
    before = one(tmp_path, plan, ROUTING)
    longer = plan.tier.evaluation.decoding.model_copy(update={"max_new_tokens": 65})
    evaluation = plan.tier.evaluation.model_copy(update={"decoding": longer})
    changed = Plan(plan.tier.model_copy(update={"evaluation": evaluation}), plan.stages, plan.evaluations, plan.cells)
    assert one(tmp_path, changed, ROUTING).id != before.id
    trained_otherwise = before.models["reference"].model_copy(update={"stage": "finetune-0"})
    models = before.models | {"reference": trained_otherwise}
    assert PlannedStudy.model_validate(before.model_dump() | {"models": models}).id != before.id


def test_a_training_made_anew_reads_what_the_stage_read(tmp_path: Path, plan: Plan) -> None:
    qat = {"recipe": "reqat-tq", "precision": "NVFP4-W4A4KV4"}
    study = one(tmp_path, plan, {"kind": "gradients", "model": qat, "every_steps": 2})
    stage = plan.stage(study.models["model"].stage)
    assert stage.kind == "qat" and study.inputs == {"model": stage.id, **stage.inputs}
    assert study.problems is None


@pytest.mark.parametrize(
    ("study", "says"),
    [
        ({"treshold": 1}, "unknown key 'treshold'. Did you mean 'threshold'"),
        ({"kind": "route"}, "'routing'"),
        ({"threshold": "p100"}, "threshold 'p100': a percentile lies between p0 and p100"),
        ({"threshold": "low"}, "threshold 'low': write nats (0.6) or a percentile (p75)"),
        ({"threshold": -0.5}, "threshold '-0.5'"),
        ({"threshold": True}, "threshold: a number or a text is needed, not True"),
        ({"n": 0}, "greater than 0"),
        ({"seeds": [1, 1]}, "seeds: [1, 1]: 1 stands twice"),
        ({"candidate": {**FP4, "precision": "NVFP4-W4A5"}}, "unknown precision 'NVFP4-W4A5'"),
        ({"candidate": {**FP4, "recipe": "ft-ptqq"}}, "unknown recipe 'ft-ptqq'. Did you mean 'ft-ptq'"),
        ({"candidate": {**FP4, "precision": "MXFP4-W4A4"}}, "has no model of recipe 'ft-ptq' at MXFP4-W4A4"),
        ({"candidate": {**FP4, "total": 4}}, "total 4, training seed 0; of that recipe it has"),
        ({"candidate": {**FP4, "seed": 7}}, "training seed 7"),
        ({"candidate": {**FP4, "model": "testbet"}}, "unknown model 'testbet'. Did you mean 'testbed'"),
    ],
)
def test_what_a_user_can_mend(tmp_path: Path, plan: Plan, study: dict[str, Any], says: str) -> None:
    with pytest.raises(ReqatError) as error:
        one(tmp_path, plan, ROUTING | study)
    assert says in str(error.value) and "config/studies.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("sigmas", "says"),
    [
        ([0.1, 0.1], "sigmas [0.1, 0.1]: one stands twice"),
        ([0.1, 0.10000001], "one stands twice"),  # one file name
        ([0.1, 0.0], "sigmas [0.1, 0.0]: every one must be a positive finite number"),
        ([0.1, -1], "every one must be a positive finite number"),
        ([float("nan")], "finite number (given: nan)"),
        ([float("inf")], "finite number (given: inf)"),
    ],
)
def test_sizes_of_noise_make_sense_and_stay_apart(tmp_path: Path, plan: Plan, sigmas: list[float], says: str) -> None:
    noise = {"kind": "noise", "model": BF16, "n": 4, "seeds": [0]}
    with pytest.raises(ReqatError) as error:
        one(tmp_path, plan, noise | {"sigmas": sigmas})
    assert says in str(error.value) and "config/studies.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"t_low": [0.3, 0.1, 0.3]}, "t_low [0.3, 0.1, 0.3]: one stands twice"),
        ({"t_low": [0.3, 0]}, "t_low [0.3, 0.0]: every one must be a positive finite number"),
        ({"t_low": []}, "at least 1"),
        ({"fit_seeds": [2, 2]}, "fit_seeds: [2, 2]: 2 stands twice"),
        ({"reference": FP4}, "reference at NVFP4-W4A4KV4: it is the condition `bf16`"),
    ],
)
def test_a_reset_study_is_what_its_conditions_say(
    tmp_path: Path, plan: Plan, change: dict[str, Any], says: str
) -> None:
    reset = {"kind": "reset", "quantized": FP4, "reference": BF16, "n": 4, "seeds": [0]}
    assert one(tmp_path, plan, reset).kind == "reset"
    with pytest.raises(ReqatError) as error:
        one(tmp_path, plan, reset | change)
    assert says in str(error.value) and "config/studies.yaml" in str(error.value)


def test_no_gradients_without_a_training(tmp_path: Path, plan: Plan) -> None:
    with pytest.raises(ReqatError, match="is no QAT stage"):
        one(tmp_path, plan, {"kind": "gradients", "model": BF16, "every_steps": 2})


LIKELIHOOD: dict[str, Any] = {
    "kind": "likelihood",
    "models": {"base": {"recipe": "base", "precision": "BF16"}, "QAT": {"recipe": "qat", "precision": "NVFP4-W4A4KV4"}},
    "n": 4,
}


def test_a_likelihood_study_reads_every_training_seed_that_the_plan_has(tmp_path: Path) -> None:
    plan = load("overnight", Paths(ROOT))
    asked = LIKELIHOOD | {"training_seeds": [0, 2, 7], "name": "seeds"}
    asked["models"] = LIKELIHOOD["models"] | {"one": {**BF16, "seed": 1}}
    study, first = load_studies(plan, written(tmp_path, asked, LIKELIHOOD, tier="overnight")).values()
    seeds = {role: plan.stage(model.stage).seed for role, model in study.models.items()}
    trained = {"reference, seed 0": 0, "reference, seed 2": 2, "QAT, seed 0": 0, "QAT, seed 2": 2, "one, seed 1": 1}
    assert {role: seed for role, seed in seeds.items() if role != "base, seed 0"} == trained
    assert "base, seed 0" in seeds, "what trains nothing is one model"
    runs = {run.role: run.reference for run in model_runs(study.settings, study.models)}  # type: ignore[arg-type]
    assert runs == {
        "base, seed 0": "reference, seed 0",
        "QAT, seed 0": "reference, seed 0",
        "one, seed 1": "reference, seed 0",
        "QAT, seed 2": "reference, seed 2",
    }
    assert set(first.models) == {"reference", "base", "QAT"}
    assert first.problems is not None and first.problems.split == plan.tier.evaluation.split
    with pytest.raises(ReqatError, match="no model of recipe 'ft'.*training seed 7"):
        load_studies(plan, written(tmp_path, LIKELIHOOD | {"training_seeds": [7]}, tier="overnight"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"against": "QTA"}, "unknown label 'QTA'. Did you mean 'QAT'"),
        ({"models": {"reference": BF16}}, "'reference' is the label of the reference"),
        ({"models": {}}, "models"),
        ({"percentile": 100}, "percentile"),
        ({"training_seeds": [1, 1]}, "1 stands twice"),
    ],
)
def test_a_fault_in_a_likelihood_study_is_named(tmp_path: Path, plan: Plan, change: dict[str, Any], says: str) -> None:
    with pytest.raises(ReqatError) as error:
        one(tmp_path, plan, LIKELIHOOD | change)
    assert says in str(error.value)


def test_keys_are_those_that_qfit_was_calibrated_on(tmp_path: Path, plan: Plan) -> None:
    tq = {"recipe": "reqat-tq", "precision": "NVFP4-W4A4KV4"}
    study = one(tmp_path, plan, {"kind": "keys", "model": tq})
    fitted = plan.stage(study.given["fitted"])
    assert fitted.kind == "qfit" and fitted.id in {stage.id for stage in plan.lineage(study.models["model"].stage)}
    assert (study.given["before"], study.given["data"]) == (fitted.parent, fitted.data) and study.problems is None
    with pytest.raises(ReqatError, match="config/studies.yaml.*no Q-FIT of scale and shift"):
        one(tmp_path, plan, {"kind": "keys", "model": BF16})
    with pytest.raises(ReqatError, match="rotation 24: a block Hadamard size is a power of two"):
        one(tmp_path, plan, {"kind": "keys", "model": tq, "rotation": 24})


def test_an_overview_shows_a_model_with_sem_on_held_out_problems(tmp_path: Path, plan: Plan) -> None:
    tq, tqs = ({"recipe": recipe, "precision": "NVFP4-W4A4KV4"} for recipe in ("reqat-tq", "reqat-tqs"))
    overview = {"kind": "overview", "bf16": BF16, "qat": tq, "sem": tqs, "n": 4}
    study = one(tmp_path, plan, overview)
    assert study.problems is not None and study.problems.split == "validation"
    term = sem_term(plan, study.models["sem"].stage)
    assert term is not None and term.weight == 0.1
    with pytest.raises(ReqatError, match="config/studies.yaml.*reqat-tq.*without a term sem"):
        one(tmp_path, plan, overview | {"sem": tq})


def test_every_kind_has_what_measures_it() -> None:
    assert KINDS == ("pair", "routing", "noise", "reset", "dynamics", "likelihood", "gradients", "keys", "overview")
    assert set(RUNNERS) == set(KINDS)


def test_studies_are_told_apart(tmp_path: Path, plan: Plan) -> None:
    with pytest.raises(ReqatError, match="two studies.*'routing'"):
        load_studies(plan, written(tmp_path, ROUTING, ROUTING | {"n": 5}))
    assert load_studies(plan, written(tmp_path, tier="laptop")) == {}
    found = load_studies(plan, written(tmp_path, ROUTING))
    with pytest.raises(ReqatError, match="unknown study 'study-routing-0'"):
        study_called(found, "study-routing-0", "smoke")


def test_the_cost_of_qfit_is_that_of_the_points_that_it_tries() -> None:
    """Both axes have the same points."""
    plan = load("testbed", Paths(ROOT))
    stage = next(stage for stage in plan.needed.values() if stage.kind == "qfit")
    assert isinstance(stage.settings, QFitSettings)
    costs = []
    for scale, shift, points in ((False, False, 1), (True, False, 7), (False, True, 7), (True, True, 49)):
        settings = stage.settings.model_copy(update={"grid": 7, "scale": scale, "shift": shift})
        # A copy keeps the id that was asked for.
        changed = stage.model_copy(update={"settings": settings})
        cost = seconds(dataclasses.replace(plan, stages=plan.stages | {stage.id: changed}))[stage.id]
        costs.append((cost - plan.tier.resources.job_s) / points)
    assert costs == [pytest.approx(costs[0])] * 4 and costs[0] > 0


@pytest.mark.parametrize("tier", ["smoke", "smollm-claims"])
def test_every_study_has_a_cost_that_grows_with_what_it_asks(tmp_path: Path, tier: str) -> None:
    plan = load(tier, Paths(ROOT))
    planned = load_studies(plan, ROOT / "config")
    found = seconds(plan, planned.values())
    stages = {id for id, stage in plan.needed.items() if made(stage)}
    assert found.keys() == stages | plan.evaluations.keys() | planned.keys()
    assert {id: found[id] for id in seconds(plan)} == seconds(plan)
    for id, study in planned.items():
        asked = study.settings.model_dump(exclude_unset=True)
        more = {"every_steps": 1} if study.kind == "gradients" else {"n": 2 * asked["n"]} if "n" in asked else None
        if more is None:
            continue
        (larger,) = load_studies(plan, written(tmp_path, asked | more, tier=tier)).values()
        assert seconds(plan, [larger])[larger.id] > found[id] > plan.tier.resources.job_s, id
