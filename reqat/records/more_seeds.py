"""A pinned run and a later one of the same settings under other training seeds, read as one run.

Training seeds are what intervals rest on, and what hours are spent on. A tier that a machine cannot do at one go is run
in parts, a part a few seeds; ids do not depend on the tier, so a part's stages and evaluations are those that the
whole tier would have had.
"""

from __future__ import annotations

import dataclasses
import shutil
from typing import Any

from reqat.config.base import digest
from reqat.config.errors import ReqatError
from reqat.config.plan import Cell, Plan
from reqat.records import record
from reqat.records.pinned import Restored


def with_more_seeds(run: Restored, more: Restored) -> Restored:
    """``run`` with every cell of it that ``more`` has under further training seeds, in each of its tables. Files of
    ``more`` are copied into ``run.root``, which then holds both.

    What both have (a base model is measured once) stays as it is in ``run``. Raises `ReqatError` for an evaluation of
    ``more`` whose settings, apart from the training seed, ``run`` does not have, and for a seed that both have trained,
    unlike.
    """
    tiers = f"tiers {run.plan.tier.name} and {more.plan.tier.name}"
    like: dict[str, dict[tuple[Any, ...], Cell]] = {}
    for cell in run.plan.cells:
        like.setdefault(_settings(run.plan, cell.evaluation), {}).setdefault(_identity(cell), cell)
    seeds = {(_identity(cell), cell.training_seed) for cell in run.plan.cells}
    cells: dict[tuple[tuple[Any, ...], int], Cell] = {}
    for cell in more.plan.cells:
        if cell.evaluation in run.plan.evaluations:
            continue
        where = f"{tiers}: {cell.method} at {cell.precision}, training seed {cell.training_seed}"
        alike = like.get(_settings(more.plan, cell.evaluation))
        if alike is None:
            raise ReqatError(f"{where}: they differ in more than the training seed, and cannot be read as one run.")
        for identity, first in alike.items():
            if (key := (identity, cell.training_seed)) in seeds:
                raise ReqatError(f"{where} is in both, measured on other models.")
            named = {"training_seed": cell.training_seed, "evaluation": cell.evaluation}
            cells[key] = first.model_copy(update=named)
    asked = {cell.evaluation for cell in cells.values()}
    behind = {id for evaluation in asked for id in more.plan.behind(evaluation)} - run.plan.stages.keys()
    plan = dataclasses.replace(
        run.plan,
        stages=run.plan.stages | {id: stage for id, stage in more.plan.stages.items() if id in behind},
        evaluations=run.plan.evaluations | {id: e for id, e in more.plan.evaluations.items() if id in asked},
        cells=[*run.plan.cells, *cells.values()],
    )
    plan.check(tiers)
    for folder in sorted(path.parent for path in more.root.rglob(record.FILE)):
        if not (there := run.root / folder.relative_to(more.root)).exists():
            shutil.copytree(folder, there)
    return Restored(run.root, plan, more.records | run.records)


def _identity(cell: Cell) -> tuple[Any, ...]:
    """What a cell is, apart from its training seed and where it was measured."""
    return tuple(cell.model_dump(exclude={"training_seed", "evaluation"}).values())


def _settings(plan: Plan, evaluation: str) -> str:
    """Digest of all settings behind an evaluation, down to the base model, without training seeds and without ids."""

    def told(value: Any) -> Any:
        if isinstance(value, dict):
            trains = value.get("kind") == "train"
            return {key: told(inner) for key, inner in value.items() if not (trains and key == "seed")}
        if isinstance(value, list | tuple):
            return [told(inner) for inner in value]
        if isinstance(value, str) and value in plan.stages:
            return told(plan.stages[value].model_dump(mode="json"))
        return value

    return digest(told(plan.evaluation(evaluation).model_dump(mode="json")))
