"""Pinning a finished run and holding a fresh one against it, on a made-up run of a small plan."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from analysis.build import build_tables
from analysis.registry import table_names
from reqat.config import Paths, Plan, ReqatError, load
from reqat.config.paths import made
from reqat.evaluation import Outcomes
from reqat.pipeline import compare, pin
from reqat.records import pinned, provenance, record

ROOT = Path(__file__).parents[2]
N = 60


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Paths:
    """A checkout with a tier of a few cells; its tree counts as clean."""
    shutil.copytree(ROOT / "config", tmp_path / "config")
    tier = yaml.safe_load((tmp_path / "config/tiers/smoke.yaml").read_text())
    tier |= {"only": {"recipes": ["base", "ptq", "reqat-t"], "precisions": ["NVFP4-W4A4KV4"]}}
    tier["evaluation"] = {"n": N, "seeds": [0, 1]}
    tier["models"]["testbed"]["artifacts"] = ["table1"]
    (tmp_path / "config/tiers/smoke.yaml").write_text(yaml.safe_dump(tier))
    monkeypatch.setattr(provenance, "commit", lambda root: {"commit": "c" * 40, "source": "s1", "dirty": False})
    monkeypatch.setattr("analysis.build.build_figures", lambda *_, **options: [])  # they cost seconds
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
    folder = pin.pin(plan, paths, name="2026-01-02-smoke")
    assert folder == paths.results / "2026-01-02-smoke"
    drawn = {f"tables/{name}.csv" for name in table_names(plan)}
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
        *drawn, "manifest.json", "plan.json", "records.parquet", "outcomes.parquet"
    }  # fmt: skip
    stated = pinned.manifest(folder)
    assert pinned.verify(folder) == len(stated["files"]) == len(drawn) + 3
    (part,) = stated["parts"].values()
    jobs = len(plan.needed) + len(plan.evaluations)
    assert part["dirty"] is False and part["commits"] == ["c" * 40] and part["jobs"] == jobs
    assert str(paths.root) not in (folder / "manifest.json").read_text()
    texts = pq.read_table(folder / "records.parquet").to_pandas()
    assert len(texts) == jobs and not any(str(paths.root) in text for text in texts["record"])
    rows = pq.read_table(folder / "outcomes.parquet").to_pandas()
    assert set(rows["id"]) == set(plan.evaluations) and rows["response"].isna().all()


def test_training_seeds_that_were_run_apart_are_pinned_as_one(paths: Paths):
    file = paths.config / "tiers/smoke.yaml"
    tier = yaml.safe_load(file.read_text())
    tier["claim_seeds"] = {"seeds": [0, 1], "recipes": ["reqat-t"], "precisions": ["NVFP4-W4A4KV4"]}
    file.write_text(yaml.safe_dump(tier))
    plan = load("smoke", paths)
    for seed in (0, 1):
        cells = [cell for cell in plan.cells if cell.training_seed == seed]
        asked = {id: e for id, e in plan.evaluations.items() if id in {cell.evaluation for cell in cells}}
        apart = dataclasses.replace(paths, build=Path(f"build-{seed}"))
        part = dataclasses.replace(plan, evaluations=asked, cells=cells)
        assert set(asked) < set(plan.evaluations) and set(part.needed) < set(plan.needed)
        run(part, apart, seed=seed)
        with pytest.raises(ReqatError):
            pin.pin(plan, apart)
        for folder in ("data", "stages", "evaluations"):
            shutil.copytree(apart.work / folder, paths.work / folder, dirs_exist_ok=True)
    folder = pin.pin(plan, paths)
    assert pinned.manifest(folder)["parts"]["run"]["jobs"] == len(plan.needed) + len(plan.evaluations)


def test_what_was_folded_comes_back_byte_by_byte(paths: Paths):
    plan = load("smoke", paths)
    run(plan, paths)
    folder = pin.pin(plan, paths)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-smoke", folder.name)
    stated = pinned.manifest(folder)["originals"]
    with pinned.restored(folder, "run") as kept:
        assert kept.plan.dump() == plan.dump()
        back = {path.relative_to(kept.root).as_posix(): path for path in kept.root.rglob("*") if path.is_file()}
        assert back.keys() == stated.keys(), "records and outcomes, and no weights"
        for name, path in back.items():
            original = paths.work / name
            assert stated[name] == record.entry(original), name
            if path.name == "record.json":
                assert path.read_bytes() == original.read_bytes(), name
                continue
            # An oracle that knows nothing of folding: the same rows without text, written by `Outcomes` itself.
            without = dataclasses.replace(Outcomes.from_parquet(original), response=None)
            without.to_parquet(paths.root / "without.parquet", overwrite=True)
            assert path.read_bytes() == (paths.root / "without.parquet").read_bytes(), name
            assert Outcomes.from_parquet(path).digest == without.digest, "the seal holds"
        assert kept.records == {found["id"]: found for found in map(record.read, (p.parent for p in back.values()))}
        written = build_tables(kept.plan, kept.root, paths.root / "again", pinned=True, paths=paths)
    for path in written:
        if path.suffix == ".csv":
            assert path.read_bytes() == (folder / "tables" / path.name).read_bytes(), path.name


def test_a_pinned_run_is_never_written_again(paths: Paths):
    plan = load("smoke", paths)
    run(plan, paths)
    folder = pin.pin(plan, paths)
    before = record.files(folder)
    with pytest.raises(ReqatError, match=f"{folder.name} is there already.*--name"):
        pin.pin(plan, paths)
    assert record.files(folder) == before
    for name in ("smoke", "2026-01-02", "../2026-01-02-smoke", "2026-01-02-a/b"):
        with pytest.raises(ReqatError, match="--name"):
            pin.pin(plan, paths, name=name)
    (paths.results / "2026-01-02-link").symlink_to(paths.root)
    with pytest.raises(ReqatError, match="2026-01-02-link is a link"):
        pin.pin(plan, paths, name="2026-01-02-link")
    with pytest.raises(ReqatError, match="--figure figure9"):
        pin.pin(plan, paths, name="2026-01-02-smoke", figures=["figure9"])
    assert sorted(path.name for path in paths.results.iterdir()) == ["2026-01-02-link", folder.name]


@pytest.mark.parametrize("name", ["records.parquet", "outcomes.parquet", "plan.json", "tables"])
def test_a_damaged_file_is_named(paths: Paths, name: str):
    plan = load("smoke", paths)
    run(plan, paths)
    folder = pin.pin(plan, paths)
    victim = next((folder / name).iterdir()) if name == "tables" else folder / name
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    with pytest.raises(ReqatError, match=rf"{victim.name} is not the file.*git"), pinned.restored(folder, "run"):
        pass
    victim.unlink()
    with pytest.raises(ReqatError, match=f"{victim.name} is not the file"):
        compare.compare(plan, paths)


@pytest.mark.parametrize("change", [{"files": 3}, {"parts": {"run": {}}}, {"schema": "other"}, {"tier": None}])
def test_a_manifest_that_is_none_is_refused(paths: Paths, change: dict[str, object]):
    plan = load("smoke", paths)
    run(plan, paths)
    path = pin.pin(plan, paths) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ReqatError, match="manifest.json.*git"):
        pinned.find("smoke", "run", paths)


def test_a_tier_uses_what_was_finished_last(paths: Paths):
    plan = load("smoke", paths)
    with pytest.raises(ReqatError, match=r"tier 'smoke'.*none yet"):
        pinned.find("smoke", "run", paths)
    run(plan, paths)
    first = pin.pin(plan, paths, name="2026-12-31-smoke")
    assert pinned.find("smoke", "run", paths) == first
    for entry in paths.work.glob("*/*/record.json"):  # as if it were run again on a later day
        entry.write_text(re.sub(r'("finished": ")\d{4}', r"\g<1>2999", entry.read_text()))
    second = pin.pin(plan, paths, name="2026-12-30-smoke")
    assert pinned.find("smoke", "run", paths) == second
    assert pinned.newest(paths) == {("smoke", "run"): second}
    with pytest.raises(ReqatError, match="no pinned benchmark of tier 'smoke'.*--what benchmark"):
        pinned.find("smoke", "benchmark", paths)
    with pytest.raises(ReqatError, match="tier 'laptop'.*smoke"):
        pinned.find("laptop", "run", paths)


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
    assert not paths.results.exists()
    path.write_text(json.dumps(entry))
    pin.pin(plan, paths)


def test_a_dirty_tree_is_pinned_only_on_request_and_that_is_recorded(paths: Paths, monkeypatch: pytest.MonkeyPatch):
    plan = load("smoke", paths)
    monkeypatch.setattr(provenance, "commit", lambda root: {"commit": "c" * 40, "source": "s1", "dirty": True})
    run(plan, paths)
    with pytest.raises(ReqatError, match=r"uncommitted changes.*--allow-dirty"):
        pin.pin(plan, paths)
    folder = pin.pin(plan, paths, allow_dirty=True)
    stated = pinned.manifest(folder)
    assert stated["parts"]["run"]["dirty"] is True and stated["allow_dirty"] is True


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
    with pytest.raises(ReqatError, match="there already"):
        pin.pin_base(plan, "testbed", paths)
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
