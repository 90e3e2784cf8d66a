"""Verbs that intervene in decoding: `route` (who chooses sure and unsure tokens), `noise` (what noise does to either).

Each grades several conditions on the same problems and seeds, and writes a folder: `CONDITION.parquet` with the
outcomes, `summary.json` with accuracies, intervals and paired differences from the first condition, and a record.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

import reqat
from reqat.cli import arguments
from reqat.cli.app import Quiet, Tier, app, session, start_computing
from reqat.cli.arguments import Policy, Problems, Seeds, Threads, numbers, seed_list
from reqat.config.decoding import SAMPLE
from reqat.config.errors import unknown
from reqat.pipeline.conditions import Conditions
from reqat.pipeline.interventions import grade_noise, grade_routes, nats, noise_ends
from reqat.pipeline.task import Grading, Task, load, same_tokens, weights
from reqat.records import record

Out = Annotated[Path, typer.Option(help="Folder to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the result of the same verb that is there.")]
Held = Annotated[
    int,
    typer.Option("--held-out", min=1, max=arguments.MOST, help="Validation problems that percentiles are measured on."),
]


@contextlib.contextmanager
def writing(
    kind: str, out: Path, models: dict[str, str], seeds: Sequence[int], *, force: bool, threads: int
) -> Iterator[Conditions]:
    """A job with a record whose inputs are `models` (role -> folder); `add(name, outcomes, ...)` takes conditions, and
    `settings` what the record says of them. Entered before torch is imported and models are loaded."""
    root = Path(reqat.__file__).parents[1]
    with record.asked_for(kind, out, {}, root=root, force=force, inputs=models.values()) as job:
        start_computing(threads)
        conditions = Conditions(job.partial)
        yield conditions
        job.config, job.seeds = conditions.settings, list(seeds)
        job.inputs = {role: {"id": Path(folder).name, "weights": weights(folder)} for role, folder in models.items()}
        job.metrics = conditions.finish()
    print(f"written: {out}")


@app.command()
def route(
    reference: Annotated[
        str, typer.Option(callback=arguments.model, help="Folder of the model whose entropy decides.")
    ],
    out: Out,
    candidate: Annotated[
        str | None, typer.Option(callback=arguments.model, help="Folder of the other model (default: the same).")
    ] = None,
    candidate_precision: Annotated[
        str, typer.Option(callback=arguments.precision, help="The candidate's precision.")
    ] = "NVFP4-W4A4KV4",
    reference_precision: Annotated[
        str, typer.Option(callback=arguments.precision, help="The reference's precision.")
    ] = "BF16",
    threshold: Annotated[
        str,
        typer.Option(callback=arguments.threshold, help="In nats, or p75: a percentile of the reference's entropies."),
    ] = "0.6",
    policy: Annotated[list[str] | None, typer.Option(help="A policy's name (default: all four).")] = None,
    tier: Tier = "laptop",
    problems: Problems = 200,
    seeds: Seeds = "0",
    decoding: Policy = SAMPLE,
    held_out: Held = 20,
    quiet: Quiet = False,
    threads: Threads = 1,
    force: Force = False,
) -> None:
    """Entropy-routed decoding: sure tokens from one model, unsure ones from the other; four policies, graded."""
    used, other = seed_list(seeds), candidate or reference
    grading = Grading(Task.of_tier(session.plan(tier).tier), problems, used, decoding, held_out, quiet)
    roles = {"reference": reference, "candidate": other}
    with writing("route", out, roles, used, force=force, threads=threads) as conditions:
        from reqat.generation.interventions import policies

        names = policy or list(policies(0.0))
        for name in names:
            if name not in policies(0.0):
                raise unknown("policy", name, policies(0.0))
        first, tokenizer = load(reference, reference_precision)
        second, their_tokenizer = load(other, candidate_precision)
        same_tokens(tokenizer, their_tokenizer)
        value = nats(threshold, first, tokenizer, grading)
        conditions.settings = {
            "reference": reference, "candidate": other, "reference_precision": reference_precision,
            "candidate_precision": candidate_precision,
            "threshold": threshold, "threshold_nats": value, "policies": names, "tier": tier, "problems": problems,
            "decoding": decoding, "held_out": held_out,
        }  # fmt: skip
        grade_routes(conditions, first, second, tokenizer, grading, names, value)


@app.command()
def noise(
    model: Annotated[str, typer.Option(callback=arguments.model, help="The model's folder.")],
    out: Out,
    sigmas: Annotated[str, typer.Option(callback=arguments.sigmas, help="Relative sizes of the noise, 0.1,0.3.")],
    precision: Annotated[str, typer.Option(callback=arguments.precision, help="The model's precision.")] = "BF16",
    share: Annotated[
        float, typer.Option(callback=arguments.unit, help="Share of the decisions that meet noise, at either end.")
    ] = 0.25,
    by: Annotated[
        Literal["batch", "percentile"],
        typer.Option(help="batch: the share of each step's batch; percentile: a threshold measured beforehand."),
    ] = "batch",
    tier: Tier = "laptop",
    problems: Problems = 200,
    seeds: Seeds = "0",
    decoding: Policy = SAMPLE,
    held_out: Held = 20,
    quiet: Quiet = False,
    threads: Threads = 1,
    force: Force = False,
) -> None:
    """Noise on the logits of the lowest- or highest-entropy decisions, over sigma; graded beside no noise."""
    used, sizes = seed_list(seeds), numbers(sigmas, "--sigmas", float)
    grading = Grading(Task.of_tier(session.plan(tier).tier), problems, used, decoding, held_out, quiet)
    with writing("noise", out, {"model": model}, used, force=force, threads=threads) as conditions:
        from reqat.generation.interventions import Noise

        for value in sizes:
            Noise(value, "low", share)  # refuses what makes no sense before anything is loaded
        loaded, tokenizer = load(model, precision)
        ends = noise_ends(by, share, loaded, tokenizer, grading)
        conditions.settings = {
            "model": model, "precision": precision, "sigmas": sizes, "share": share, "by": by,
            "thresholds_nats": ends, "tier": tier, "problems": problems, "decoding": decoding, "held_out": held_out,
        }  # fmt: skip
        grade_noise(conditions, loaded, tokenizer, grading, sizes, share, ends)
