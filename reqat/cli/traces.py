"""The verb `traces`: training data of task families as a file, to try `reqat train` with."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Annotated

import typer

from reqat.cli import arguments
from reqat.cli.app import app
from reqat.cli.families import FamilyTier, choose
from reqat.config.errors import ReqatError
from reqat.config.targets import making_file
from reqat.tasks import problems, write_trace


@app.command()
def traces(
    tasks: Annotated[str, typer.Option(callback=arguments.families, help="Task families, a,b.")],
    out: Annotated[Path, typer.Option(help="File to write, JSON lines with prompt and response.")],
    n: Annotated[int, typer.Option("--n", min=1, max=arguments.MOST, help="Problems.")] = 300,
    tier: FamilyTier = None,
    seed: Annotated[int, typer.Option(min=0, max=arguments.MOST, help="That problems are drawn with.")] = 0,
) -> None:
    """Write problems of the training split with verified solutions, as `reqat train --data` reads them.

    Problems whose family writes no solution that its verifier accepts are left out.
    """
    if out.suffix.lower() not in (".jsonl", ".ndjson"):
        raise ReqatError(f"--out {out}: JSON lines are written; name it so (traces.jsonl).")
    chosen, rng = choose(tasks, tier), random.Random(seed)
    with making_file(out, lambda _: False) as write:
        drawn = problems(chosen.families, "train", n, seed)
        found = [(problem.prompt, write_trace(problem, rng)) for problem in drawn]
        rows = [{"prompt": prompt, "response": response} for prompt, response in found if response is not None]
        if not rows:
            raise ReqatError(f"none of {n} problems of {tasks} has a verified solution; take more, or other families.")
        write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{out}: {len(rows)} traces" + (f", {n - len(rows)} without a solution left out" if len(rows) < n else ""))
    print(f"problems: {chosen}")
