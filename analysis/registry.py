"""Which tables and figures there are, and which of them a plan asks for.

Each module of `analysis.tables` and `analysis.figures` makes one, and says in constants at its top what that is and
what it is made of:

    NAME       file stem of the table or figure
    ARTIFACT   made of the cells of this artifact of the plan (without it, of any)
    NEEDS      what these cells must hold, one of `analysis.report.needs.NEEDS`
    STUDIES    made of a tier's studies: the kinds that it needs, all of them
    BENCHMARK  made of a tier's benchmark: the parts of config/throughput.yaml that it needs, all of them
    COMPANION  made of a tier's companion: its kind

A table with a NAME alone is that of the artifact of this name. Figures of ARTIFACT or NEEDS are drawn once a model. A
new module is found without being listed anywhere; `analysis.build` calls its function `build`.

The constants are read from the source, because the DAG asks while it is parsed: importing the modules would load pandas
and matplotlib, which takes longer than all else that the DAG does then.
"""

from __future__ import annotations

import ast
import functools
import pkgutil
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.report.needs import NEEDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from reqat.config.companions import Part
    from reqat.config.plan import Plan
    from reqat.config.studies import PlannedStudy
    from reqat.config.throughput import Throughput

DECLARED = ("NAME", "ARTIFACT", "NEEDS", "STUDIES", "BENCHMARK", "COMPANION")


@dataclass(frozen=True)
class Made:
    """What a module says that it makes; see the constants above."""

    module: str
    """Its dotted name."""
    name: str
    artifact: str | None = None
    needs: str | None = None
    studies: tuple[str, ...] | None = None
    benchmark: tuple[str, ...] | None = None
    companion: str | None = None

    @property
    def of_cells(self) -> bool:
        """Whether it declares cells that it is made of."""
        return self.artifact is not None or self.needs is not None

    def wanted(self, plan: Plan, model: str | None = None) -> bool:
        """Whether a plan has the cells that it is made of: any, or of one model."""
        cells = [c for c in plan.cells if self.artifact in (None, c.artifact) and model in (None, c.model)]
        return bool(cells) and NEEDS[self.needs or "cells"](plan, cells)


@functools.cache
def discovered(package: str) -> dict[str, Made]:
    """File stem -> module, of all modules of `analysis.<package>` but those whose name begins with an underscore.

    Raises ValueError for a module whose constants say nothing sensible, and for two of one NAME.
    """
    return declared_in(Path(__file__).with_name(package), f"analysis.{package}")


def declared_in(folder: Path, package: str) -> dict[str, Made]:
    """The same of the modules in a folder, which `package` names. Raises as `discovered`."""
    found: dict[str, Made] = {}
    for module in pkgutil.iter_modules([str(folder)]):
        if module.name.startswith("_"):
            continue
        file = folder / f"{module.name}.py"
        made = _read(file, f"{package}.{module.name}")
        if made.name in found:
            raise ValueError(f"{file}: {found[made.name].module} makes {made.name!r}, too")
        found[made.name] = made
    return found


def _read(file: Path, module: str) -> Made:
    constants: dict[str, Any] = {
        target.id.lower(): ast.literal_eval(statement.value)
        for statement in ast.parse(file.read_text(encoding="utf-8"), str(file)).body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name) and target.id in DECLARED
    }
    if "name" not in constants:
        raise ValueError(f"{file}: it needs a NAME, the file stem of what it makes")
    made = Made(module, **constants)
    if not isinstance(made.studies, tuple | None) or not isinstance(made.benchmark, tuple | None):
        raise ValueError(f"{file}: STUDIES and BENCHMARK are tuples of words")
    others = (made.studies, made.benchmark, made.companion)
    if made.of_cells + sum(other is not None for other in others) > 1:
        raise ValueError(f"{file}: made of cells, of studies, of the benchmark or of a companion, not of several")
    if made.needs is not None and made.needs not in NEEDS:
        raise ValueError(f"{file}: NEEDS is {made.needs!r}, not one of {', '.join(NEEDS)}")
    return made


def table_names(plan: Plan) -> list[str]:
    """File stems of the plan's tables: one an artifact (those named after a figure are drawn, not tabled), then those
    made of other artifacts' cells.
    """
    tabled = [name for name in plan.artifacts if not name.startswith("figure")]
    return [*tabled, *(name for name, made in discovered("tables").items() if made.of_cells and made.wanted(plan))]


def figure_names(plan: Plan) -> dict[str, tuple[str, str]]:
    """File stem -> (figure, model label). A second model with the same artifact has its label in the stem:
    `figure1b-<model>`.
    """
    out = {}
    for figure, made in discovered("figures").items():
        models = [model for model in plan.tier.models if made.of_cells and made.wanted(plan, model)]
        for i, model in enumerate(models):
            out[figure if i == 0 else f"{figure}-{re.sub(r'[^A-Za-z0-9.]+', '-', model).strip('-')}"] = (figure, model)
    return out


def throughput_names(bench: Throughput | Mapping[str, Any] | None) -> tuple[list[str], list[str]]:
    """File stems of the tables and of the figures that a benchmark makes; none where a tier has no benchmark (None).

    `bench`: its settings, or what its record keeps of them.
    """
    if bench is None:
        return [], []
    asked = dict(bench)
    tables, figures = (
        [
            name
            for name, made in discovered(package).items()
            if made.benchmark is not None and all(asked.get(part) for part in made.benchmark)
        ]
        for package in ("tables", "figures")
    )
    return tables, figures


def study_names(studies: Mapping[str, PlannedStudy]) -> tuple[list[str], list[str]]:
    """File stems of the tables and of the figures that a tier's studies make; none where it has no study."""
    if not studies:
        return [], []
    kinds = {study.kind for study in studies.values()}
    tables, figures = (
        [
            name
            for name, made in discovered(package).items()
            if made.studies is not None and kinds.issuperset(made.studies)
        ]
        for package in ("tables", "figures")
    )
    return tables, figures


def companion_names(parts: Iterable[Part]) -> dict[str, tuple[list[str], list[str]]]:
    """Kind of a tier's companions -> file stems of its tables and of its figures."""
    return {
        kind: tuple(  # type: ignore[misc]
            [name for name, made in discovered(package).items() if made.companion == kind]
            for package in ("tables", "figures")
        )
        for kind in dict.fromkeys(part.kind for part in parts)
    }
