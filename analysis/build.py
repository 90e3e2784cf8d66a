"""Every table and figure of a tier, from a folder of results to a folder of files: what `reqat report` and `reqat pin`
call.

Which files come out depends on the plan alone (`analysis.registry`), so the DAG can name them without reading a
result. A tier without an artifact has no file for it; a tier with the artifact but without a result is an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.registry import companion_names, discovered, figure_names, study_names, table_names, throughput_names
from reqat.config.errors import ReqatError
from reqat.config.paths import Paths, load
from reqat.config.plan import Plan
from reqat.config.tier import load_catalogue

if TYPE_CHECKING:
    from analysis.report.benchmark import Measured
    from analysis.report.cells import Results
    from analysis.report.companion_claims import CompanionClaim
    from analysis.report.document import Table
    from analysis.report.studies import Study
    from analysis.report.summary import Tests
    from reqat.config.companions import Part as CompanionPart
    from reqat.config.studies import PlannedStudy
    from reqat.config.throughput import Throughput
    from reqat.records.pinned import Part, Restored


def results_of(tier: str | Plan, source: Path, *, pinned: bool = False, paths: Paths | None = None) -> Results:
    """The tier's `analysis.report.cells.Results` under `source`, which holds `evaluations/` and `stages/`.

    `tier` is a plan, or the name of one of the configuration in `paths`. Raises `ReqatError` if the folder is not
    there.
    """
    from analysis.report.cells import Results

    source, paths = Path(source), paths or Paths()
    name = tier if isinstance(tier, str) else tier.tier.name
    if not source.is_dir():
        raise ReqatError(
            f"{source}: no such folder of results. Run tier {name} first (make figures TIER={name}), or name another."
        )
    titles = {name: artifact.title for name, artifact in load_catalogue(paths.config).artifacts.items()}
    return Results(load(tier, paths) if isinstance(tier, str) else tier, source, pinned=pinned, titles=titles)


def maker(package: str, name: str) -> Callable[..., Any]:
    """The function `build` of the module that makes a table ("tables") or figure ("figures"); of a table that no module
    claims, that of the generic one.
    """
    made = discovered(package)
    module = made[name].module if name in made else f"analysis.{package}._generic"
    return import_module(module).build  # type: ignore[no-any-return]


def tables(results: Results) -> list[Table]:
    """Every table that the tier's plan asks for."""
    return [maker("tables", name)(results, name) for name in table_names(results.plan)]


def build_tables(
    tier: str | Plan, source: Path, out: Path, *, pinned: bool = False, paths: Paths | None = None
) -> list[Path]:
    """Write every table of the tier as CSV, Markdown and LaTeX into `out`; returns the files written.

    Raises `MissingResults` (a `ReqatError`) that lists the cells nobody has measured, before anything is written.
    """
    results = results_of(tier, source, pinned=pinned, paths=paths)
    results.check()
    return [path for table in tables(results) for path in table.write(Path(out))]


def build_figures(
    tier: str | Plan, source: Path, out: Path, *, pinned: bool = False, paths: Paths | None = None
) -> list[Path]:
    """Draw every figure of the tier as PNG and PDF into `out`, with its numbers as CSV; returns the files written.

    Raises alike.
    """
    from analysis.report import drawn, style

    results = results_of(tier, source, pinned=pinned, paths=paths)
    results.check()
    written = []
    for name, (figure, model) in figure_names(results.plan).items():
        with style.context():
            written += drawn.save(maker("figures", figure)(results, model), Path(out), name)
    return written


def build_studies(
    planned: Mapping[str, PlannedStudy],
    source: Path,
    table_folder: Path,
    plot_folder: Path,
    *,
    pinned: bool = False,
    stages: Mapping[str, str] | None = None,
    title: str = "",
) -> list[Path]:
    """Write every table and figure of a tier's studies; returns the files.

    Options and errors: `analysis.report.studies.load_studies`.
    """
    from analysis.report import drawn, style
    from analysis.report.studies import by_kind, load_studies

    studies = by_kind(load_studies(planned, source, pinned=pinned, stages=stages, title=title))
    wanted_tables, wanted_figures = study_names(planned)
    written: list[Path] = []
    for name in wanted_tables:
        written += maker("tables", name)(studies).write(Path(table_folder))
    for name in wanted_figures:
        with style.context():
            written += drawn.save(maker("figures", name)(studies), Path(plot_folder), name)
    return written


