"""The paper's comparisons, and how they come out here.

Five claims carry the paper: ReQAT-TQS reaches BF16 fine-tuning, it is above plain QAT, each of its first two parts
gives something, and the same traces are better than others. They are tested once, at the tier's claim budget and at
NVFP4-W4A4KV4 (where a tier has a claim at that precision nowhere, at the paper's own), with Holm's adjustment over
them. The same comparisons at other budgets and precisions, and the paper's other claims, are context, adjusted by
precision.

**Test.** Accuracies are compared on the same problems and sampling seeds, training seed by training seed. With several
training seeds these are the unit above the problems: the variance of the mean difference is that over problems plus
that over training seeds, in a Student interval with Satterthwaite's degrees of freedom, which fall to the number of
seeds minus 1 where trainings differ most (`reqat.evaluation.statistics.paired`). One training seed says nothing about
another.

**Power.** An inconclusive verdict means little where nothing could have been seen, so each comparison has the smallest
difference that it would have found with 80% probability, at the level of Holm's first step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

from analysis.report import paper
from analysis.report.cells import entries
from analysis.report.claims import Claim, Comparison, Row, comparisons
from analysis.report.names import REFERENCE_PRECISION
from reqat.evaluation.means import detectable, minus
from reqat.evaluation.statistics import holm

if TYPE_CHECKING:
    from analysis.report.cells import Entry, Results
    from reqat.config.plan import Cell
    from reqat.evaluation.means import Mean
    from reqat.evaluation.statistics import Difference

PARITY_POINTS = 3.0  # "full-precision accuracy" is tested as: not more than this below BF16 fine-tuning
ALPHA = 0.05
POWER = 0.8


@dataclass(frozen=True)
class Tested:
    """A claim at one precision and budget. Differences in points; `holm` and `detectable` are adjusted within the
    `block`."""

    claim: Claim
    model: str
    precision: str
    multiple: int | None
    primary: bool
    a: Entry
    b: Entry
    value: float
    lo: float
    hi: float
    p: float
    paper: tuple[float, ...]  # the paper's differences, one a budget of its own
    holm: float = math.nan
    std_error: float = math.nan
    df: float = math.inf
    detectable: float = math.nan

    @property
    def block(self) -> str:
        """The family of comparisons that this one is adjusted with: the primary ones, or the rest of a precision."""
        return "primary" if self.primary else self.precision

    @property
    def paper_sign(self) -> int:
        """The paper's direction: +1 or -1 if the mean of its differences and three quarters of them have that sign,
        else 0; where it prints none, the one that it states.
        """
        if not self.paper:
            return self.claim.stated
        sign = (self.paper_mean > 0) - (self.paper_mean < 0)
        return sign if 4 * sum(d * sign > 0 for d in self.paper) >= 3 * len(self.paper) > 0 else 0

    @property
    def paper_mean(self) -> float:
        """Mean of the paper's differences, points."""
        return fmean(self.paper) if self.paper else math.nan

    @property
    def verdict(self) -> str:
        """Agrees with the paper's direction, disagrees, or inconclusive; "no direction" where the paper itself shows
        none.

        A direction needs a Holm-adjusted p below 0.05. Parity asks whether the interval lies above, below or across
        -3 points, and no gain whether it lies below, above or across 3: being equal cannot be shown by a large p-value.
        """
        if self.claim.kind != "direction":
            sign = 1 if self.claim.kind == "parity" else -1
            worst, best = sorted((sign * self.lo, sign * self.hi))
            return "agrees" if worst > -PARITY_POINTS else "disagrees" if best < -PARITY_POINTS else "inconclusive"
        if not self.paper_sign:
            return "no direction"
        if not self.holm < ALPHA:
            return "inconclusive"
        return "agrees" if self.value * self.paper_sign > 0 else "disagrees"


def paper_differences(claim: Claim, precision: str) -> tuple[float, ...]:
    """The paper's differences a - b in points, one for each of its budgets, ascending; of several metrics their mean.

    A side without a budget stands against every one of the other's; empty where the paper lacks a side at this
    precision.
    """
    printed = claim.printed
    if printed is None:
        return ()

    def of(metric: str) -> dict[int | None, float]:
        a, b = (_reported(printed.artifact, row, precision, metric) for row in (printed.a, printed.b))
        if set(a) == {None} != set(b):
            a = dict.fromkeys(b, a[None])
        elif set(b) == {None} != set(a):
            b = dict.fromkeys(a, b[None])
        return {m: a[m] - b[m] for m in a.keys() & b.keys()}

    found = [of(metric) for metric in printed.metrics]
    shared = set.intersection(*(set(by_budget) for by_budget in found))
    less = of(printed.beyond) if printed.beyond is not None else dict.fromkeys(shared, 0.0)
    ordered = sorted(shared & less.keys(), key=lambda m: m or 0)
    return tuple(fmean(by_budget[m] for by_budget in found) - less[m] for m in ordered)


def _reported(artifact: str, row: Row, precision: str, metric: str) -> dict[int | None, float]:
    at, method, condition = row
    given = paper.parse_condition(condition.format(precision=precision))
    return paper.by_budget(artifact, precision=at or precision, method=method, metric=metric, **given)


def tested(results: Results) -> list[Tested]:
    """Every claim that the plan has both sides of, primary ones first; an empty list if it has none.

    Primary: the main claims at the claim budget, at NVFP4-W4A4KV4 or, where the plan has a claim at that precision for
    no model, wherever it has it.
    """
    found = comparisons(results.plan)
    at_reference = {c.claim.name for c in found if c.precision == REFERENCE_PRECISION}
    out = [_tested(results, c, at_reference) for c in found]
    out.sort(key=lambda t: (not t.primary, t.precision != REFERENCE_PRECISION, t.precision, t.multiple or 0))
    for block in {t.block for t in out}:
        at = [i for i, t in enumerate(out) if t.block == block]
        for i, adjusted in zip(at, holm([out[i].p for i in at]), strict=True):
            seen = detectable(out[i].std_error, out[i].df, alpha=ALPHA / len(at), power=POWER)
            out[i] = replace(out[i], holm=adjusted, detectable=seen)
    return out


def _tested(results: Results, c: Comparison, at_reference: set[str]) -> Tested:
    tier = results.plan.tier
    claim_total = tier.models[c.model].claim_total or tier.budget.claim_total
    primary = (
        c.claim.main
        and c.multiple == claim_total
        and (c.precision == REFERENCE_PRECISION or c.claim.name not in at_reference)
    )
    a, b = _entry(c.a), _entry(c.b)
    d: Difference | Mean = results.paired(a, b)
    if c.beyond is not None:
        d = minus(results.paired(a, b), results.paired(_entry(c.beyond[0]), _entry(c.beyond[1])))
    return Tested(
        claim=c.claim,
        model=c.model,
        precision=c.precision,
        multiple=c.multiple,
        primary=primary,
        a=a,
        b=b,
        value=100 * d.value,
        lo=100 * d.lo,
        hi=100 * d.hi,
        p=d.p,
        paper=paper_differences(c.claim, c.precision),
        std_error=100 * d.std_error,
        df=d.df,
    )


def _entry(cells: tuple[Cell, ...]) -> Entry:
    """Cells that differ in their training seed alone, as one entry."""
    (entry,) = entries(cells)
    return entry
