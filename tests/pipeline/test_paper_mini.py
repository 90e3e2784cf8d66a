"""Tier `paper-mini` job by job, without Snakemake: traces of a file, a benchmark, evaluations in parts, bad input."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from reqat.config import Paths, Plan, ReqatError, load
from reqat.evaluation import Outcomes
from reqat.models import load_model, load_tokenizer, save_model
from reqat.pipeline.jobs import OUTCOMES, asked_problems, run_evaluation, run_stage
from reqat.records import record
from reqat.tasks.answers import grade

ROOT = Path(__file__).parents[2]
TRACES, PROBLEMS = "paper-mini-traces.jsonl", "paper-mini.jsonl"


def tool() -> ModuleType:
    """`tools/paper_mini.py`, which belongs to no package."""
    spec = importlib.util.spec_from_file_location("paper_mini", ROOT / "tools" / "paper_mini.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tier is given: models/, data/, and the configuration."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("mini")
    tool().make(folder / "models", folder / "data")
    (folder / "config").symlink_to(ROOT / "config")
    return folder


def copied(given: Path, to: Path, *left_out: str) -> Paths:
    """The same in a folder of its own, to be damaged; without what is to be made there."""
    shutil.copytree(given, to, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*left_out))
    return Paths(root=to)


def stored(paths: Paths, plan: Plan | None = None) -> tuple[Plan, str]:
    """Base and trace store, made; the plan and the store's id."""
    plan = plan or load("paper-mini", paths)
    (base,) = plan.bases.values()
    (store,) = (id for id, stage in plan.stages.items() if stage.kind == "data")
    run_stage(plan, base, paths, progress=False)
    run_stage(plan, store, paths, progress=False)
    return plan, store


@pytest.fixture(scope="module")
def made(given: Path) -> tuple[Plan, Paths]:
    """Base, store, and an evaluation of the base in two parts."""
    paths = Paths(root=given)
    plan, _ = stored(paths)
    run_evaluation(plan, of_base(plan), paths, progress=False)
    return plan, paths


def of_base(plan: Plan) -> str:
    """The evaluation of the untrained model in BF16."""
    (base,) = plan.bases.values()
    return next(id for id, e in plan.evaluations.items() if e.stage == base and e.precision.name == "BF16")


def test_the_tool_makes_the_same_twice_and_replaces_nothing(given: Path, tmp_path: Path) -> None:
    make = tool().make
    make(tmp_path / "models", tmp_path / "data")
    for name in ("data/" + TRACES, "data/" + PROBLEMS, "models/paper-mini/model.safetensors",
                 "models/paper-mini/tokenizer.json"):  # fmt: skip
        assert (tmp_path / name).read_bytes() == (given / name).read_bytes(), name
    make(tmp_path / "models", tmp_path / "data")
    (tmp_path / "data" / PROBLEMS).write_text("mine")
    with pytest.raises(ReqatError, match=PROBLEMS):
        make(tmp_path / "models", tmp_path / "data")
    assert (tmp_path / "data" / PROBLEMS).read_text() == "mine"


def test_every_trace_of_the_tool_ends_with_its_answer_in_a_box(given: Path) -> None:
    rows = [json.loads(line) for line in (given / "data" / TRACES).read_text().splitlines()]
    for row in rows:
        a, b = (int(word.strip("?")) for word in row["prompt"].splitlines()[0].split() if word.strip("?").isdigit())
        assert grade(row["response"], str(a + b), boxed=True)
    asked = {json.loads(line)["problem"] for line in (given / "data" / PROBLEMS).read_text().splitlines()}
    assert asked.isdisjoint(row["prompt"].splitlines()[0] for row in rows), "no problem is among the traces"


def test_a_store_of_a_file_says_what_it_is_made_of(made: tuple[Plan, Paths]) -> None:
    from reqat.data import TraceStore

    plan, paths = made
    (store,) = (stage for stage in plan.stages.values() if stage.kind == "data")
    found = record.verify(paths.stage(store))
    assert found["inputs"]["traces"] == {"id": TRACES, "sha256": record.sha256(paths.data_folder() / TRACES)}
    traces = TraceStore.read(paths.stage(store)).traces
    assert found["metrics"]["traces"] == len(traces) and found["metrics"]["tokens"] == traces.n_tokens
    tokenizer = load_tokenizer(paths.models_folder() / "paper-mini")
    row = json.loads((paths.data_folder() / TRACES).read_text().splitlines()[0])
    text = tokenizer.decode(traces.tokens(0))
    assert text.count("<think>") == 1, "the template opened it, so the response's own is dropped"
    assert row["prompt"] in text and text.endswith(row["response"].split("</think>")[1] + "<|end|>")


