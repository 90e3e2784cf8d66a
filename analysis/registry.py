"""Which tables and figures a plan asks for. Reads the plan alone and imports neither pandas nor matplotlib: the DAG
asks while it is parsed.
"""

from __future__ import annotations

import ast
import functools
import pkgutil
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.report.claims import has_claims
from analysis.report.names import BF16
from analysis.report.needs import qfit_cell

if TYPE_CHECKING:
    from collections.abc import Mapping

    from reqat.config.plan import Plan
    from reqat.config.studies import PlannedStudy
    from reqat.config.throughput import Throughput

# Figure -> the artifact whose cells it draws (None: any with a Q-FIT stage).
FIGURES: dict[str, str | None] = {
    "figure1b": "figure1",
    "figure1c": "figure1",
    "table1-dots": "table1",
    "losses": "table1",
    "qfit": None,
}
# Made of the throughput benchmark (config/throughput.yaml) alone, on tiers that have one.
THROUGHPUT_FIGURES = ("figure6",)
# Made of studies (config/studies.yaml): file stem -> the kinds of study that it needs, all of them.
STUDY_TABLES: dict[str, tuple[str, ...]] = {"studies": (), "reset": ("reset",)}
STUDY_FIGURES: dict[str, tuple[str, ...]] = {
    "figure2": ("pair", "routing", "noise"),
    "figure4": ("dynamics",),
    "figure7": ("gradients",),
    "figure8": ("routing",),
    "figure9": ("pair",),
}
THROUGHPUT_KERNELS = (
    "linear",
    "attention",
    "fake_quantize",
    "sem_loss",
    "decode",
    "train_step",
    "entropy",
    "agreement",
)


# Constants at the top of a module that say what it makes; they are read without importing it.
DECLARED = ("NAME",)


@dataclass(frozen=True)
class Made:
    """What a module of `analysis.tables` or `analysis.figures` says it makes."""

    module: str
    """Its dotted name."""
    name: str
    """File stem of the table or figure."""


@functools.cache
def discovered(package: str) -> dict[str, Made]:
    """File stem -> module, for all modules of `analysis.<package>` but those whose name begins with an underscore.

    Raises ValueError for a module that declares no NAME, and for two that declare the same one.
    """
    folder = Path(__file__).with_name(package)
    found: dict[str, Made] = {}
    for module in pkgutil.iter_modules([str(folder)]):
        if module.name.startswith("_"):
            continue
        file = folder / f"{module.name}.py"
        made = Made(f"analysis.{package}.{module.name}", **_declared(file))
        if made.name in found:
            raise ValueError(f"{file}: {found[made.name].module} makes {made.name!r}, too")
        found[made.name] = made
    return found


def _declared(file: Path) -> dict[str, Any]:
    """The constants of a module that are in `DECLARED`, by their names in small letters."""
    found = {
        target.id.lower(): ast.literal_eval(statement.value)
        for statement in ast.parse(file.read_text(encoding="utf-8"), str(file)).body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name) and target.id in DECLARED
    }
    if not isinstance(found.get("name"), str):
        raise ValueError(f"{file}: it needs a NAME, the file stem of what it makes")
    return found


def table_names(plan: Plan) -> list[str]:
    """File stems of the plan's tables: one an artifact, `table6` (other columns of the cells of `table2`), the claims
    last (where it has any). `figure1` is drawn, not tabled.
    """
    tabled = [name for name in plan.artifacts if name != "figure1"]
    by_length = ["table6"] if "table2" in tabled else []
    return [*tabled, *by_length, *(["claims"] if has_claims(plan) else [])]


def throughput_names(bench: Throughput | Mapping[str, Any] | None) -> tuple[list[str], list[str]]:
    """File stems of the tables and of the figures that a benchmark makes; none where a tier has no benchmark (None).

    `bench`: its settings, or what its record keeps of them.
    """
    if bench is None:
        return [], []
    asked = dict(bench)
    kernels = [name for name in THROUGHPUT_KERNELS if asked.get(name)]
    return [*(f"throughput-{name.replace('_', '-')}" for name in kernels), "figure6-error", "figure6-memory"], [
        *THROUGHPUT_FIGURES
    ]


def study_names(studies: Mapping[str, PlannedStudy]) -> tuple[list[str], list[str]]:
    """File stems of the tables and of the figures that a tier's studies make; none where it has no study."""
    if not studies:
        return [], []
    kinds = {study.kind for study in studies.values()}
    tables, figures = (
        [name for name, needed in names.items() if kinds.issuperset(needed)] for names in (STUDY_TABLES, STUDY_FIGURES)
    )
    return tables, figures


def figure_names(plan: Plan) -> dict[str, tuple[str, str]]:
    """File stem -> (figure, model label). A second model with the same artifact has its label in the stem:
    `figure1b-<model>`.
    """
    out = {}
    for figure in FIGURES:
        models = [m for m in plan.tier.models if can_draw(plan, figure, m)]
        for i, model in enumerate(models):
            out[figure if i == 0 else f"{figure}-{re.sub(r'[^A-Za-z0-9.]+', '-', model).strip('-')}"] = (figure, model)
    return out


def can_draw(plan: Plan, figure: str, model: str) -> bool:
    """Whether the plan has the cells that a figure draws, for a model."""
    if figure == "qfit":
        return qfit_cell(plan, model) is not None
    cells = [c for c in plan.cells if c.artifact == FIGURES[figure] and c.model == model and c.precision != BF16]
    return any(c.multiple is not None for c in cells) if figure == "losses" else bool(cells)
