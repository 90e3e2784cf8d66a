"""The paper's comparisons, and how they come out here.

Five claims carry the paper: ReQAT-TQS reaches BF16 fine-tuning, it is above plain QAT, each of its first two parts
gives something, and the same traces are better than others. They are tested once, at the tier's claim budget, with
Holm's adjustment over the five (one a Table 4 precision). The same comparisons at other budgets and precisions, and a
few more for context, are adjusted by precision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

from analysis.report import paper
from analysis.report.claims import CLAIMS, Claim
from analysis.report.names import BF16, REFERENCE_PRECISION
from reqat.evaluation.statistics import holm

if TYPE_CHECKING:
    from analysis.report.cells import Entry, Results

PARITY_POINTS = 3.0  # "full-precision accuracy" is tested as: not more than this below BF16 fine-tuning
ALPHA = 0.05


@dataclass(frozen=True)
class Tested:
    """A claim at one precision and budget. Differences in points; `holm` is adjusted within the `block`."""

    claim: Claim
    model: str
    precision: str
    multiple: int
    primary: bool
    a: Entry
    b: Entry
    value: float
    lo: float
    hi: float
    p: float
    paper: tuple[float, ...]  # the paper's differences, one a budget of its own
    holm: float = math.nan

    @property
    def block(self) -> str:
        """The family of comparisons that this one is adjusted with: the primary ones, or the rest of a precision."""
        return "primary" if self.primary else self.precision

    @property
    def paper_sign(self) -> int:
        """The paper's direction: +1 or -1 if the mean of its differences and three quarters of them have that sign,
        else 0.
        """
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
        -3 points: being equal cannot be shown by a large p-value.
        """
        if self.claim.parity:
            return "agrees" if self.lo > -PARITY_POINTS else "disagrees" if self.hi < -PARITY_POINTS else "inconclusive"
        if not self.paper_sign:
            return "no direction"
        if not self.holm < ALPHA:
            return "inconclusive"
        return "agrees" if self.value * self.paper_sign > 0 else "disagrees"


def paper_differences(claim: Claim, precision: str) -> tuple[float, ...]:
    """The paper's differences a - b in points, one for each of its budgets, ascending."""

    def side(part: tuple[str | None, str, str]) -> dict[int | None, float]:
        return paper.by_budget(
            claim.artifact, precision=part[0] or precision, method=part[1], **paper.parse_condition(part[2])
        )

    a, b = side(claim.a), side(claim.b)
    return tuple(a[m] - b[m] for m in sorted(m for m in a.keys() & b.keys() if m is not None))


def tested(results: Results) -> list[Tested]:
    """Every claim that the plan has both sides of, primary ones first; an empty list if it has none.

    Primary: the main claims at the tier's `claim_total`, at NVFP4-W4A4KV4 for Table 1's and wherever Table 4 was made.
    """
    out: list[Tested] = []
    for claim in CLAIMS:
        entries = [e for e in results.entries if e.artifact == claim.artifact]
        sides = {(e.model, e.precision, e.method, e.condition, e.multiple): e for e in entries}
        for model, precision, m in dict.fromkeys((e.model, e.precision, e.multiple) for e in entries):
            if precision == BF16 or m is None:
                continue
            a, b = (sides.get((model, part[0] or precision, part[1], part[2], m)) for part in (claim.a, claim.b))
            if a is None or b is None:
                continue
            d = results.paired(a, b)
            primary = (
                claim.main
                and m == results.plan.tier.budget.claim_total
                and (claim.artifact != "table1" or precision == REFERENCE_PRECISION)
            )
            out.append(
                Tested(
                    claim,
                    model,
                    precision,
                    m,
                    primary,
                    a,
                    b,
                    100 * d.value,
                    100 * d.lo,
                    100 * d.hi,
                    d.p,
                    paper_differences(claim, precision),
                )
            )
    out.sort(key=lambda t: (not t.primary, t.precision != REFERENCE_PRECISION, t.precision, t.multiple))
    for block in {t.block for t in out}:
        at = [i for i, t in enumerate(out) if t.block == block]
        for i, adjusted in zip(at, holm([out[i].p for i in at]), strict=True):
            out[i] = replace(out[i], holm=adjusted)
    return out
