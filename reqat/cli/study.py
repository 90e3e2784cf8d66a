"""The verb `study`: measures on models that stages have trained.

What a study of a kind does is in :mod:`reqat.pipeline.studies`.
"""

from __future__ import annotations

from typing import Annotated

import typer

from reqat.cli.app import Quiet, Tier, app, session, start_computing
from reqat.cli.arguments import Threads
from reqat.cli.run import Force
from reqat.config.studies import study_called
from reqat.pipeline.studies import run_study, studies_of


@app.command()
def study(
    ids: Annotated[
        list[str] | None, typer.Argument(help="Ids as `reqat plan` prints them (default: all of the tier's).")
    ] = None,
    tier: Tier = "laptop",
    quiet: Quiet = False,
    force: Force = False,
    threads: Threads = 1,
) -> None:
    """Run studies: entropies, routed decoding, noise, ReSET, training dynamics and likelihoods of the tier's models."""
    plan = session.plan(tier)
    studies = studies_of(plan, session.paths)
    chosen = [study_called(studies, id, tier) for id in ids] if ids else list(studies.values())
    start_computing(threads)
    for one in chosen:
        run_study(plan, one, session.paths, progress=not quiet, force=force)
