"""The verb `export`: a model in the layout of an inference engine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import reqat
from reqat.cli import arguments
from reqat.cli.app import Quiet, app, start_computing
from reqat.cli.arguments import Threads
from reqat.cli.run import Force, read_calibration
from reqat.config.catalogue import EXPORT_FORMATS
from reqat.config.errors import ReqatError
from reqat.config.stage import Calibration
from reqat.records import record


@app.command()
def export(
    model: Annotated[
        str,
        typer.Option(callback=arguments.model, help="A model's folder, dense or quantized by reqat, or package:NAME."),
    ],
    format: Annotated[str, typer.Option(callback=arguments.export_format, help=f"{', '.join(EXPORT_FORMATS)}.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    precision: Annotated[
        str | None, typer.Option(callback=arguments.precision, help="Default: what the folder was quantized to.")
    ] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Pattern of layers to leave alone; may be repeated.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="A text file or a trace store, to measure scales of inputs on.")
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, max=arguments.LONGEST, help="Calibration sequences.")] = 64,
    sequence_tokens: Annotated[int, typer.Option(min=1, max=arguments.LONGEST, help="Tokens of each.")] = 256,
    force: Force = False,
    quiet: Quiet = False,
    threads: Threads = 1,
) -> None:
    """Write a model for vLLM, SGLang, TensorRT-LLM, transformers or llama.cpp."""
    given: list[Path | str] = [model] if calibration is None else [model, calibration]
    root = Path(reqat.__file__).parents[1]
    with record.asked_for("export", out, {}, root=root, force=force, inputs=given) as job:
        start_computing(threads)
        from reqat.data import with_bos
        from reqat.export import check_asked, export_into
        from reqat.models import load_model, load_tokenizer
        from reqat.models.saving import share_files

        if calibration is not None and not calibration.exists():
            raise ReqatError(f"{calibration}: no such calibration text or trace store.")
        if precision is not None:
            check_asked(format, precision)
        loaded, tokenizer = load_model(model), with_bos(load_tokenizer(model))
        batches: Any = None
        if calibration is not None:
            wanted = Calibration(sequences=sequences, sequence_tokens=sequence_tokens)
            batches = read_calibration(calibration, tokenizer, wanted).split(1)
        done = export_into(
            job.partial, loaded, tokenizer, format, precision=precision, skip=skip or None, calibration=batches
        )
        share_files(job.partial)
        job.config = {"model": model, "format": format, "precision": str(done.precision), "skip": skip or []}
        job.metrics = {"layers": done.layers, "notes": list(done.notes)}
    for note in done.notes:
        print(f"reqat: warning: {format}: {note}.", file=sys.stderr)
    if not quiet:
        print(done)
    print(f"written: {out}")
