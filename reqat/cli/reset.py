"""Verbs of ReSET: `fit-reset` measures its threshold on held-out problems, `reset` grades it beside plain decoding."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import reqat
from reqat.cli import arguments
from reqat.cli.app import Quiet, Tier, app, session, start_computing
from reqat.cli.arguments import Policy, Problems, Seeds, Threads, seed_list
from reqat.cli.intervene import Force, Out, writing
from reqat.config.decoding import SAMPLE
from reqat.config.targets import making_file
from reqat.pipeline.resets import SCHEMA, fitted_tau0, grade_resets, is_fit, read_fit, reset_decodings
from reqat.pipeline.task import Grading, Task, load, same_tokens, weights
from reqat.records import provenance, record


@app.command("fit-reset")
def fit_reset(
    model: Annotated[str, typer.Option(callback=arguments.model, help="The model's folder.")],
    precision: Annotated[
        str, typer.Option(callback=arguments.precision, help="The precision that it will be used at.")
    ],
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    problems: Annotated[int, typer.Option(min=1, max=arguments.MOST, help="Held-out (validation) problems.")] = 5,
    seeds: Seeds = "0",
    t_low: Annotated[
        float, typer.Option(callback=arguments.positive, help="Temperature where the model is sure.")
    ] = 0.3,
    t_high: Annotated[float, typer.Option(callback=arguments.positive, help="Temperature where it is not.")] = 1.0,
    top_p: Annotated[float, typer.Option(callback=arguments.unit, help="Of the policy.")] = 0.95,
    window: Annotated[
        int, typer.Option(min=1, max=arguments.LONGEST, help="Tokens that stand for a step shorter than that.")
    ] = 32,
    step: Annotated[
        Literal["paragraph", "line", "sentence"], typer.Option(help="What ends a step: paragraph, line or sentence.")
    ] = "paragraph",
    quantile: Annotated[
        float, typer.Option(callback=arguments.share, help="Of the entropies that becomes tau0.")
    ] = 0.8,
    decoding: Policy = SAMPLE,
    tier: Tier = "laptop",
    quiet: Quiet = False,
    threads: Threads = 1,
    force: Force = False,
) -> None:
    """Fit ReSET's tau0 to a quantized model; the file's `policy` is what `--decoding` and `reqat reset` take."""
    used = seed_list(seeds)
    grading = Grading(Task.of_tier(session.plan(tier).tier), 0, used, decoding, problems, quiet)
    rule: dict[str, Any] = {"top_p": top_p, "t_high": t_high, "window": window, "step": step}
    with making_file(out, is_fit, replace=force) as write:
        start_computing(threads)
        from reqat.generation import Decoding

        Decoding.reset(t_low, 0.0, **rule)  # refuses what makes no sense before anything is loaded
        loaded, tokenizer = load(model, precision)
        fit = fitted_tau0(loaded, tokenizer, grading, quantile)
        policy = Decoding.reset(t_low, fit.value, **rule)
        root = Path(reqat.__file__).parents[1]
        made = {
            "schema": SCHEMA,
            "policy": str(policy),
            "tau0": dataclasses.asdict(fit),
            "model": {"folder": model, "weights": weights(model)},
            "precision": precision,
            "tier": tier,
            "decoding": decoding,
            "seeds": used,
            **provenance.commit(root),
            "versions": provenance.versions(),
            "hardware": provenance.hardware(),
            "command": provenance.command(root),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write(record.text(provenance.scrub(made, root)))
    print(f"tau0: {fit}\n{policy}\nwritten: {out}")


@app.command("reset")
def grade_reset(
    model: Annotated[str, typer.Option(callback=arguments.model, help="The model's folder.")],
    fit: Annotated[Path, typer.Option(help="The file that `reqat fit-reset` wrote.")],
    out: Out,
    precision: Annotated[
        str, typer.Option(callback=arguments.precision, help="The quantized model's precision.")
    ] = "NVFP4-W4A4KV4",
    reference: Annotated[
        str | None, typer.Option(callback=arguments.model, help="Folder of the BF16 model (default: the same).")
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            callback=arguments.policy, help="Another decoding of the quantized model: a control. Can be repeated."
        ),
    ] = None,
    tier: Tier = "laptop",
    problems: Problems = 200,
    seeds: Seeds = "0",
    decoding: Policy = SAMPLE,
    quiet: Quiet = False,
    threads: Threads = 1,
    force: Force = False,
) -> None:
    """ReSET's ablation: the quantized model, the same with ReSET, and BF16, on the same problems and seeds."""
    used_seeds, unquantized = seed_list(seeds), reference or model
    grading = Grading(Task.of_tier(session.plan(tier).tier), problems, used_seeds, decoding, quiet=quiet)
    roles = {"model": model, "reference": unquantized}
    with writing("reset", out, roles, used_seeds, force=force, threads=threads) as found:
        decodings = reset_decodings(decoding, {"reset": read_fit(fit)}, also or [])
        for text in decodings.values():
            grading.options("", text)  # refuses a text that is no policy before the first hour
        quantized, tokenizer = load(model, precision)
        plain, other_tokenizer = load(unquantized, "BF16")
        same_tokens(other_tokenizer, tokenizer)
        found.settings = {
            "model": model, "reference": unquantized, "precision": precision, "tier": tier, "problems": problems,
            "decodings": decodings,
        }  # fmt: skip
        grade_resets(found, quantized, plain, tokenizer, grading, decodings)
