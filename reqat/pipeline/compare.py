"""Holding a fresh run against the pinned one.

Two tolerances, each stated with its result. Where nothing that can change a number differs (same evaluation id,
source of all code that computes, build of the native kernels, package versions, processor model and threads), the
outcomes must be **equal**, problem by problem.
Otherwise the same problems and sampling seeds are compared in pairs, and the difference is a mismatch if its
two-sided p-value, clustered by problem, is below 0.05 divided by the number of evaluations compared (Bonferroni: one
false alarm in twenty comparisons of whole runs).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from reqat.config.errors import ReqatError
from reqat.config.paths import Paths
from reqat.config.plan import Cell, Plan
from reqat.config.recipe import OWN
from reqat.records import pinned, record

if TYPE_CHECKING:
    from reqat.evaluation import Outcomes

LEVEL = 0.05


@dataclass(frozen=True)
class Comparison:
    """One evaluation, fresh against pinned. Accuracies and differences in percentage points."""

    cell: str
    tolerance: Literal["equal", "interval"]
    fresh: float
    pinned: float
    difference: float
    lo: float
    hi: float
    p: float
    n: int
    """Problems in common."""
    ok: bool


def compare(plan: Plan, paths: Paths) -> list[Comparison]:
    """Compare each fresh evaluation of `plan` with its pinned counterpart (same table cell).

    Raises `ReqatError` if nothing is pinned for the tier, or a fresh result is missing or damaged.
    """
    from reqat.evaluation import Outcomes

    with pinned.restored(pinned.find(plan.tier.name, "run", paths), "run") as kept:
        then = {_key(cell): cell.evaluation for cell in kept.plan.cells}
        pairs: dict[tuple[str, str], Cell] = {}
        for cell in plan.cells:
            if _key(cell) in then:
                pairs.setdefault((cell.evaluation, then[_key(cell)]), cell)
        if not pairs:
            raise ReqatError(
                f"the pinned results of tier {plan.tier.name} and its plan have no cell in common; pin the tier anew."
            )
        done = []
        for (new, old), cell in pairs.items():
            fresh, stored = paths.evaluation(plan.evaluation(new)), kept.root / "evaluations" / old
            records = record.verify(fresh, id=new), kept.records[old]
            new_outcomes, old_outcomes = (Outcomes.from_parquet(folder / pinned.OUTCOMES) for folder in (fresh, stored))
            done.append(_compare(cell, *records, new_outcomes, old_outcomes, LEVEL / len(pairs)))
        return done


def same_arithmetic(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two records leave nothing that could change a number: the outcomes have to be equal."""
    keys = ("id", "source", "native", "versions", "threads")
    machine = ("device", "cpu", "gpus")
    return (
        a.get("source") is not None
        and all(a.get(key) == b.get(key) for key in keys)
        and all(a["hardware"].get(key) == b["hardware"].get(key) for key in machine)
        and a["dirty"] is False
        and b["dirty"] is False
        and a["inputs"] == b["inputs"]
    )


def _compare(
    cell: Cell, a: dict[str, Any], b: dict[str, Any], fresh: Outcomes, then: Outcomes, level: float
) -> Comparison:
    from reqat.evaluation import paired

    fresh, then = _shared(fresh, then, _label(cell))
    strict = same_arithmetic(a, b)
    found = paired(fresh, then)
    same = fresh.digest == then.digest
    return Comparison(
        cell=_label(cell),
        tolerance="equal" if strict else "interval",
        fresh=100 * found.value_a,
        pinned=100 * found.value_b,
        difference=100 * found.value,
        lo=100 * found.lo,
        hi=100 * found.hi,
        p=found.p,
        n=found.n_problems,
        ok=same if strict else same or found.p >= level,
    )


def _shared(a: Outcomes, b: Outcomes, label: str) -> tuple[Outcomes, Outcomes]:
    """Both on the problems and sampling seeds that they have in common, without the responses' text."""
    keys = [set(zip(o.problem_id, o.seed.tolist(), strict=True)) for o in (a, b)]
    common = keys[0] & keys[1]
    if not common:
        raise ReqatError(f"{label}: the fresh and the pinned evaluation share no problem and seed; pin the tier anew.")

    def cut(o: Outcomes) -> Outcomes:
        rows = np.array([key in common for key in zip(o.problem_id, o.seed.tolist(), strict=True)])
        return dataclasses.replace(o.select(rows), response=None)

    return cut(a), cut(b)


def _key(cell: Cell) -> tuple[Any, ...]:
    return (
        cell.model,
        cell.recipe,
        cell.precision,
        cell.condition,
        cell.multiple,
        cell.training_seed,
        cell.problems,
    )


def _label(cell: Cell) -> str:
    total = f" {cell.multiple}x" if cell.multiple else ""
    seed = f" seed {cell.training_seed}" if cell.training_seed else ""
    on = f" on {cell.problems}" if cell.problems != OWN else ""
    return f"{cell.precision} {cell.method}{total}{seed}{on}" + (f" ({cell.condition})" if cell.condition else "")


def report(comparisons: list[Comparison]) -> str:
    """The comparisons as a table, and what was held."""
    width = max(len(c.cell) for c in comparisons)
    lines = [
        f"{'cell':<{width}}  {'pinned':>7} {'fresh':>7} {'diff':>7}  {'95% interval':<17} {'p':>7} {'n':>5}  tolerance"
    ]
    for c in comparisons:
        interval = f"[{c.lo:+.1f}, {c.hi:+.1f}]"
        lines.append(
            f"{c.cell:<{width}}  {c.pinned:>7.1f} {c.fresh:>7.1f} {c.difference:>+7.1f}  {interval:<17} "
            f"{c.p:>7.4f} {c.n:>5}  "
            f"{c.tolerance:<8} {'ok' if c.ok else 'MISMATCH'}"
        )
    bad = sum(not c.ok for c in comparisons)
    lines.append(
        f"{len(comparisons)} evaluations compared, {bad} mismatches. Tolerance 'equal': identical outcomes "
        "(nothing that can change a number "
        f"differs). 'interval': the paired difference has p >= {LEVEL:g}/{len(comparisons)} (Bonferroni)."
    )
    return "\n".join(lines)
