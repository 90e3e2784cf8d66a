"""Tiers that stand on files of the data folder: traces and benchmarks enter ids by their content, parts by nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from reqat.config import Paths, Plan, ReqatError, load, load_catalogue, plan
from reqat.config.base import merge, parse
from reqat.config.cost import hours, seconds
from reqat.config.paths import require_given
from reqat.config.resources import need, parameters
from reqat.config.tier import ABSENT, Tier, _tier_data

ROOT = Path(__file__).parents[2]
CATALOGUE = load_catalogue(ROOT / "config")
TRACES, PROBLEMS = "paper-mini-traces.jsonl", "paper-mini.jsonl"


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Paths:
    """A checkout of the configuration alone, with a model and data that are not read."""
    monkeypatch.delenv("REQAT_DATA", raising=False)
    monkeypatch.delenv("REQAT_MODELS", raising=False)
    (tmp_path / "config").symlink_to(ROOT / "config")
    (tmp_path / "models" / "paper-mini").mkdir(parents=True)
    (tmp_path / "models" / "paper-mini" / "config.json").write_text("{}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / TRACES).write_text("traces")
    (tmp_path / "data" / PROBLEMS).write_text("problems")
    return Paths(root=tmp_path)


def mini(paths: Paths) -> Plan:
    return load("paper-mini", paths)


def test_the_miniature_differs_from_the_papers_tier_by_numbers_and_names_alone() -> None:
    """Same keys, so the same stages, rules and path of evaluation; what is a name is listed here."""
    paper, small = (_tier_data(name, ROOT / "config") for name in ("paper", "paper-mini"))
    names = {
        "title", "models", "data.source", "evaluation.benchmark", "only.recipes", "only.precisions", "resources.device",
    }  # fmt: skip

    def leaves(value: object, key: str = "") -> dict[str, object]:
        if isinstance(value, dict) and key not in names:
            return {k: v for name, inner in value.items() for k, v in leaves(inner, f"{key}.{name}".strip(".")).items()}
        return {key: value}

    theirs, ours = leaves(paper), leaves(small)
    assert set(ours) - set(theirs) == {"only.recipes", "only.precisions"}
    assert set(theirs) <= set(ours)
    for key, value in ours.items():
        if key not in names and value != theirs[key]:
            listed = value if isinstance(value, list) else [value]
            assert all(type(one) in (int, float) for one in listed), key
    kinds = {stage.kind for stage in load("paper", Paths(root=ROOT)).needed.values()}
    assert {stage.kind for stage in load("paper-mini", Paths(root=ROOT)).needed.values()} == kinds - {"ptq"}


def test_the_content_of_a_file_is_in_the_ids_of_what_stands_on_it(paths: Paths) -> None:
    before = mini(paths)
    (paths.root / "data" / PROBLEMS).write_text("other problems")
    asked_anew = mini(paths)
    assert set(asked_anew.stages) == set(before.stages), "nothing is trained again"
    assert not set(asked_anew.evaluations) & set(before.evaluations)
    (paths.root / "data" / TRACES).write_text("other traces")
    trained_anew = mini(paths)
    kept = {stage.kind for id, stage in trained_anew.stages.items() if id in before.stages}
    assert kept == {"base"}, "a base does not stand on traces"
    assert Plan.restore(json.loads(json.dumps(before.dump())), "test").dump() == before.dump()


def test_a_plan_of_files_that_are_not_there_is_a_plan_and_does_not_start(paths: Paths) -> None:
    whole = mini(paths)
    require_given(whole, paths)
    for folder in ("models", "data"):
        shutil.rmtree(paths.root / folder)
    made = mini(paths)
    assert len(made.stages) == len(whole.stages) and set(made.evaluations).isdisjoint(whole.evaluations)
    assert next(iter(made.evaluations.values())).problems.benchmark.sha256 == ABSENT
    with pytest.raises(ReqatError, match=rf"models.paper-mini.*{TRACES}.*{PROBLEMS}.*REQAT_DATA"):
        require_given(made, paths)


def test_folders_come_from_the_environment(paths: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQAT_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(ReqatError, match=f"elsewhere.{TRACES}"):
        require_given(mini(paths), paths)


# --- parts of an evaluation -------------------------------------------------------------------------------------------


def tier(**changes: object) -> Tier:
    data = merge(_tier_data("paper-mini", ROOT / "config"), changes) | {"name": "paper-mini"}
    return parse(Tier, data, "test").check(CATALOGUE)


@pytest.mark.parametrize(("shards", "parts"), [(1, 0), (2, 2), (3, 3), (64, 5)])
def test_parts_have_every_seed_once_and_are_in_no_id_but_their_own(shards: int, parts: int) -> None:
    seeds = [5, 3, 8, 1, 0]
    one = plan(tier(evaluation={"seeds": seeds}, resources={"evaluation_shards": 1}), CATALOGUE)
    made = plan(tier(evaluation={"seeds": seeds}, resources={"evaluation_shards": shards}), CATALOGUE)
    assert set(made.evaluations) == set(one.evaluations) and set(made.stages) == set(one.stages)
    for id, whole in made.evaluations.items():
        found = made.shards(id)
        assert len(found) == parts and set(found).isdisjoint(made.evaluations)
        if parts:
            assert sorted(seed for part in found.values() for seed in part.seeds) == sorted(seeds)
        for name, part in found.items():
            assert made.evaluation(name) == part and made.shards(name) == {}
            assert part.id not in (id, whole.id), "a part of fewer seeds is no copy under the id of the whole"
            assert part.model_dump(exclude={"seeds"}) == whole.model_dump(exclude={"seeds"})
    first = next(iter(made.evaluations))
    with pytest.raises(ReqatError, match=f"{first}-1of7"):
        made.evaluation(f"{first}-1of7")


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"evaluation": {"families": {"chain_sum": {}}}}, "paper-mini.*one or the other"),
        ({"evaluation": {"benchmark": None}}, "benchmark"),
        ({"evaluation": {"benchmark": "../secret"}}, r"benchmark.*\.\./secret"),
        ({"evaluation": {"sets": {"more": {"benchmark": "a/b"}}}}, "a/b"),
        ({"evaluation": {"n": 0}}, "evaluation.n"),
        ({"resources": {"evaluation_shards": 0}}, "evaluation_shards"),
        ({"data": {"source": "generated", "families": {"chain_sum": {}}, "own": {"prompt": "question"}}}, "own"),
    ],
)
def test_a_tier_that_says_two_things_or_nothing_is_refused(changes: dict, named: str) -> None:
    with pytest.raises(ReqatError, match=named):
        tier(**changes)


def test_a_set_beside_the_tiers_own_may_be_of_families_or_of_another_file() -> None:
    sets = {"sums": {"families": {"chain_sum": {}}}, "other": {"benchmark": "math500", "n": 7}, "same": {"n": 3}}
    given = tier(evaluation={"sets": sets})
    sums, other, same = (given.problem_set(name, {"math500.jsonl": "d"})[0] for name in sets)
    assert (sums.benchmark, list(sums.families)) == (None, ["chain_sum"])
    assert (other.benchmark.name, other.benchmark.sha256, other.n) == ("math500", "d", 7)
    assert (same.benchmark.name, same.n) == ("paper-mini", 3)
    assert given.files == [TRACES, PROBLEMS, "math500.jsonl"]


# --- what it costs ----------------------------------------------------------------------------------------------------


PAPER = load("paper", Paths(root=ROOT))


def test_an_evaluation_of_the_papers_tier_fits_on_the_one_gpu_that_its_job_can_use() -> None:
    assert need(PAPER, "evaluating").gpus == 1 and need(PAPER, "calibrating").gpus == 1
    assert need(PAPER, "training").gpus == need(PAPER).gpus > 1
    largest = max(parameters(model.shape) for model in PAPER.tier.models.values())
    assert all(need(PAPER, job).device_bytes > 4 * largest for job in ("training", "calibrating", "evaluating"))


def test_gpu_hours_are_rates_times_gpus() -> None:
    found, rates = hours(PAPER), PAPER.tier.resources
    assert set(found) == {*PAPER.artifacts, "all"}
    cells = {c.evaluation for c in PAPER.cells if c.artifact == "table5"}
    responses = sum(PAPER.evaluation(id).problems.n * len(PAPER.evaluation(id).seeds) for id in cells)
    parts = sum(len(PAPER.shards(id)) for id in cells)
    assert found["table5"].evaluating == pytest.approx((responses / rates.responses_per_s + parts * rates.job_s) / 3600)
    trained = {id for cell in cells for id in PAPER.behind(cell) if PAPER.stage(id).kind in ("finetune", "qat")}
    gpus, each = need(PAPER, "training").gpus, seconds(PAPER)
    least = sum(each[id] for id in trained) * gpus / 3600
    assert found["table5"].training >= least > 0
    assert max(hours.total for name, hours in found.items() if name != "all") <= found["all"].total
    assert found["all"].total < sum(hours.total for name, hours in found.items() if name != "all"), "tables share work"


def test_parts_cost_together_what_the_whole_costs_and_their_starts() -> None:
    one = plan(tier(resources={"evaluation_shards": 1}), CATALOGUE)
    two = plan(tier(resources={"evaluation_shards": 2}), CATALOGUE)
    extra = sum(seconds(two).values()) - sum(seconds(one).values())
    assert extra == pytest.approx(2 * one.tier.resources.job_s * len(one.evaluations))
