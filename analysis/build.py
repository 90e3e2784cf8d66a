"""What `reqat tables` and `reqat figures` call: every table and figure of a tier, from a folder of results to a folder
of files.

Which files come out depends on the plan alone (`analysis.registry`), so the DAG can name them without reading a
result. A tier without an artifact has no file for it; a tier with the artifact but without a result is an error.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.registry import discovered, figure_names, table_names
from reqat.config.errors import ReqatError
from reqat.config.files import read_json
from reqat.config.paths import Paths, load
from reqat.config.plan import Plan
from reqat.config.tier import load_catalogue

if TYPE_CHECKING:
    from analysis.report.cells import Results
    from analysis.report.document import Table

__all__ = ["build_figures", "build_tables", "figure_names", "results_of", "table_names", "tables"]

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
