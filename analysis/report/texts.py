"""Numbers as the text of a cell: measured ones with their interval, differences with p, those of the paper."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.report.document import Text, interval, number, p_value, percent

if TYPE_CHECKING:
    from reqat.evaluation.statistics import Difference, Estimate


def measured_text(e: Estimate, bold: bool = False) -> Text:
    """`63.1` with `[60.2, 65.9]` under it."""
    return Text(percent(e.value), bold, interval(e.lo, e.hi))


def difference_text(d: Difference | None) -> Text:
    """`−2.1` with its p-value under it."""
    if d is None:
        return Text()
    p = p_value(d.p)
    return Text(percent(d.value, sign=True), detail=f"p{p}" if p.startswith("<") else f"p={p}")


def reported_text(value: float | None, bold: bool = False, digits: int = 1) -> Text:
    """A number of the paper."""
    return Text() if value is None else Text(number(value, digits), bold)