def test_parts_together_are_the_evaluation_of_one_job(made: tuple[Plan, Paths], tmp_path: Path) -> None:
    plan, paths = made
    id = of_base(plan)
    whole = record.verify(paths.evaluation(id), id=id)
    one = copied(paths.root, tmp_path)
    tier = plan.tier.model_copy(update={"resources": plan.tier.resources.model_copy(update={"evaluation_shards": 1})})
    alone = Plan(tier, plan.stages, plan.evaluations, plan.cells, plan.bases)
    shutil.rmtree(one.work / "evaluations")
    run_evaluation(alone, id, one, progress=False)
    a, b = (Outcomes.from_parquet(p.evaluation(id) / OUTCOMES) for p in (paths, one))
    assert a.problem_id == b.problem_id and a.seed.tolist() == b.seed.tolist() and a.digest == b.digest
    single = record.read(one.evaluation(id))
    parts = whole["metrics"].pop("parts")
    assert whole["metrics"] == single["metrics"] and whole["inputs"] == single["inputs"]
    assert sorted(parts) == sorted(plan.shards(id)) and [p["seeds"] for p in parts.values()] == [[0], [1]]
    assert {e["id"] for e in whole["inputs"].values()} == {PROBLEMS, plan.evaluation(id).stage}
    assert not list((one.work / "evaluations").glob("*of*"))


def test_a_part_of_another_model_is_refused(made: tuple[Plan, Paths], tmp_path: Path) -> None:
    plan, paths = made[0], copied(made[1].root, tmp_path)
    id = of_base(plan)
    part = next(iter(plan.shards(id)))
    shutil.rmtree(paths.evaluation(id))
    about = record.read(paths.evaluation(part))
    about["inputs"]["parent"]["sha256"] = "0" * 64
    record.write(paths.evaluation(part) / record.FILE, about)
    with pytest.raises(ReqatError, match=part):
        run_evaluation(plan, id, paths, progress=False)
    assert not paths.evaluation(id).exists()


def test_outcomes_that_lack_a_response_do_not_join(made: tuple[Plan, Paths]) -> None:
    plan, paths = made
    whole = Outcomes.from_parquet(paths.evaluation(of_base(plan)) / OUTCOMES)
    ids, seeds = list(dict.fromkeys(whole.problem_id)), [0, 1]
    halves = [whole.select(whole.seed == seed) for seed in reversed(seeds)]
    assert Outcomes.joined(halves, ids, seeds).digest == whole.digest
    assert Outcomes.joined(halves, ids, seeds).problem_id == whole.problem_id
    with pytest.raises(ReqatError, match="missing"):
        Outcomes.joined(halves[:1], ids, seeds)
    with pytest.raises(ReqatError, match="two outcomes"):
        Outcomes.joined([halves[0], halves[0]], ids, seeds)
    with pytest.raises(ReqatError, match="not asked for"):
        Outcomes.joined([whole], ids, [0])


