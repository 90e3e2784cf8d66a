"""Pinning a finished run and holding a fresh one against it, on a made-up run of a small plan."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from reqat.config import Paths, Plan, ReqatError, load
from reqat.config.paths import made
from reqat.evaluation import Outcomes
from reqat.pipeline import compare, pin
from reqat.records import provenance, record

ROOT = Path(__file__).parents[2]
N = 60


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Paths:
    """A checkout with a tier of a few cells; its tree counts as clean."""
    shutil.copytree(ROOT / "config", tmp_path / "config")
    tier = yaml.safe_load((tmp_path / "config/tiers/smoke.yaml").read_text())
    tier |= {"only": {"recipes": ["base", "ptq", "reqat-t"], "precisions": ["NVFP4-W4A4KV4"]}}
    tier["evaluation"] = {"n": N, "seeds": [0, 1]}
    (tmp_path / "config/tiers/smoke.yaml").write_text(yaml.safe_dump(tier))
    monkeypatch.setattr(provenance, "commit", lambda root: {"commit": "c" * 40, "source": "s1", "dirty": False})
    return Paths(root=tmp_path)


def outcomes(share: float, seed: int = 0) -> Outcomes:
    draw = np.random.default_rng(seed).random((N, 2)) < share
    return Outcomes(
        problem_id=tuple(f"p{i:03d}" for i in range(N) for _ in range(2)),
        family=("sums",) * (2 * N),
        seed=np.tile([0, 1], N),
        correct=draw.ravel(),
        n_tokens=np.full(2 * N, 9),
        finished=np.ones(2 * N, bool),
        response=("the answer is 4",) * (2 * N),
    )


def run(plan: Plan, paths: Paths, share: float = 0.5, seed: int = 0) -> None:
    """Leave behind what a run of the plan leaves behind."""
    for id, stage in plan.needed.items():
        if made(stage):
            with record.job(
                stage.kind, id, stage, root=paths.root, out=paths.stage(stage), partial=paths.partial(id)
            ) as job:
                job.inputs = given(plan, paths, stage.inputs)
                (job.partial / "weights").write_text(id)
    for id, evaluation in plan.evaluations.items():
        out = paths.evaluation(evaluation)
        with record.job("evaluation", id, evaluation, root=paths.root, out=out, partial=paths.partial(id)) as job:
            job.inputs = given(plan, paths, evaluation.inputs)
            outcomes(share, seed).to_parquet(job.partial / "outcomes.parquet")


def given(plan: Plan, paths: Paths, roles: dict[str, str]) -> dict[str, dict[str, str]]:
    digests = {id: record.outputs_digest(record.read(paths.stage(plan.stage(id)))) for id in roles.values()}
    return {role: {"id": id, "sha256": digests[id]} for role, id in roles.items()}


def test_a_whole_run_is_pinned_without_weights_and_texts(paths: Paths):
    plan = load("smoke", paths)
    run(plan, paths)
    rendered = []
    folder = pin.pin(plan, paths, render=lambda *given: rendered.append(given))
    assert folder == paths.results / "smoke" and len(rendered) == 1
    assert pin.restore("smoke", paths).dump() == plan.dump()
    assert pin.pinned_tiers(paths) == ["smoke"]
    for id in plan.evaluations:
        kept = Outcomes.from_parquet(folder / "evaluations" / id / "outcomes.parquet")
        assert kept.response is None and (kept.correct == outcomes(0.5).correct).all()
        assert record.read(folder / "evaluations" / id)["outputs"]["outcomes.parquet"]["bytes"] > 0
    assert not list(folder.rglob("weights"))
    assert {p.parent.name for p in folder.glob("stages/*/record.json")} == {
        i for i in plan.needed if not i.startswith("data-")
    }
    stated = json.loads((folder / "pin.json").read_text())
    assert (
        stated["dirty"] is False
        and stated["commits"] == ["c" * 40]
        and stated["jobs"] == len(plan.needed) + len(plan.evaluations)
    )
    assert str(paths.root) not in "".join(p.read_text() for p in folder.rglob("*.json"))
    assert pin.verify("smoke", paths) == len(stated["files"])
    victim = next(folder.glob("evaluations/*/record.json"))
    victim.write_text(victim.read_text() + " ")
    with pytest.raises(ReqatError, match="not the file.*restore it from git"):
        pin.verify("smoke", paths)


def test_what_is_missing_changed_or_of_other_making_is_not_pinned(paths: Paths):
    plan = load("smoke", paths)
    run(plan, paths)
    some = list(plan.evaluations)[0]
    parent = plan.stage(plan.evaluation(some).stage)

    aside = paths.evaluation(plan.evaluation(some))
    aside.rename(aside.with_name("aside"))
    with pytest.raises(ReqatError, match=rf"cannot be pinned:\n.*{some}: no record"):
        pin.pin(plan, paths)
    aside.with_name("aside").rename(aside)

    weights = paths.stage(parent) / "weights"
    weights.write_text("x" * len(parent.id))
    with pytest.raises(ReqatError, match="weights is not the file"):
        pin.pin(plan, paths)
    weights.write_text(parent.id)

    path = aside / "record.json"
    entry = json.loads(path.read_text())
    path.write_text(json.dumps(entry | {"config": entry["config"] | {"seeds": [0, 1, 2]}}))
    with pytest.raises(ReqatError, match="another configuration"):
        pin.pin(plan, paths)
    path.write_text(json.dumps(entry | {"inputs": {"parent": {"id": parent.id, "sha256": "0" * 64}}}))
    with pytest.raises(ReqatError, match="made from another parent"):
        pin.pin(plan, paths)
    assert not (paths.results / "smoke").exists()
    path.write_text(json.dumps(entry))
    pin.pin(plan, paths)


def test_a_dirty_tree_is_pinned_only_on_request_and_that_is_recorded(paths: Paths, monkeypatch: pytest.MonkeyPatch):
    plan = load("smoke", paths)
    monkeypatch.setattr(provenance, "commit", lambda root: {"commit": "c" * 40, "source": "s1", "dirty": True})
    run(plan, paths)
    with pytest.raises(ReqatError, match=r"uncommitted changes.*--allow-dirty"):
        pin.pin(plan, paths)
    folder = pin.pin(plan, paths, allow_dirty=True)
    stated = json.loads((folder / "pin.json").read_text())
    assert stated["dirty"] is True and stated["allow_dirty"] is True


def test_the_same_run_compares_equal_and_one_changed_outcome_is_found(paths: Paths):
    plan = load("smoke", paths)
    run(plan, paths)
    pin.pin(plan, paths)
    found = compare.compare(plan, paths)
    assert (
        {c.tolerance for c in found} == {"equal"} and all(c.ok for c in found) and len(found) == len(plan.evaluations)
    )

    some = paths.evaluation(plan.evaluation(next(iter(plan.evaluations))))
    altered = outcomes(0.5)
    altered.correct[3] ^= True
    altered.to_parquet(some / "outcomes.parquet", overwrite=True)
    entry = json.loads((some / "record.json").read_text())
    record.write(some / "record.json", entry | {"outputs": record.outputs(some)})
    assert [c.ok for c in compare.compare(plan, paths)].count(False) == 1
    assert "MISMATCH" in compare.report(compare.compare(plan, paths))


@pytest.mark.parametrize(
    ("source", "share", "seed", "tolerance", "ok"),
    [
        ("s2", 0.5, 1, "interval", True),  # other code, other draws: the same within the interval
        ("s2", 0.95, 1, "interval", False),
        ("s1", 0.5, 0, "equal", True),  # another commit of the same code
        ("s1", 0.5, 1, "equal", False),
    ],
)
def test_another_version_is_held_to_intervals_and_the_same_one_to_equality(
    paths: Paths, monkeypatch: pytest.MonkeyPatch, source: str, share: float, seed: int, tolerance: str, ok: bool
):
    plan = load("smoke", paths)
    run(plan, paths, 0.5, seed=0)
    pin.pin(plan, paths)
    monkeypatch.setattr(provenance, "commit", lambda root: {"commit": "d" * 40, "source": source, "dirty": False})
    run(plan, paths, share, seed=seed)
    found = compare.compare(plan, paths)
    assert {c.tolerance for c in found} == {tolerance} and {c.ok for c in found} == {ok}
    assert all(c.lo <= c.difference <= c.hi and c.n == N for c in found)


@pytest.mark.parametrize("key", ["id", "source", "native", "versions", "threads", "inputs", "hardware", "dirty"])
def test_arithmetic_is_the_same_only_if_nothing_that_computes_differs(key: str):
    one = {
        "id": "e", "source": "s", "native": {"fingerprint": "f", "instruction_set": "avx2"}, "versions": {"torch": "2"},
        "threads": 1, "inputs": {}, "hardware": {"device": "cpu", "cpu": "a", "gpus": []}, "dirty": False,
    }  # fmt: skip
    other = {
        "native": {"fingerprint": "g", "instruction_set": "avx2"}, "versions": {"torch": "3"}, "inputs": {"p": 1},
        "hardware": {"device": "cpu", "cpu": "b", "gpus": []}, "dirty": True,
    }  # fmt: skip
    assert compare.same_arithmetic(one, dict(one))
    assert not compare.same_arithmetic(one, one | {key: other.get(key, "another")})
    without = {k: v for k, v in one.items() if k != "native"}  # of a version that did not record it
    assert not compare.same_arithmetic(one, without)


def test_comparing_what_is_not_there(paths: Paths):
    plan = load("smoke", paths)
    with pytest.raises(ReqatError, match=r"tier 'smoke'.*none yet"):
        compare.compare(plan, paths)
    run(plan, paths)
    pin.pin(plan, paths)
    shutil.rmtree(paths.evaluation(plan.evaluation(next(iter(plan.evaluations)))))
    with pytest.raises(ReqatError, match="nothing finished here"):
        compare.compare(plan, paths)


def test_base_is_pinned_under_8_megabytes_and_then_known_by_its_weights(paths: Paths):
    from reqat.config import pinned_base

    plan = load("smoke", paths)
    stage = plan.stage(plan.scratch["testbed"])

    def train(size: int) -> None:
        with record.job(
            "base", stage.id, stage, root=paths.root, out=paths.stage(stage), partial=paths.partial(stage.id)
        ) as job:
            (job.partial / "model").mkdir()
            (job.partial / "model" / "model.safetensors").write_bytes(b"0" * size)

    assert pinned_base(paths) is None
    train(9 * 2**20)
    with pytest.raises(ReqatError, match=r"9\.0 MiB.*8 MiB.*bfloat16"):
        pin.pin_base(plan, "testbed", paths)
    assert not paths.base.exists()
    train(100)
    folder = pin.pin_base(plan, "testbed", paths)
    assert pinned_base(paths) == record.sha256(folder / "model" / "model.safetensors")
    record.verify(folder)
    tier = yaml.safe_load((paths.config / "tiers/smoke.yaml").read_text())
    tier["models"]["testbed"]["source"] = "pinned"
    (paths.config / "tiers/smoke.yaml").write_text(yaml.safe_dump(tier))
    base = load("smoke", paths)
    assert paths.stage(base.stage(base.bases["testbed"])) == folder
    (folder / "record.json").write_text("{}")
    with pytest.raises(ReqatError, match="base checkpoint"):
        load("smoke", paths)
