"""What a comparison tests, and what its verdict is: the rules that all claims share, whatever is measured.

**Hypothesis.** A difference is tested against a `margin`, and `sign` is the side of it on which the claim would lie:
for a direction the margin is 0; for "as good as" it lies below 0 and the sign is +1; for "no gain" above 0, with -1.
Being equal cannot be shown by a large p-value, so p is always that of the margin. A comparison of sign 0 tests nothing:
it has no p-value and is in no family.

**One training seed.** Where methods are trained, the unit is the training seed. One of them has no spread, so its
difference and its interval over problems are shown, and nothing is concluded.

**The floor.** Two models that solve next to nothing are equal whatever they are, so a comparison of accuracies of which
neither reaches a tenth is shown and not tested (`at_floor`).

**Families.** P-values are adjusted over all comparisons of their family (Holm), whose size is fixed by the protocol:
what a run lacks, or has one training seed of, counts as a comparison that found nothing.

**Power.** An inconclusive verdict means little where nothing could have been seen, so each comparison has the smallest
difference from its margin that it would have found with 80% probability, at the level of Holm's first step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from reqat.evaluation.means import detectable
from reqat.evaluation.statistics import holm, student_p

ALPHA = 0.05
POWER = 0.8

AGREES, DISAGREES, INCONCLUSIVE = "agrees", "disagrees", "inconclusive"
ONE_SEED, NO_DIRECTION, AT_FLOOR = "one training seed", "no direction", "at the floor"
TESTED = (AGREES, DISAGREES, INCONCLUSIVE)
"""The verdicts of comparisons that test something."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A measured difference a - b with its 95% interval, in any unit, and what it tests."""

    value: float
    lo: float
    hi: float
    std_error: float
    df: float
    seeds: int
    """Training seeds behind the difference; 0 where nothing on either side is trained."""
    margin: float = 0.0
    sign: int = 0
    """+1 or -1: the claim lies above, or below, the margin. 0: it has no side."""
    at_floor: bool = False
    """Whether both sides are too low to differ."""
    p: float = math.nan
    """Two-sided, of the difference being the margin; NaN where nothing is tested."""
    holm: float = math.nan
    comparisons: int = 0
    """Size of the family that `holm` is adjusted over."""
    detectable: float = math.nan

    def columns(self) -> dict[str, float | str]:
        """As tables of data show it."""
        return {
            "difference": self.value,
            "lo": self.lo,
            "hi": self.hi,
            "margin": self.margin,
            "direction": self.sign,
            "p": self.p,
            "p_holm": self.holm,
            "comparisons": self.comparisons,
            "std_error": self.std_error,
            "detectable": self.detectable,
            "verdict": self.verdict,
        }

    @property
    def testable(self) -> bool:
        """Whether it tests something."""
        return self.sign != 0 and self.seeds != 1 and not self.at_floor

    @property
    def verdict(self) -> str:
        """`AGREES` or `DISAGREES` with the claim if the adjusted p is below 0.05, else `INCONCLUSIVE`; where nothing is
        tested, `NO_DIRECTION`, `AT_FLOOR` or `ONE_SEED`."""
        if not self.sign:
            return NO_DIRECTION
        if self.at_floor:
            return AT_FLOOR
        if self.seeds == 1:
            return ONE_SEED
        if not self.holm < ALPHA:
            return INCONCLUSIVE
        return AGREES if (self.value - self.margin) * self.sign > 0 else DISAGREES


F = TypeVar("F", bound=Finding)


def p_of(finding: Finding, p_of_zero: float) -> float:
    """Its p-value against its margin, where that against 0 is known (it may be exact, as Student's is not)."""
    if not finding.testable:
        return math.nan
    return student_p(finding.value - finding.margin, finding.std_error, finding.df) if finding.margin else p_of_zero


def adjusted(findings: Sequence[F], comparisons: int) -> list[F]:
    """Findings of one family, in their order, with `holm`, `detectable` and `comparisons`: how many the family has.

    Raises `ReqatError` if more of them test something.
    """
    values = iter(holm([f.p for f in findings if f.testable], comparisons=comparisons))
    return [
        replace(
            f,
            comparisons=comparisons,
            holm=next(values),
            detectable=detectable(f.std_error, f.df, alpha=ALPHA / comparisons, power=POWER),
        )
        if f.testable
        else f
        for f in findings
    ]
