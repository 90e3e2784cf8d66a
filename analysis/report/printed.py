"""What the paper prints of a claim: its differences, where they are from, how sure they can be, and the direction.

The paper gives no intervals, so a difference of a few tenths of a point on 120 problems would be read as a finding. Its
own sampling noise follows from the numbers of problems and sampling seeds (`analysis.report.paper.sampling_variance`):
a difference within 1.96 standard errors of 0 gives no direction to test, unless the protocol fixed one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean

from analysis.report import paper
from analysis.report.claims import Claim, Row
from analysis.report.names import REFERENCE_PRECISION

NOISE = 1.96  # standard errors: what 95% of differences by chance alone stay within


def differences(claim: Claim, precision: str) -> tuple[float, ...]:
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


def noise(claim: Claim, precision: str) -> float:
    """How far from 0 (points) the mean of the paper's differences can lie by sampling alone, at 95%; NaN where the
    paper prints none, or does not say how many responses it graded."""
    printed = claim.printed
    if printed is None or not differences(claim, precision):
        return math.nan
    variance = 0.0
    # The mean over metrics, and the other benchmark that is subtracted: independent responses, so variances add.
    for metrics in (printed.metrics, () if printed.beyond is None else (printed.beyond,)):
        for metric in metrics:
            for values in _compared(printed.artifact, printed.a, printed.b, precision, metric):
                each = [paper.sampling_variance(value, metric) for value in values]
                known = [v for v in each if v is not None]
                if len(known) < len(each):
                    return math.nan
                variance += sum(known) / len(values) ** 2 / len(metrics) ** 2
    return NOISE * math.sqrt(variance)


def within_noise(claim: Claim, precision: str) -> bool:
    """Whether the mean of the paper's differences is smaller than its own `noise`."""
    found, limit = differences(claim, precision), noise(claim, precision)
    return bool(found) and abs(fmean(found)) < limit  # never, if the limit is NaN


def direction(claim: Claim, precision: str) -> int:
    """The paper's direction: +1 or -1, the sign of a - b, if the mean of its differences and three quarters of them
    have that sign, else 0; where it prints none, the one that it states.

    0, too, where the mean is within the paper's own noise; not of the primary claims, whose directions the protocol
    fixes.
    """
    found = differences(claim, precision)
    if not found:
        return claim.stated
    if within_noise(claim, precision) and not (claim.main and precision == REFERENCE_PRECISION):
        return 0
    sign = (fmean(found) > 0) - (fmean(found) < 0)
    return sign if 4 * sum(d * sign > 0 for d in found) >= 3 * len(found) else 0


def printed_at(claim: Claim, precision: str) -> tuple[str, str] | None:
    """The precisions of the two sides that `differences` returns at this precision; None without a printed number."""
    if claim.printed is None:
        return None
    a, b = (row[0] or precision for row in (claim.printed.a, claim.printed.b))
    return a, b


def source(claim: Claim, precision: str, model: str, sides: tuple[str, str]) -> str | None:
    """What keeps the paper's number from standing beside a measured comparison of these two precisions on this model:
    the precision, or the model, that it is of. None where it is of the same.

    The testbeds' models stand in for the paper's; only a model of the paper itself can be the wrong one.
    """
    at = printed_at(claim, precision)
    if at is None or claim.printed is None or not differences(claim, precision):
        return None
    reported = paper.models(claim.printed.artifact)
    known = {r.model for r in paper.reported()}
    if model in known - reported:
        return ", ".join(sorted(reported))
    return None if at == sides else at[0] if at[1] in (at[0], sides[1]) else " and ".join(at)


def _reported(artifact: str, row: Row, precision: str, metric: str) -> dict[int | None, float]:
    at, method, condition = row
    given = paper.parse_condition(condition.format(precision=precision))
    return paper.by_budget(artifact, precision=at or precision, method=method, metric=metric, **given)


def _compared(artifact: str, a: Row, b: Row, precision: str, metric: str) -> Iterator[list[float]]:
    """Of each side the numbers that its mean is made of: those at budgets of both; one alone counts once."""
    both = [_reported(artifact, row, precision, metric) for row in (a, b)]
    budgets = [set(side) for side in both]
    shared = budgets[0] & budgets[1] if {None} not in budgets else budgets[0] | budgets[1]
    for side in both:
        yield [value for budget, value in side.items() if budget in shared]
