"""Verbs of studies: `study` measures on models that stages have trained, `study-report` draws, `pin-studies` keeps.

What a study of a kind does is in :mod:`reqat.pipeline.studies`.
"""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from reqat.cli.app import Quiet, Tier, app, session, start_computing
from reqat.cli.arguments import Threads
from reqat.cli.results import Replace, Rewrite, rendering
from reqat.cli.run import Force
from reqat.config.errors import ReqatError
from reqat.config.files import write_file
from reqat.config.plan import Plan
from reqat.config.studies import (
    FILE,
    PlannedStudy,
    load_studies,
    study_called,
)
from reqat.config.targets import making
from reqat.pipeline import pin
from reqat.pipeline.studies import TRACES, require_inputs, run_study, same_stages, stages_there
from reqat.records import record


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
    """Run studies: entropies, routed decoding, noise, ReSET and training dynamics of the tier's models."""
    plan = session.plan(tier)
    studies = studies_of(plan)
    chosen = [study_called(studies, id, tier) for id in ids] if ids else list(studies.values())
    start_computing(threads)
    for one in chosen:
        run_study(plan, one, session.paths, progress=not quiet, force=force)


def studies_of(plan: Plan) -> dict[str, PlannedStudy]:
    """The studies of a tier by id. Raises `ReqatError` if it has none."""
    found = load_studies(plan, session.paths.config)
    if not found:
        raise ReqatError(f"tier {plan.tier.name} has no studies; give it a section in config/{FILE}.")
    return found


@app.command("study-report")
def study_report(
    tier: Tier = "laptop",
    tables: Annotated[Path | None, typer.Option(help="Folder for the tables.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for the figures.")] = None,
    pinned: Annotated[bool, typer.Option("--pinned", help="From results/studies/ instead of build/.")] = False,
    force: Rewrite = False,
) -> None:
    """Make the tables and figures of a tier's finished studies."""
    from analysis.build import build_studies
    from analysis.report.studies import pinned_studies

    paths = session.paths
    if pinned:
        source = paths.results / "studies" / tier
        planned, folder, name, stages = pinned_studies(source), paths.work / "pinned", f"studies-{tier}", None
    else:
        source, plan = paths.studies, session.plan(tier)
        planned, folder, name = studies_of(plan), paths.work, tier
        stages = stages_there(plan, planned.values(), paths)
    tables, plots = tables or folder / "tables" / name, plots or folder / "plots" / name
    with rendering(tables, force=force) as table_draft, rendering(plots, force=force) as plot_draft:
        build_studies(planned, source, table_draft, plot_draft, pinned=pinned, stages=stages)


@app.command("pin-studies")
def pin_studies(
    tier: Tier = "laptop",
    allow_dirty: Annotated[bool, typer.Option("--allow-dirty", help="Keep results of uncommitted code, too.")] = False,
    force: Replace = False,
) -> None:
    """Keep a tier's finished studies (not their token traces) and what is drawn of them in results/studies/<tier>."""
    from analysis.build import build_studies
    from analysis.report.studies import STUDIES

    paths, plan = session.paths, session.plan(tier)
    target = paths.results / "studies" / tier
    with making(target, pin.pinned, replace=force) as draft:
        planned = studies_of(plan)
        there = stages_there(plan, planned.values(), paths)
        for id, study in planned.items():
            require_inputs(plan, study, paths.study(id), there)
        same = same_stages(plan, planned.values(), there, paths.results / tier)
        for id in planned:
            found = record.verify(paths.study(id), id=id)
            if found["dirty"] is not False and not allow_dirty:
                raise ReqatError(
                    f"{paths.study(id)} was made with uncommitted changes; commit and run it again (reqat study {id} "
                    f"--tier {tier} --force), or pass --allow-dirty."
                )
            shutil.copytree(paths.study(id), draft / id, ignore=shutil.ignore_patterns(TRACES, record.FILE))
            record.write(draft / id / record.FILE, found | {"pinned_outputs": record.outputs(draft / id)})
        listed = {id: study.model_dump(mode="json") for id, study in planned.items()}
        write_file(draft / STUDIES, json.dumps(listed, indent=1) + "\n")  # in the order of the file
        build_studies(planned, draft, draft / "tables", draft / "plots", pinned=True)
        kept = [record.read(draft / id) for id in planned]
        record.write(
            draft / pin.PIN,
            {
                "schema_version": record.SCHEMA_VERSION,
                "tier": tier,
                "pinned": datetime.now(UTC).isoformat(timespec="seconds"),
                "commits": sorted({str(found["commit"]) for found in kept}),
                "dirty": any(found["dirty"] is not False for found in kept),
                "allow_dirty": allow_dirty,
                "same_stages_as_pinned_run": same,
                "files": record.files(draft),
            },
        )
    print(f"pinned: {target}")
