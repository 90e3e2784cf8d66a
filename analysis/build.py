"""What `reqat tables` and `reqat figures` call: every table and figure of a tier, from a folder of results to a folder
of files.

Which files come out depends on the plan alone (`analysis.registry`), so the DAG can name them without reading a
result. A tier without an artifact has no file for it; a tier with the artifact but without a result is an error.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.registry import discovered, figure_names, table_names, throughput_names
from reqat.config.errors import ReqatError
from reqat.config.files import read_json
from reqat.config.paths import Paths, load
from reqat.config.plan import Plan
from reqat.config.tier import load_catalogue

if TYPE_CHECKING:
    from analysis.report.benchmark import Measured
    from analysis.report.cells import Results
    from analysis.report.document import Table
    from reqat.config.throughput import Throughput

_RESTORE = "restore it from git, or pin the run again"


def results_of(tier: str | Plan, source: Path, *, pinned: bool = False, paths: Paths | None = None) -> Results:
    """The tier's `analysis.report.cells.Results` under `source`, which holds `evaluations/` and `stages/`.

    `tier` is a plan, or a name; of a name, a pinned folder's own `plan.json` is taken if it has one, else the plan of
    the configuration in `paths`. Raises `ReqatError` if the folder is not there.
    """
    from analysis.report.cells import Results

    source, paths = Path(source), paths or Paths()
    name = tier if isinstance(tier, str) else tier.tier.name
    if not source.is_dir():
        raise ReqatError(
            f"{source}: no such folder of results. Run tier {name} first (make figures TIER={name}), or name another."
        )
    if isinstance(tier, str):
        kept = source / "plan.json"
        tier = (
            Plan.restore(read_json(kept, "plan", _RESTORE), str(kept))
            if pinned and kept.is_file()
            else load(tier, paths)
        )
    titles = {name: artifact.title for name, artifact in load_catalogue(paths.config).artifacts.items()}
    return Results(tier, source, pinned=pinned, titles=titles)


def tables(results: Results) -> list[Table]:
    """Every table that the tier's plan asks for; of an artifact that no module claims, the generic one."""
    made = discovered("tables")
    return [
        import_module(made[name].module if name in made else "analysis.tables._generic").build(results, name)
        for name in table_names(results.plan)
    ]


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
    """Draw every figure of the tier as PNG and PDF into `out`; returns the files written. Raises alike."""
    from analysis.figures import _results as figures
    from analysis.report import style

    results = results_of(tier, source, pinned=pinned, paths=paths)
    results.check()
    written = []
    for name, (figure, model) in figure_names(results.plan).items():
        with style.context():
            written += style.save(figures.DRAW[figure](results, model), Path(out), name)
    return written


def throughput_tables(measured: Measured) -> list[Table]:
    """Every table of a benchmark, by the names that `analysis.registry.throughput_names` gives."""
    made = discovered("tables")
    names, _ = throughput_names(measured.record["config"])
    return [import_module(made[name].module).build(measured) for name in names]


def build_throughput(source: Path, table_folder: Path, plot_folder: Path) -> list[Path]:
    """Write every table and figure of the benchmark in `source`; returns the files.

    Raises `ReqatError` as `analysis.report.benchmark.read`.
    """
    from analysis.figures import figure6
    from analysis.report import benchmark, style

    measured = benchmark.read(Path(source))
    written = [path for table in throughput_tables(measured) for path in table.write(Path(table_folder))]
    with style.context():
        written += style.save(figure6.build(measured), Path(plot_folder), "figure6")
    return written


def build_missing(settings: Throughput, reason: str, table_folder: Path, plot_folder: Path) -> list[Path]:
    """Write placeholders for every table and figure of a benchmark that failed; returns the files.

    What needs no benchmark, the roofline model's errors, is written as ever.
    """
    from analysis.figures._missing import missing_figure
    from analysis.report import style
    from analysis.tables import figure6_error
    from analysis.tables._missing import missing_table

    names, figures = throughput_names(settings)
    made = [figure6_error.build() if name == figure6_error.NAME else missing_table(name, reason) for name in names]
    written = [path for table in made for path in table.write(Path(table_folder))]
    with style.context():
        for name in figures:
            written += style.save(missing_figure(reason), Path(plot_folder), name)
    return written
