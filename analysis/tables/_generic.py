"""One line a method or condition, columns by budget: the table of any artifact that has no module of its own here, and
of those that add a caption to it.
"""

from __future__ import annotations

from analysis.report.cells import Results
from analysis.report.document import Column, Table
from analysis.report.lines import Line, bf16_at_budget, where
from analysis.report.names import BF16
from analysis.tables._columns import BOLD, METHOD, PRECISION
from analysis.tables._grid import grid


def build(results: Results, artifact: str, *, caption: str | None = None, first: str | None = None) -> Table:
    """An artifact of `config/recipes.yaml`: one line a precision, method and condition; columns by budget.

    `caption`: the artifact's title if None. The reference is BF16 at the same budget if the artifact has BF16 cells,
    else the condition `first` (None: the first of the plan; where there are no conditions, its first method).
    """
    entries = results.of(artifact)
    has_bf16 = any(e.precision == BF16 for e in entries)
    first = entries[0].condition if first is None else first
    conditional = any(e.condition for e in entries)

    def says(condition: str) -> str:
        return condition.replace("=", ": ").replace("_", " ").replace(";", ", ")

    several = len({e.problems for e in entries}) > 1
    more = [name for name, there in (("Condition", conditional), ("Problems", several)) if there]
    stub = (PRECISION, METHOD, *(Column(name, align="l") for name in more))

    def labels(li: Line) -> list[str]:
        return [li.precision, li.method, *([says(li.condition)] if conditional else []), *([li.problems] * several)]

    return grid(
        results,
        artifact,
        caption=results.title(artifact) + "." if caption is None else caption,
        reference=bf16_at_budget if has_bf16 else where(first),
        reference_name=f"Difference to {BF16 if has_bf16 else says(first) or entries[0].method} (points)",
        stub=stub,
        labels=labels,
        bold=not conditional and not several,
        notes=(BOLD,) if not conditional and not several else (),
    )
