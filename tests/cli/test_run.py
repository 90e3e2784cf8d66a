"""The verbs that compute, for real, on a model of a few thousand weights: from traces to a graded FP4 model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from reqat.cli.main import main
from reqat.config import Paths, Plan, ReqatError, load_catalogue, load_tier, plan
from reqat.config.base import merge, parse
from reqat.config.tier import Tier
from reqat.evaluation import Outcomes
from reqat.pipeline.jobs import run_evaluation, run_stage
from reqat.records import record

ROOT = Path(__file__).parents[2]
FAMILIES = {"chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}}
TRAINING = {"rows_per_batch": 4, "row_tokens": 192}
TINY = {
    "only": {"recipes": ["base", "ptq", "reqat-tq"], "precisions": ["NVFP4-W4A4KV4"]},
    "models": {"testbed": {"artifacts": ["ptq", "global-scale"], "scratch": {"tokens": 4000, "training": TRAINING}}},
    "data": {"tokens": 4000},
    "train": {"finetune": TRAINING, "qat": TRAINING},
    "budget": {"qat_tokens": 1000},
    "qfit": {"grid": 2},
    "evaluation": {"n": 3, "seeds": [0, 1], "decoding": {"max_new_tokens": 6}},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Paths]:
    """A tiny plan, carried out."""
    tier = merge(load_tier("smoke", ROOT / "config").model_dump(mode="json"), TINY)
    tier["data"]["families"] = tier["models"]["testbed"]["scratch"]["data"]["families"] = FAMILIES
    tier["models"]["testbed"]["scratch"]["data"]["tokens"] = 4000
    tiny = plan(parse(Tier, tier, "tiny"), load_catalogue(ROOT / "config"))
    paths = Paths(root=tmp_path_factory.mktemp("checkout"))
    for id in tiny.needed:
        run_stage(tiny, id, paths, progress=False)
    for id in tiny.evaluations:
        run_evaluation(tiny, id, paths, progress=False)
    return tiny, paths


def test_every_job_leaves_a_whole_result_and_nothing_else(made: tuple[Plan, Paths]):
    tiny, paths = made
    assert {stage.kind for stage in tiny.needed.values()} == {"data", "base", "finetune", "qfit", "qat"}
    for id, stage in tiny.needed.items():
        found = record.verify(paths.stage(stage), id=id)
        assert {role: given["id"] for role, given in found["inputs"].items()} == stage.inputs
        if stage.budget_tokens:
            assert found["metrics"]["tokens"] >= stage.budget_tokens
    for id, evaluation in tiny.evaluations.items():
        found = record.verify(paths.evaluation(evaluation), id=id)
        outcomes = Outcomes.from_parquet(paths.evaluation(evaluation) / "outcomes.parquet")
        assert len(outcomes) == 6 and outcomes.seeds == (0, 1) and found["metrics"]["responses"] == 6
        assert found["metrics"]["malformed"] == sum("answer is" not in text for text in outcomes.response)
    assert not list((paths.work / "partial").iterdir()) and not list((paths.work / "checkpoints").glob("*"))


def test_all_modes_of_the_global_scale_were_evaluated(made: tuple[Plan, Paths]):
    tiny, _ = made
    modes = {e.precision.global_scale for e in tiny.evaluations.values() if e.precision.name != "BF16"}
    assert modes == {"dynamic", "row", "static"}


def test_what_is_there_is_not_done_again(made: tuple[Plan, Paths], capsys: pytest.CaptureFixture[str]):
    tiny, paths = made
    id = next(iter(tiny.evaluations))
    before = (paths.evaluation(tiny.evaluation(id)) / "record.json").read_bytes()
    run_evaluation(tiny, id, paths)
    assert capsys.readouterr().out == f"{id}: already there\n"
    run_evaluation(tiny, id, paths, progress=False, force=True)
    after = (paths.evaluation(tiny.evaluation(id)) / "record.json").read_bytes()
    assert before != after
    assert record.read(paths.evaluation(tiny.evaluation(id)))["outputs"]  # the same outcomes, written anew


def test_a_checkpoint_of_another_model_is_refused(made: tuple[Plan, Paths], tmp_path: Path):
    tiny, paths = made
    last = next(stage for stage in tiny.needed.values() if stage.kind == "qat")
    parent = tiny.stage(str(last.parent))
    aside, other = paths.stage(parent), paths.stage(tiny.stage(tiny.bases["testbed"]))
    aside.rename(tmp_path / "aside")
    aside.symlink_to(other.resolve())
    try:
        with pytest.raises(ReqatError, match=f"{other.name}, not {parent.id}"):
            run_stage(tiny, last.id, paths, force=True)
    finally:
        aside.unlink()
        (tmp_path / "aside").rename(aside)


def test_a_training_whose_result_cannot_be_written_is_not_trained_again(
    made: tuple[Plan, Paths], monkeypatch: pytest.MonkeyPatch
):
    tiny, paths = made
    last = next(stage for stage in tiny.needed.values() if stage.kind == "qat")
    before = record.read(paths.stage(last))
    with monkeypatch.context() as patched:
        patched.setattr(record, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(ReqatError, match="space"):
            run_stage(tiny, last.id, paths, progress=False, force=True)
    assert record.read(paths.stage(last)) == before, "what was there stays"
    assert paths.checkpoints(last.id).exists()
    with monkeypatch.context() as patched:
        patched.setattr("torch.optim.AdamW.step", lambda *_, **__: pytest.fail("a step was taken again"))
        run_stage(tiny, last.id, paths, progress=False, force=True)
    after = record.read(paths.stage(last))
    assert after["resumed"] and record.outputs_digest(after) == record.outputs_digest(before)
    assert not paths.checkpoints(last.id).exists()


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_quantize_writes_a_model_that_loads_and_comes_back_as_it_was(
    made: tuple[Plan, Paths],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    method: str,
):
    import torch

    from reqat.models import freeze, load_model, prepare

    tiny, paths = made
    monkeypatch.chdir(tmp_path)  # the verb needs no repository around it
    base = tiny.stage(tiny.bases["testbed"])
    model = paths.model(base).resolve()
    store = next(paths.stage(s).resolve() for s in tiny.needed.values() if s.kind == "data" and s.parent)
    arguments = [
        "quantize",
        "--model",
        str(model),
        "--precision",
        "NVFP4-W4A4KV4",
        "--out",
        "out",
        "--method",
        method,
        "-q",
    ]
    arguments += ["--calibration", str(store), "--sequences", "4", "--sequence-tokens", "32"]
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert not end.value.code, capsys.readouterr().err
    entry = record.verify(Path("out"), id="out")
    assert (
        entry["kind"] == "quantize"
        and entry["config"]["precision"] == "NVFP4-W4A4KV4"
        and str(tmp_path) not in str(entry)
    )

    quantized, plain = (load_model(folder) for folder in (Path("out/model"), model))
    for each in (quantized, plain):
        prepare(each, "NVFP4-W4A4KV4")
        freeze(each)
    ids = torch.arange(3, 19)[None]
    a, b = quantized(ids).logits, plain(ids).logits
    assert torch.isfinite(a).all()
    assert torch.equal(a, b) is (method == "rtn")

    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2 and "out is there already" in capsys.readouterr().err
    before = (Path("out") / record.FILE).stat().st_mtime_ns
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--force"])
    assert not end.value.code and (Path("out") / record.FILE).stat().st_mtime_ns > before


def test_a_checkpoint_that_a_kill_left_beside_its_result_is_no_start(made: tuple[Plan, Paths]):
    tiny, paths = made
    last = next(stage for stage in tiny.needed.values() if stage.kind == "qat")
    left = paths.checkpoints(last.id)
    for force in (False, True):
        left.mkdir(parents=True)
        (left / "state").write_text("of the training that made the result")
        result = (paths.stage(last) / record.FILE).stat().st_mtime
        for path in (left / "state", left):
            os.utime(path, (result - 1, result - 1))
        run_stage(tiny, last.id, paths, progress=False, force=force)
        assert not left.exists()
    assert not record.read(paths.stage(last))["resumed"]
    left.mkdir(parents=True)  # newer than the result: of a forced run that was stopped
    run_stage(tiny, last.id, paths, progress=False)
    assert left.exists()
    left.rmdir()
