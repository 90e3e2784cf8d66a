"""Verbs about results: `report` draws them, `pin` keeps them, `compare` holds a fresh run against a pinned one."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

from reqat.cli.app import Tier, app, session
from reqat.config.errors import ReqatError, unknown
from reqat.config.plan import Plan
from reqat.config.targets import making_files
from reqat.records.pinned import PARTS, Part


@app.command()
def report(
    tier: Tier = "laptop",
    what: Annotated[
        list[str] | None,
        typer.Option(help="run, studies, benchmark or companions (again for another; default: all of the tier)."),
    ] = None,
    tables: Annotated[Path | None, typer.Option(help="Folder for the tables (CSV, Markdown, LaTeX).")] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for the figures (PNG, PDF).")] = None,
    companion: Annotated[
        list[str] | None, typer.Option(help="Of the companions, this kind alone (again for another).")
    ] = None,
    pinned: Annotated[bool, typer.Option("--pinned", help="From results/ instead of build/.")] = False,
    verdicts: Annotated[
        bool,
        typer.Option(
            "--verdicts",
            help="The claims over all models instead, from the newest pinned runs: printed, in results/verdicts.md and "
            "between the markers of README.md, too.",
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace files of ours that were changed since, too.")] = False,
) -> None:
    """Write the tables and figures of a tier's run, studies, benchmark and companions."""
    from analysis.build import build_pinned, verdict_runs, write_verdicts
    from analysis.report import summary
    from reqat.records.pinned import find, parts_pinned, restored

    chosen, paths = _chosen(["companions"] if companion and not what else what), session.paths
    if verdicts:
        if chosen or plots:
            raise ReqatError("--verdicts makes one table: leave out --what and --plots.")
        runs = verdict_runs(paths)
        table = summary.build(runs)
        print(table.markdown())
        with _rendering(tables or paths.work / "pinned" / "tables" / table.name, force=force) as draft:
            table.write(draft)
        for path in write_verdicts(paths, runs):
            print(path)
        return
    top = paths.work / "pinned" if pinned else paths.work
    with (
        _rendering(tables or top / "tables" / tier, force=force) as table_draft,
        _rendering(plots or top / "plots" / tier, force=force) as plot_draft,
    ):
        if not pinned:
            _report_fresh(tier, chosen, table_draft, plot_draft, companion or [])
            return
        for part in chosen or parts_pinned(tier, paths):
            if part == "companions":
                _report_pinned_companions(tier, companion or [], table_draft, plot_draft)
                continue
            with restored(find(tier, part, paths), part) as kept:
                build_pinned(kept, part, table_draft, plot_draft, paths)


def _chosen(what: list[str] | None) -> list[Part]:
    """The parts that `--what` names, each once. Raises `ReqatError` for one that there is none of."""
    for name in what or ():
        if name not in PARTS:
            raise unknown("part", name, PARTS, where="--what")
    return [part for part in PARTS if part in (what or ())]


def _report_fresh(tier: str, what: list[Part], tables: Path, plots: Path, companions: list[str]) -> None:
    from analysis import build
    from reqat.pipeline.benchmark import benchmark_of, failure_of
    from reqat.pipeline.pin import begun, parts_of
    from reqat.pipeline.studies import stages_there, studies_of

    plan, paths = session.plan(tier), session.paths
    has = parts_of(plan, paths)
    there = [part for part in has if begun(plan, part, paths)]
    if not what and there:  # what was never begun (a benchmark left out, say) does not keep the rest from being drawn
        for absent in [p for p in has if p not in (*there, "companions")]:  # these have a target of their own
            print(f"reqat: warning: tier {tier} has no results of its {absent}; left out.", file=sys.stderr)
    for part in what or there or has:
        if part == "run":
            build.build_tables(plan, paths.work, tables, paths=paths)
            build.build_figures(plan, paths.work, plots, paths=paths)
        elif part == "studies":
            planned = studies_of(plan, paths)
            stages = stages_there(plan, planned.values(), paths)
            build.build_studies(planned, paths.studies, tables, plots, stages=stages, title=plan.tier.title)
        elif part == "companions":
            _report_companions(plan, companions, tables, plots)
        else:
            settings = benchmark_of(tier, paths)
            if (reason := failure_of(settings.id, paths)) is not None:
                build.build_missing(settings, reason, tables, plots)
            else:
                build.build_throughput(paths.throughput(settings.id), tables, plots)


