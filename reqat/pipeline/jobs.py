"""Stages and evaluations of a plan as jobs: lock, check inputs, run, record."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reqat.config import resources
from reqat.config.base import digest
from reqat.config.errors import ReqatError
from reqat.config.files import exclusive
from reqat.config.paths import Paths, made
from reqat.config.plan import Plan
from reqat.config.policy import Decoding
from reqat.config.stage import BaseSettings, DataSettings, Evaluation, ProblemSet, Stage, TrainSettings
from reqat.records import provenance, record

if TYPE_CHECKING:
    from reqat.evaluation import Outcomes
    from reqat.tasks import Problem
    from reqat.tasks.problem_files import Given

OUTCOMES = "outcomes.parquet"
# Inputs up to this size are hashed before they are used; larger ones are checked by size.
_HASH_BYTES = 2 * 2**30


@contextlib.contextmanager
def running(
    kind: str,
    id: str,
    settings: Any,
    out: Path,
    paths: Paths,
    *,
    tier: str,
    force: bool,
    done: Callable[[Path, str], bool] | None = None,
) -> Iterator[record.Job | None]:
    """A job of a plan under an exclusive lock, whatever its kind; None if its result is there (`done`, by default
    `finished`) and `force` does not ask for it anew.

    The body checks its inputs, works in `job.partial` and sets what the record says; then the result appears at `out`.
    Raises `ReqatError` if another process holds the lock.
    """
    with exclusive(paths.work / "locks" / id, id):
        checkpoints = paths.checkpoints(id)
        if _older(checkpoints, out / record.FILE):
            # Of the training that made the result, whose process was killed before it could remove it: going on from
            # it would train nothing.
            shutil.rmtree(checkpoints, ignore_errors=True)
        if not force and (done or finished)(out, id):
            print(f"{id}: already there")
            yield None
            return
        with record.job(kind, id, settings, root=paths.root, out=out, partial=paths.partial(id), tier=tier) as job:
            yield job
        shutil.rmtree(checkpoints, ignore_errors=True)  # only now: the result is there
    print(f"{id}: done, {out}")


def _older(folder: Path, result: Path) -> bool:
    """Whether everything in a folder was written before a result."""
    if not folder.is_dir() or not result.is_file():
        return False
    return all(path.stat().st_mtime <= result.stat().st_mtime for path in (folder, *folder.rglob("*")))


def run_stage(plan: Plan, id: str, paths: Paths, *, progress: bool = True, force: bool = False) -> None:
    """Run one stage of a plan, unless its result is there. Raises `ReqatError` if an input is missing or not what it
    was."""
    todo = plan.stage(id)
    if not made(todo):
        raise ReqatError(
            f"{id} is the pinned base in {paths.stage(todo)}; no job makes it. `snakemake base` trains one anew."
        )
    with running(todo.kind, id, todo, paths.stage(todo), paths, tier=plan.tier.name, force=force) as job:
        if job is None:
            return
        inputs, job.inputs = input_folders(plan, todo.inputs, paths)
        if todo.kind not in ("data", "base"):
            _require(plan, "training" if isinstance(todo.settings, TrainSettings) else "calibrating")
        job.seeds = [todo.seed] if todo.seed is not None else []
        if isinstance(todo.settings, BaseSettings) and todo.settings.source == "path":
            link_base(todo.settings, paths, job.partial)
        elif isinstance(todo.settings, DataSettings) and todo.settings.own is not None:
            processes = plan.tier.resources.threads
            job.metrics = _import_traces(todo, inputs["parent"], paths, job.partial, processes, progress)
            job.inputs["traces"] = {"id": todo.settings.source, "sha256": todo.settings.own.sha256}
        else:
            from reqat.pipeline.stages import carry_out

            job.resumed = trained_before(paths.checkpoints(id))
            job.metrics = carry_out(todo, inputs, job.partial, checkpoints=paths.checkpoints(id), progress=progress)


def run_evaluation(plan: Plan, id: str, paths: Paths, *, progress: bool = True, force: bool = False) -> None:
    """Run one evaluation of a plan, or the part of one, unless its result is there; killed, the next attempt goes on
    with the batches that were not decoded. An evaluation in parts is put together from them; those that are not there
    are run first. Raises like `run_stage`."""
    todo, parts = plan.evaluation(id), plan.shards(id)
    for part in parts:
        run_evaluation(plan, part, paths, progress=progress, force=force)
    with running("evaluation", id, todo, paths.evaluation(id), paths, tier=plan.tier.name, force=force) as job:
        if job is None:
            return
        inputs, job.inputs = input_folders(plan, todo.inputs, paths)
        if (of := todo.problems.benchmark) is not None:
            job.inputs["problems"] = {"id": f"{of.name}.jsonl", "sha256": of.sha256}
        job.seeds = list(todo.seeds)
        if parts:
            job.metrics = _put_together(todo, parts, paths, job)
            return
        _require(plan, "evaluating")
        # Named by the weights: a stage may be trained again between a kill and the next attempt.
        kept = paths.checkpoints(id) / digest(job.inputs, 16)
        job.resumed = holds_parts(kept)
        asked = asked_problems(todo.problems, paths)
        job.metrics = _evaluate(todo, id, asked, inputs, job.partial, kept, progress)


def holds_parts(folder: Path) -> bool:
    """Whether an earlier attempt left whole parts (batches, conditions) in the folder that it kept them in."""
    return any(folder.rglob("*.json"))


def trained_before(checkpoints: Path) -> bool:
    """Whether a training goes on from a checkpoint there; it refuses one of other weights or settings."""
    from reqat.training import checkpoint

    return checkpoint.newest(checkpoints) is not None


def link_base(settings: BaseSettings, paths: Paths, out: Path) -> None:
    """Fill `out/model` with links to the files of a local model that loading reads.

    The files are outputs of the stage like those of any other: its record has their sha256, and a stage that reads the
    model finds out when they are others. Raises `ReqatError` if there is no model in the folder.
    """
    from reqat.models.folder import files_read

    assert settings.reference is not None
    folder = paths.models_folder() / settings.reference
    if not (folder / "config.json").is_file():
        raise ReqatError(
            f"{folder}: no model there (config.json, *.safetensors). Put {settings.reference} under "
            f"{paths.models_folder()}, or name another folder with --models or REQAT_MODELS."
        )
    for path in files_read(folder.resolve()):
        link = out / "model" / path.relative_to(folder.resolve())
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)


def finished(out: Path, id: str) -> bool:
    """Whether `out` holds the complete result of `id`; anything else there will be replaced."""
    try:
        record.verify(out, id=id, deep=False)
    except ReqatError:
        return False
    return True


def input_folders(plan: Plan, roles: dict[str, str], paths: Paths) -> tuple[dict[str, Path], dict[str, Any]]:
    """Folder of each role, and what the record says of it; each checked to be the whole result of the stage it should
    be."""
    folders, digests = {}, {}
    for role, id in roles.items():
        given = plan.stage(id)
        folder = paths.stage(given)
        if not (folder / record.FILE).is_file():
            verb = "pin --what base" if not made(given) else f"{'data' if given.kind == 'data' else 'stage'} {id}"
            how = f"reqat {verb} --tier {plan.tier.name}"
            raise ReqatError(f"{folder}: {role} {id} is not there; make it first ({how}).")
        found = record.read(folder)
        size = sum(entry["bytes"] for entry in found["outputs"].values())
        record.verify(folder, id=id if made(given) else None, deep=size <= _HASH_BYTES)
        folders[role] = folder
        digests[role] = {"id": id, "sha256": record.outputs_digest(found)}
    return folders, digests


def _require(plan: Plan, job: resources.Job) -> None:
    """Raise ReqatError for a job that needs more memory than it was given, before anything is loaded."""
    if plan.tier.resources.device == "cuda":
        import torch  # noqa: F401  (provenance.gpus looks at it)

        sizes = [gpu["memory_bytes"] for gpu in provenance.gpus()]
        resources.require(plan, sizes, provenance.memory_bytes(), job)


def _import_traces(stage: Stage, base: Path, paths: Paths, out: Path, processes: int, progress: bool) -> dict[str, Any]:
    """Make the trace store of a tier's file of traces. Raises `ReqatError` for one of fewer tokens than are asked."""
    from reqat.pipeline.generated import MODEL
    from reqat.pipeline.imported import import_store

    settings = stage.settings
    assert isinstance(settings, DataSettings) and settings.own is not None
    file = paths.data_folder() / settings.source
    cache = paths.partial(f"{stage.id}-cache")
    found = import_store(str(file), settings.own, base / MODEL, out, cache, processes=processes, progress=progress)
    if found["tokens"] < settings.tokens:
        raise ReqatError(
            f"{file}: {found['traces']} traces of {found['tokens']:,} tokens ({found['left_out']} longer than "
            f"{found['row_tokens']} left out), and {settings.tokens:,} are asked for; add traces, or lower data.tokens."
        )
    return found