def test_a_response_without_a_box_is_wrong_and_counted(
    made: tuple[Plan, Paths], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from reqat.evaluation import grading
    from reqat.generation.batches import Generation

    plan, paths = made[0], copied(made[1].root, tmp_path)
    tokenizer = load_tokenizer(paths.models_folder() / "paper-mini")
    id = of_base(plan)
    problems = asked_problems(plan.evaluation(id).problems, paths)
    said = {
        problems[0].id: f"so \\boxed{{{problems[0].answer}}}",
        problems[1].id: f"The answer is {problems[1].answer}.",
        problems[2].id: f"</think> \\boxed{{{problems[2].answer}",
        problems[3].id: "\\boxed{-1}",
    }

    def write(
        model: object, tokenizer_: object, prompts: list, *, row_keys: list[str], **_: object
    ) -> list[Generation]:
        ids = [tokenizer(said[key], add_special_tokens=False)["input_ids"] for key in row_keys]
        return [Generation(tuple(one), True) for one in ids]

    monkeypatch.setattr(grading, "generate", write)
    shutil.rmtree(paths.work / "evaluations")
    run_evaluation(plan, id, paths, progress=False)
    metrics = record.read(paths.evaluation(id))["metrics"]
    assert metrics["accuracy"] == 0.25 and metrics["malformed"] == 2 * len(plan.evaluation(id).seeds)
    assert metrics["accuracy_by_family"] == {"paper-mini": 0.25}


# --- bad input --------------------------------------------------------------------------------------------------------


def without_response(file: Path) -> None:
    lines = file.read_text().splitlines()
    lines[2] = json.dumps({"prompt": "What is 1 + 1?", "response": None})
    file.write_text("\n".join(lines))


def short(file: Path) -> None:
    file.write_text("\n".join(file.read_text().splitlines()[:3]))


def mistyped(file: Path) -> None:
    file.write_text(file.read_text().replace('"response"', '"respones"'))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (without_response, f"{TRACES}, row 3.*no response"),
        (short, rf"{TRACES}: 3 traces.*1,000 are asked for"),
        (mistyped, f"{TRACES}.*respones"),
        (Path.unlink, f"{TRACES}: no such file"),
    ],
)
def test_bad_traces_are_named_and_leave_no_store(
    given: Path, tmp_path: Path, damage: Callable[[Path], object], named: str
) -> None:
    paths = copied(given, tmp_path, "build")
    damage(paths.data_folder() / TRACES)
    with pytest.raises(ReqatError, match=named):
        stored(paths)
    assert not list((paths.work / "data").glob("*/record.json"))


def test_a_file_that_changes_after_the_plan_was_made_is_refused(made: tuple[Plan, Paths], tmp_path: Path) -> None:
    plan, paths = made[0], copied(made[1].root, tmp_path)
    (store,) = (id for id, stage in plan.stages.items() if stage.kind == "data")
    for folder in ("data", "evaluations"):
        shutil.rmtree(paths.work / folder)
    for name in (TRACES, PROBLEMS):
        file = paths.data_folder() / name
        file.write_text(file.read_text() + "\n")
    with pytest.raises(ReqatError, match=f"{TRACES} changed"):
        run_stage(plan, store, paths, progress=False)
    with pytest.raises(ReqatError, match=f"{PROBLEMS} changed"):
        run_evaluation(plan, of_base(plan), paths, progress=False)
    (paths.data_folder() / PROBLEMS).unlink()
    with pytest.raises(ReqatError, match=f"{PROBLEMS}: no such file"):
        run_evaluation(plan, of_base(plan), paths, progress=False)
    assert not list((paths.work / "evaluations").glob("*/record.json"))


def test_a_model_that_is_missing_or_too_small_for_its_tokenizer_is_refused(given: Path, tmp_path: Path) -> None:
    missing = copied(given, tmp_path / "missing", "build")
    shutil.rmtree(missing.models_folder() / "paper-mini")
    with pytest.raises(ReqatError, match="paper-mini: no model there"):
        stored(missing)
    small = copied(given, tmp_path / "small", "build")
    folder = small.models_folder() / "paper-mini"
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    model.resize_token_embeddings(280)
    shutil.rmtree(folder)
    save_model(model, tokenizer, folder)
    with pytest.raises(ReqatError, match="vocabulary has 280"):
        stored(small)
    assert not list((small.work / "data").glob("*/record.json"))


def test_a_model_that_changes_between_stages_is_refused(made: tuple[Plan, Paths], tmp_path: Path) -> None:
    plan, paths = made[0], copied(made[1].root, tmp_path)
    (base,) = plan.bases.values()
    weights = paths.model(plan.stage(base)) / "model.safetensors"
    other = tmp_path / "other.safetensors"
    data = np.frombuffer(weights.read_bytes(), dtype=np.uint8).copy()
    data[-1] ^= 1
    other.write_bytes(data.tobytes())
    weights.unlink()
    weights.symlink_to(other)
    shutil.rmtree(paths.work / "evaluations")
    with pytest.raises(ReqatError, match=r"model\.safetensors.*changed"):
        run_evaluation(plan, of_base(plan), paths, progress=False)