def build_companions(
    planned: Iterable[CompanionPart],
    source: Path,
    table_folder: Path,
    plot_folder: Path,
    *,
    missing: Mapping[str, str] | None = None,
    tier: str = "",
) -> list[Path]:
    """Write every table and figure of these parts of companions; returns the files.

    Options and errors: `analysis.report.companions.load_companions`.
    """
    from analysis.figures._missing_companion import missing_figure
    from analysis.report import companions, drawn, style

    parts = list(planned)
    names, written = companion_names(parts), []
    for found in companions.load_companions(parts, source, missing or {}, tier=tier):
        tables, figures = names[found.kind]
        for name in tables:
            there = len(found.rows) > 0
            table = maker("tables", name)(found) if there else companions.missing_table(name, found)
            written += companions.with_absences(table, found).write(Path(table_folder))
        for name in figures:
            with style.context():
                figure = maker("figures", name)(found) if len(found.rows) else missing_figure(found)
                written += drawn.save(figure, Path(plot_folder), name)
    return written


def throughput_tables(measured: Measured) -> list[Table]:
    """Every table of a benchmark."""
    names, _ = throughput_names(measured.record["config"])
    return [maker("tables", name)(measured) for name in names]


def build_throughput(source: Path, table_folder: Path, plot_folder: Path) -> list[Path]:
    """Write every table and figure of the benchmark in `source`; returns the files.

    Raises `ReqatError` as `analysis.report.benchmark.read`.
    """
    from analysis.report import benchmark, drawn, style

    measured = benchmark.read(Path(source))
    written = [path for table in throughput_tables(measured) for path in table.write(Path(table_folder))]
    _, figures = throughput_names(measured.record["config"])
    for name in figures:
        with style.context():
            written += drawn.save(maker("figures", name)(measured), Path(plot_folder), name)
    return written


def build_pinned(
    kept: Restored,
    part: Part,
    table_folder: Path,
    plot_folder: Path,
    paths: Paths,
    *,
    companions: Collection[str] | None = None,
) -> list[Path]:
    """Write every table and figure of a part of a pinned run, of `companions` those of these kinds (None: of all);
    returns the files."""
    from analysis.report.studies import pinned_studies

    if part == "run":
        written = build_tables(kept.plan, kept.root, table_folder, pinned=True, paths=paths)
        return written + build_figures(kept.plan, kept.root, plot_folder, pinned=True, paths=paths)
    if part == "studies":
        source = kept.root / "studies"
        title = kept.plan.tier.title
        return build_studies(pinned_studies(source), source, table_folder, plot_folder, pinned=True, title=title)
    if part == "companions":
        from analysis.report.companions import pinned_parts

        planned = [one for one in pinned_parts(kept.records) if companions is None or one.kind in companions]
        source = kept.root / "companions"
        return build_companions(planned, source, table_folder, plot_folder, tier=kept.plan.tier.name)
    return [
        path
        for id in kept.records
        for path in build_throughput(kept.root / "throughput" / id, table_folder, plot_folder)
    ]


def verdict_runs(paths: Paths) -> list[Tests]:
    """The claims of every model of `analysis.report.summary.PLACES`, of the newest pinned runs; those without one have
    a column that says so."""
    from analysis.report import summary
    from reqat.records.more_seeds import with_more_seeds
    from reqat.records.pinned import newest, restored

    kept, columns = newest(paths), []
    for heading, groups in summary.PLACES.items():
        runs = []
        for first, *more in groups:
            if (first, "run") not in kept:
                continue
            tiers = [first, *(tier for tier in more if (tier, "run") in kept)]
            with contextlib.ExitStack() as stack:
                parts = [stack.enter_context(restored(kept[tier, "run"], "run")) for tier in tiers]
                run = reduce(with_more_seeds, parts)
                beside = [kept[tier, "studies"] for tier in tiers if (tier, "studies") in kept]
                read = {folder: found for folder in beside if (found := _likelihoods(folder, run, stack))}
                tests = summary.tests_of(
                    results_of(run.plan, run.root, pinned=True, paths=paths),
                    [f"results/{kept[tier, 'run'].name}" for tier in tiers],
                    heading,
                    [found[0] for found in read.values()],
                    [f"results/{folder.name}" for folder in read],
                )
            runs.append(tests)
        columns += summary.merged(runs) or [summary.not_run(heading)]
    return columns


