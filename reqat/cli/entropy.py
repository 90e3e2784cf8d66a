"""The verb `entropy`: hold any two models, or two precisions of one, against each other token by token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

import reqat
from reqat.cli import arguments
from reqat.cli.app import Quiet, app, start_computing
from reqat.cli.arguments import Seeds, Threads, seed_list
from reqat.cli.families import FamilyTier, choose
from reqat.config.decoding import SAMPLE
from reqat.config.errors import ReqatError
from reqat.pipeline.pairs import PairSettings, Side, collect
from reqat.records import record
from reqat.tasks import problems as draw_problems
from reqat.tasks.problem_files import Given, of_problems, read_problems


@app.command()
def entropy(
    reference: Annotated[
        str, typer.Option(callback=arguments.model, help="A model's folder (safetensors), or package:NAME.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write: traces, tables, plots and a record.")],
    candidate: Annotated[
        str | None,
        typer.Option(callback=arguments.model, help="The model to hold against it (default: the same one)."),
    ] = None,
    problems: Annotated[
        Path | None, typer.Option(help="JSON lines with prompt and, where there are, response, answer, id.")
    ] = None,
    families: Annotated[
        str | None,
        typer.Option(callback=arguments.families, help="Task families in place of a file, a,b (see --tier)."),
    ] = None,
    tier: FamilyTier = None,
    n: Annotated[
        int,
        typer.Option("--n", min=1, max=arguments.MOST, help="Problems of the task families, or of the file at most."),
    ] = 200,
    split: Annotated[Literal["train", "validation", "test"], typer.Option(help="Split of the task families.")] = "test",
    problem_seed: Annotated[
        int, typer.Option(min=0, max=arguments.MOST, help="Seed that problems of task families are drawn with.")
    ] = 1,
    reference_precision: Annotated[
        str, typer.Option(callback=arguments.precision, help="Precision that the reference runs in.")
    ] = "BF16",
    candidate_precision: Annotated[
        str, typer.Option(callback=arguments.precision, help="And the candidate.")
    ] = "NVFP4-W4A4KV4",
    global_scale: Annotated[
        Literal["dynamic", "row"] | None,
        typer.Option(help="dynamic or row (NVFP4; default: as the model was saved, or else row)."),
    ] = None,
    kv_element: Annotated[
        arguments.Element | None, typer.Option(help="E1M2 or E2M1, where the KV cache is quantized.")
    ] = None,
    seeds: Seeds = "0",
    decoding: Annotated[str, typer.Option(callback=arguments.policy, help=f"greedy, or {SAMPLE}.")] = SAMPLE,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=arguments.LONGEST, help="Longest sampled response.")] = 352,
    batch_rows: Annotated[
        int | None, typer.Option(min=1, max=arguments.LONGEST, help="Rows decoded together (default: by memory).")
    ] = None,
    sample: Annotated[
        bool | None, typer.Option("--sample/--no-sample", help="Sample responses (default: where none is given).")
    ] = None,
    end_marker: Annotated[
        str | None, typer.Option(help="Text that a whole response holds, such as </think>; those without are flagged.")
    ] = None,
    logprobs: Annotated[
        list[str] | None, typer.Option(help="PROBLEM:POSITION whose whole distributions are kept (repeatable).")
    ] = None,
    top: Annotated[int, typer.Option(min=1, max=arguments.LONGEST, help="Most likely tokens kept a position.")] = 5,
    bins: Annotated[int, typer.Option(min=2, max=10_000, help="Bins of the reference's entropy.")] = 20,
    more_than: Annotated[
        int, typer.Option(min=0, max=arguments.MOST, help="Name token types seen more often than this.")
    ] = 100,
    quiet: Quiet = False,
    threads: Threads = 1,
    force: Annotated[bool, typer.Option("--force", help="Replace the result of `entropy` that is there.")] = False,
) -> None:
    """Collect the entropies of two models over the same tokens, and say where the second one differs.

    Both sample a response to every problem and seed (same random numbers); then both read every response, given or
    sampled, token by token.
    """
    if problems is not None and families is not None:
        raise ReqatError(f"--problems {problems} and --families {families}: give one source of problems.")
    if problems is None and families is None:
        raise ReqatError("no problems: give --problems FILE or --families a,b.")
    numbers = seed_list(seeds)
    paths = {"reference": _absolute(reference), "candidate": _absolute(candidate or reference)}
    out, source = out.absolute(), problems.absolute() if problems is not None else None
    if source is not None and tier is not None:
        raise ReqatError(f"--tier {tier}: of --families; --problems {problems} are taken as they stand there.")
    chosen = choose(families, tier) if families is not None else None
    if chosen is not None:
        rows = of_problems(draw_problems(chosen.families, split, n, problem_seed))
        print(f"problems: {chosen}", flush=True)
    else:
        assert source is not None
        rows = read_problems(source, n)
    settings = {
        "reference": paths["reference"],
        "candidate": paths["candidate"],
        "precisions": [reference_precision, candidate_precision],
        "global_scale": global_scale,
        "kv_element": kv_element,
        "problems": problems.name if problems is not None else families,
        "families": chosen.families if chosen is not None else None,
        "tier": tier,
        "split": None if problems is not None else split,
        "problem_seed": None if problems is not None else problem_seed,
        "n": len(rows),
        "seeds": numbers,
        "decoding": decoding,
        "max_new_tokens": max_new_tokens,
        "end_marker": end_marker,
        "top": top,
    }
    options = {"global_scale": global_scale, "kv_element": kv_element}
    first = Side(paths["reference"], reference_precision, options)
    second = Side(paths["candidate"], candidate_precision, options)
    asked = PairSettings(
        seeds=numbers,
        decoding=decoding,
        max_new_tokens=max_new_tokens,
        batch_rows=batch_rows,
        sample=sample,
        end_marker=end_marker,
        logprobs=_positions(logprobs or [], rows),
        top=top,
        bins=bins,
        more_than=more_than,
    )
    root = Path(reqat.__file__).parents[1]
    given: list[Path | str] = [*paths.values(), *([source] if source is not None else [])]
    with record.asked_for("entropy", out, settings, root=root, force=force, inputs=given) as job:
        start_computing(threads)
        from analysis.entropy.pair_plots import draw

        job.seeds = numbers
        found = collect(first, second, rows, asked, job.partial, root=root, progress=not quiet)
        job.metrics = found.metrics
        draw(found.report, job.partial / "plots")
    print((out / "summary.md").read_text(encoding="utf-8"))
    print(f"written: {out}")


def _positions(asked: Sequence[str], rows: Sequence[Given]) -> dict[str, tuple[int, ...]]:
    """PROBLEM:POSITION options by problem."""
    out: dict[str, tuple[int, ...]] = {}
    known = {row.id for row in rows}
    for text in asked:
        id, colon, position = text.rpartition(":")
        if not colon or not position.isdigit() or id not in known:
            raise ReqatError(f"--logprobs {text!r}: write PROBLEM:POSITION with the id of one of the problems.")
        out[id] = (*out.get(id, ()), int(position))
    return out


def _absolute(path: str) -> str:
    """The path from the root, for the working directory may change; names of packages as they are."""
    return path if path.startswith("package:") else str(Path(path).absolute())