def _report_companions(plan: Plan, kinds: list[str], tables: Path, plots: Path) -> None:
    """Of companions of these kinds, or of all. Raises `ReqatError` for a kind that the tier does not have."""
    from analysis.build import build_companions
    from reqat.config.companions import note_of
    from reqat.pipeline.pin import companions_asked

    paths, tier = session.paths, plan.tier
    parts = list(companions_asked(tier.name, kinds, paths).values())
    noted = {part.id: reason for part in parts if (reason := note_of(paths.companion(part.id))) is not None}
    source = paths.work / "companions"
    build_companions(parts, source, tables, plots, missing=noted, tier=tier.name)


def _report_pinned_companions(tier: str, kinds: list[str], tables: Path, plots: Path) -> None:
    """Of companions of these kinds, or of all, each from the folder that it was pinned in last. Raises `ReqatError` for
    a kind that is not pinned."""
    from analysis.build import build_pinned
    from reqat.records.pinned import companions, find, restored

    paths = session.paths
    find(tier, "companions", paths)  # raises where there is none
    folders = companions(tier, paths)
    for kind in kinds:
        if kind not in folders:
            raise unknown("pinned companion", kind, folders, where=f"tier {tier}")
    for folder in sorted(set(folders.values())):
        its = {kind for kind in kinds or folders if folders[kind] == folder}
        if its:
            with restored(folder, "companions") as kept:
                build_pinned(kept, "companions", tables, plots, paths, companions=its)


@contextlib.contextmanager
def _rendering(folder: Path, *, force: bool) -> Iterator[Path]:
    """A folder to render into, whose files are then moved into `folder` and named on standard output."""
    own = session.paths.work.resolve() in folder.resolve().parents
    with making_files(folder, replace=force, own=own) as draft:
        yield draft
        names = sorted(path.relative_to(draft) for path in draft.rglob("*") if path.is_file())
    for name in names:
        print(folder / name)


@app.command()
def pin(
    tier: Tier = "overnight",
    what: Annotated[
        list[str] | None,
        typer.Option(help="run, studies, benchmark or companions (again for another; default: all begun), or base."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Folder in results/ (default: <today>-<tier>).")] = None,
    figure: Annotated[list[str] | None, typer.Option(help="Keep this figure as PNG, too.")] = None,
    companion: Annotated[
        list[str] | None, typer.Option(help="Of the companions, this kind alone (again for another).")
    ] = None,
    model: Annotated[str, typer.Option(help="base: label of the model in the tier.")] = "testbed",
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        typer.Option(help="base: store the weights as bfloat16 or float16 (default: as trained)."),
    ] = None,
    allow_dirty: Annotated[
        bool, typer.Option("--allow-dirty", help="Take results of a tree with uncommitted changes; recorded.")
    ] = False,
) -> None:
    """Promote finished results into a new, dated folder of results/, after checking that they are whole."""
    from reqat.pipeline import pin as pinning
    from reqat.records.pinned import manifest

    plan, paths = session.plan(tier), session.paths
    if what == ["base"]:
        if name or figure:
            raise ReqatError("--name and --figure: leave them out, a base has a place of its own in results/.")
        print(f"pinned: {pinning.pin_base(plan, model, paths, allow_dirty=allow_dirty, dtype=dtype)}")
        return
    # Companions have a target of their own, so a run without them is no run that lacks something.
    has = [p for p in pinning.parts_of(plan, paths) if p != "companions" or pinning.begun(plan, p, paths)]
    parts = _chosen(["companions"] if companion and not what else what) or has
    if companion and "companions" not in parts:
        raise ReqatError("--companion: it chooses among companions; name them with --what companions, or leave it out.")
    folder = pinning.pin(
        plan, paths, parts, name=name, figures=figure or (), companions=companion or (), allow_dirty=allow_dirty
    )
    for part, stated in manifest(folder)["parts"].items():
        if len(stated["sources"]) > 1:
            versions = f"{len(stated['sources'])} versions of the code"
            print(f"reqat: warning: {part}: made by {versions}; manifest.json lists them.", file=sys.stderr)
    print(f"pinned: {folder}")


@app.command()
def compare(
    tier: Tier = "laptop",
    what: Annotated[str, typer.Option(help="run, or benchmark: against the one of this type of machine.")] = "run",
) -> None:
    """Hold a fresh run against the pinned one; exit code 1 if they do not agree. A benchmark is shown, not judged."""
    if what not in ("run", "benchmark"):
        raise unknown("part", what, ("run", "benchmark"), where="--what")
    if what == "benchmark":
        from reqat.pipeline.compare_benchmarks import compare_benchmarks
        from reqat.pipeline.compare_benchmarks import report as report_benchmarks

        print(report_benchmarks(compare_benchmarks(tier, session.paths)))
        return
    from reqat.pipeline.compare import compare, report

    found = compare(session.plan(tier), session.paths)
    print(report(found))
    if not all(c.ok for c in found):
        raise typer.Exit(1)