def _put_together(todo: Evaluation, parts: Iterable[str], paths: Paths, job: record.Job) -> dict[str, Any]:
    from reqat.evaluation import Outcomes
    from reqat.pipeline.shards import finished_parts

    read, about = finished_parts(parts, paths, job)
    asked = asked_problems(todo.problems, paths)
    outcomes = Outcomes.joined(read, [problem.id for problem in asked], todo.seeds)
    outcomes.to_parquet(job.partial / OUTCOMES)
    return graded(outcomes, {problem.id: problem for problem in asked}) | {"parts": about}


def asked_problems(asked: ProblemSet, paths: Paths) -> list[Problem] | list[Given]:
    """The problems of an evaluation. Raises `ReqatError` for a benchmark's file that is missing, damaged, or not the
    one that the plan was made with."""
    if asked.benchmark is not None:
        from reqat.tasks.benchmarks import read_benchmark

        file = paths.data_folder() / f"{asked.benchmark.name}.jsonl"
        return read_benchmark(file, asked.n, sha256=asked.benchmark.sha256)
    from reqat.tasks import problems

    return problems(asked.families, asked.split, asked.n, asked.seed)


def _evaluate(
    todo: Evaluation,
    id: str,
    asked: Sequence[Problem | Given],
    inputs: dict[str, Path],
    out: Path,
    kept: Path,
    progress: bool,
) -> dict[str, Any]:
    from reqat import evaluation
    from reqat.evaluation.loading import AUTOCAST, load_at
    from reqat.models import load_tokenizer
    from reqat.models.prepare import calibrate_static

    folder = inputs["parent"] / "model"
    model = load_at(folder, todo.precision.name, override=True, **todo.precision.for_prepare())
    tokenizer = load_tokenizer(folder)
    if todo.calibration is not None:
        from reqat.pipeline.stages import calibration_ids

        calibrate_static(model, calibration_ids(inputs["data"], tokenizer, todo.calibration).split(8))
    how = todo.decoding
    decoding = Decoding.greedy() if how.greedy else Decoding.sample(how.temperature, how.top_p)
    outcomes = evaluation.evaluate(
        model,
        tokenizer,
        asked,
        seeds=todo.seeds,
        decoding=decoding,
        max_new_tokens=how.max_new_tokens,
        batch_rows=how.batch_rows,
        autocast=AUTOCAST[how.autocast],
        kept=kept,
        progress=id if progress else False,
    )
    outcomes.to_parquet(out / OUTCOMES)
    return graded(outcomes, {problem.id: problem for problem in asked})


def graded(outcomes: Outcomes, asked: Mapping[str, Problem | Given]) -> dict[str, Any]:
    """What a record says of outcomes; ``asked`` are the problems by id, those whose responses can be malformed."""
    from reqat import evaluation
    from reqat.tasks.problem_files import malformed

    estimate = evaluation.accuracy(outcomes)
    assert outcomes.response is not None
    answers = zip(outcomes.problem_id, outcomes.response, strict=True)
    unread = sum(malformed(asked[id], text) for id, text in answers if id in asked)
    return {
        "accuracy": estimate.value,
        "accuracy_lo": estimate.lo,
        "accuracy_hi": estimate.hi,
        "accuracy_by_family": {name: e.value for name, e in evaluation.accuracy_by_family(outcomes).items()},
        "problems": outcomes.n_problems,
        "responses": len(outcomes),
        "unfinished": outcomes.n_unfinished,
        "malformed": unread,
        "mean_tokens": float(outcomes.n_tokens.mean()),
        "outcomes_digest": outcomes.digest,
    }
