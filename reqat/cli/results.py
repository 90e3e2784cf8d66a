"""Verbs about results: `tables`, `figures`, `pin`, `pin-base`, `compare`."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

from reqat.cli.app import Tier, app, session
from reqat.config.plan import Plan
from reqat.config.targets import making_files

Out = Annotated[Path | None, typer.Option("--out", help="Folder to write into.")]
Pinned = Annotated[bool, typer.Option("--pinned", help="From results/ instead of build/.")]
AllowDirty = Annotated[
    bool, typer.Option("--allow-dirty", help="Take results of a tree with uncommitted changes; recorded.")
]

Replace = Annotated[bool, typer.Option("--force", help="Replace what was pinned there before.")]
Rewrite = Annotated[bool, typer.Option("--force", help="Replace files of ours that were changed since, too.")]


def _source(tier: str, pinned: bool, kind: str, out: Path | None) -> tuple[Plan, Path, Path]:
    """Plan, folder of results, and folder to write into."""
    paths = session.paths
    if not pinned:
        return session.plan(tier), paths.work, out or paths.work / kind / tier
    from reqat.pipeline import pin

    return pin.restore(tier, paths), paths.results / tier, out or paths.work / "pinned" / kind / tier


@app.command()
def tables(tier: Tier = "laptop", out: Out = None, pinned: Pinned = False, force: Rewrite = False) -> None:
    """Write the tier's tables as CSV, Markdown and LaTeX."""
    from analysis.build import build_tables

    plan, source, folder = _source(tier, pinned, "tables", out)
    with rendering(folder, force=force) as draft:
        build_tables(plan, source, draft, pinned=pinned, paths=session.paths)


@app.command()
def figures(tier: Tier = "laptop", out: Out = None, pinned: Pinned = False, force: Rewrite = False) -> None:
    """Draw the tier's figures as PNG and PDF."""
    from analysis.build import build_figures

    plan, source, folder = _source(tier, pinned, "plots", out)
    with rendering(folder, force=force) as draft:
        build_figures(plan, source, draft, pinned=pinned, paths=session.paths)


@contextlib.contextmanager
def rendering(folder: Path, *, force: bool) -> Iterator[Path]:
    """A folder to render into, whose files are then moved into `folder` and named on standard output."""
    own = session.paths.work.resolve() in folder.resolve().parents
    with making_files(folder, replace=force, own=own) as draft:
        yield draft
        names = sorted(path.relative_to(draft) for path in draft.rglob("*") if path.is_file())
    for name in names:
        print(folder / name)


@app.command("pin")
def pin_run(tier: Tier = "overnight", allow_dirty: AllowDirty = False, force: Replace = False) -> None:
    """Promote a finished run into results/ after checking that it is whole."""
    from analysis.build import build_figures, build_tables
    from reqat.pipeline import pin

    def render(plan: Plan, source: Path, out: Path) -> None:
        build_tables(plan, source, out / "tables", pinned=True, paths=session.paths)
        build_figures(plan, source, out / "plots", pinned=True, paths=session.paths)

    folder = pin.pin(session.plan(tier), session.paths, allow_dirty=allow_dirty, force=force, render=render)
    sources = json.loads((folder / pin.PIN).read_text(encoding="utf-8"))["sources"]
    if len(sources) > 1:
        print(f"reqat: warning: made by {len(sources)} versions of the code; pin.json lists them.", file=sys.stderr)
    print(f"pinned: {folder}")


@app.command("pin-base")
def pin_base(
    tier: Tier = "laptop",
    model: Annotated[str, typer.Option(help="Label of the model in the tier.")] = "testbed",
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        typer.Option(help="Store the weights as bfloat16 or float16 (default: as trained)."),
    ] = None,
    allow_dirty: AllowDirty = False,
    force: Replace = False,
) -> None:
    """Promote the base model trained by `snakemake base` into results/base/."""
    from reqat.pipeline import pin

    plan, paths = session.plan(tier), session.paths
    print(f"pinned: {pin.pin_base(plan, model, paths, allow_dirty=allow_dirty, force=force, dtype=dtype)}")


@app.command()
def compare(tier: Tier = "laptop") -> None:
    """Hold a fresh run against the pinned one; exit code 1 if they do not agree."""
    from reqat.pipeline.compare import compare, report

    found = compare(session.plan(tier), session.paths)
    print(report(found))
    if not all(c.ok for c in found):
        raise typer.Exit(1)