def _likelihoods(folder: Path, run: Restored, stack: contextlib.ExitStack) -> list[Study]:
    """The likelihood studies of a pinned folder, if they are of the very models of the run, wherever that is pinned."""
    from analysis.report.studies import load_studies, pinned_studies
    from reqat.records.pinned import restored
    from reqat.records.same_stages import same_stages

    kept = stack.enter_context(restored(folder, "studies"))
    source = kept.root / "studies"
    planned = {id: study for id, study in pinned_studies(source).items() if study.kind == "likelihood"}
    # What each study read is in its record. Its manifest speaks of the run that was the newest when it was pinned.
    read = {given["id"]: given["sha256"] for id in planned for given in kept.records[id].get("inputs", {}).values()}
    if not planned or same_stages(kept.plan, planned.values(), read, run.records) is not True:
        return []
    return load_studies(planned, source, pinned=True)


COMPANIONS_OF = ("overnight", "laptop")
"""The tiers whose newest pinned companions tell the claims of the sister systems: of each system, the first that has
it."""


def pinned_companions(paths: Paths) -> tuple[dict[str, str], list[CompanionClaim]]:
    """Kind of companion -> the folder that it was pinned in last, as a path within the repository; and their claims."""
    from analysis.report.companion_claims import claims_of
    from analysis.report.companions import load_companions, pinned_parts
    from reqat.config.companions import kinds
    from reqat.records.pinned import companions, restored

    folders: dict[str, Path] = {}
    for tier in COMPANIONS_OF:
        folders = companions(tier, paths) | folders
    claims: dict[str, list[CompanionClaim]] = {}
    for folder in sorted(set(folders.values())):
        with restored(folder, "companions") as kept:
            planned = [one for one in pinned_parts(kept.records) if folders[one.kind] == folder]
            for found in load_companions(planned, kept.root / "companions", {}):
                for name in companion_names(planned)[found.kind][0]:
                    module = import_module(f"analysis.tables.{name.replace('-', '_')}")
                    made = claims_of(found.kind, module.build(found), getattr(module, "HEADLINE", ()))
                    claims.setdefault(found.kind, []).extend(made)
    order = [kind for kind in kinds() if kind in folders]
    return {kind: f"results/{folders[kind].name}" for kind in order}, [one for kind in order for one in claims[kind]]


def write_verdicts(paths: Paths, runs: Sequence[Tests]) -> list[Path]:
    """Write the claims over all models where readers look for them: all of them into `results/verdicts.md`, and those
    of companions into `results/companion-verdicts.md`, the most important ones into README.md, between its markers;
    returns the files. A README without markers is left alone.

    Raises `ReqatError` if no run tests a claim, or for one marker without the other.
    """
    from analysis.report import companion_claims, summary
    from reqat.config.files import write_file

    readme = paths.root / "README.md"
    texts = {paths.results / f"{summary.NAME}.md": summary.build(runs).markdown()}
    blocks = [(summary.block(runs), summary.BEGIN, summary.END)]
    folders, claims = pinned_companions(paths)
    if folders:
        pages = {one.companion: f"docs/companions/{one.companion}.md" for one in claims}
        texts[paths.results / f"{companion_claims.NAME}.md"] = companion_claims.build(claims, folders).markdown()
        blocks.append((companion_claims.block(claims, folders, pages), companion_claims.BEGIN, companion_claims.END))
    if readme.is_file():
        text = readme.read_text(encoding="utf-8")
        for inside, first, last in blocks:
            if (filled := summary.filled(text, inside, first, last)) is not None:
                texts[readme] = text = filled
    for path, text in texts.items():
        write_file(path, text)
    return list(texts)


def build_missing(settings: Throughput, reason: str, table_folder: Path, plot_folder: Path) -> list[Path]:
    """Write placeholders for every table and figure of a benchmark that failed; returns the files.

    What needs no benchmark, the roofline model's errors, is written as ever.
    """
    from analysis.figures._missing import missing_figure
    from analysis.report import drawn, style
    from analysis.tables import figure6_error
    from analysis.tables._missing import missing_table

    names, figures = throughput_names(settings)
    made = [figure6_error.build() if name == figure6_error.NAME else missing_table(name, reason) for name in names]
    written = [path for table in made for path in table.write(Path(table_folder))]
    with style.context():
        for name in figures:
            written += drawn.save(missing_figure(reason), Path(plot_folder), name)
    return written
