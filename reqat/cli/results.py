"""Verbs about results: `tables`, `figures`, `pin`, `pin-base`, `compare`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from reqat.cli.app import Tier, app, session
from reqat.config.plan import Plan

Out = Annotated[Path | None, typer.Option("--out", help="Folder to write into.")]
Pinned = Annotated[bool, typer.Option("--pinned", help="From results/ instead of build/.")]
AllowDirty = Annotated[
    bool, typer.Option("--allow-dirty", help="Take results of a tree with uncommitted changes; recorded.")
]


def _source(tier: str, pinned: bool, kind: str, out: Path | None) -> tuple[Plan, Path, Path]:
    """Plan, folder of results, and folder to write into."""
    paths = session.paths
    if not pinned:
        return session.plan(tier), paths.work, out or paths.work / kind / tier
    from reqat.records import pin

    return pin.restore(tier, paths), paths.results / tier, out or paths.work / "pinned" / kind / tier


@app.command()
def tables(tier: Tier = "laptop", out: Out = None, pinned: Pinned = False) -> None:
    """Write the tier's tables as CSV, Markdown and LaTeX."""
    from analysis.build import build_tables

    plan, source, folder = _source(tier, pinned, "tables", out)
    for path in build_tables(plan, source, folder, pinned=pinned, paths=session.paths):
        print(path)


@app.command()
def figures(tier: Tier = "laptop", out: Out = None, pinned: Pinned = False) -> None:
    """Draw the tier's figures as PNG and PDF."""
    from analysis.build import build_figures

    plan, source, folder = _source(tier, pinned, "plots", out)
    for path in build_figures(plan, source, folder, pinned=pinned, paths=session.paths):
        print(path)


@app.command("pin")
def pin_run(tier: Tier = "overnight", allow_dirty: AllowDirty = False) -> None:
    """Promote a finished run into results/ after checking that it is whole."""
    from analysis.build import build_figures, build_tables
    from reqat.records import pin

    def render(plan: Plan, source: Path, out: Path) -> None:
        build_tables(plan, source, out / "tables", pinned=True, paths=session.paths)
        build_figures(plan, source, out / "plots", pinned=True, paths=session.paths)

    folder = pin.pin(session.plan(tier), session.paths, allow_dirty=allow_dirty, render=render)
    sources = json.loads((folder / pin.PIN).read_text(encoding="utf-8"))["sources"]
    if len(sources) > 1:
        print(f"reqat: warning: made by {len(sources)} versions of the code; pin.json lists them.", file=sys.stderr)
    print(f"pinned: {folder}")


@app.command("pin-base")
def pin_base(
    tier: Tier = "laptop",
    model: Annotated[str, typer.Option(help="Label of the model in the tier.")] = "testbed",
    dtype: Annotated[
        str | None, typer.Option(help="Store the weights as bfloat16 or float16 (default: as trained).")
    ] = None,
    allow_dirty: AllowDirty = False,
) -> None:
    """Promote the base model trained by `snakemake base` into results/base/."""
    from reqat.config.errors import unknown
    from reqat.records import pin

    if dtype not in (None, "bfloat16", "float16", "float32"):
        raise unknown("dtype", dtype, ("bfloat16", "float16", "float32"))
    print(f"pinned: {pin.pin_base(session.plan(tier), model, session.paths, allow_dirty=allow_dirty, dtype=dtype)}")


@app.command()
def compare(tier: Tier = "laptop") -> None:
    """Hold a fresh run against the pinned one; exit code 1 if they do not agree."""
    from reqat.records.compare import compare, report

    found = compare(session.plan(tier), session.paths)
    print(report(found))
    if not all(c.ok for c in found):
        raise typer.Exit(1)
