"""The paper's comparisons, and how they come out here.

Five claims carry the paper: ReQAT-TQS reaches BF16 fine-tuning, it is above plain QAT, each of its first two parts
gives something, and the same traces are better than others. They are tested once a model, at the budget that its claims
rest on and at NVFP4-W4A4KV4, and their p-values are adjusted over these five. The same comparisons at other budgets and
precisions, and the paper's other claims, are context, adjusted over all that the protocol has at their precision
(`analysis.report.claims.family_at`). What is tested, and when nothing is, stands in `analysis.report.findings`.

**Test.** Accuracies are compared on the same problems and sampling seeds, training seed by training seed. With several
training seeds these are the unit above the problems: the variance of the mean difference is that over problems plus
that over training seeds, in a Student interval with Satterthwaite's degrees of freedom, which fall to the number of
seeds minus 1 where trainings differ most (`reqat.evaluation.statistics.paired`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

from analysis.report import pooled, printed
from analysis.report.cells import Results, entries
from analysis.report.claims import CLAIMS, Cells, Claim, Comparison, comparisons, family_at, primary
from analysis.report.findings import Finding, adjusted, p_of
from analysis.report.names import REFERENCE_PRECISION
from reqat.evaluation.means import minus

if TYPE_CHECKING:
    from analysis.report.cells import Entry
    from reqat.evaluation.means import Mean
    from reqat.evaluation.statistics import Difference

PARITY_POINTS = 3.0  # "full-precision accuracy" is tested as: not more than this below BF16 fine-tuning
FLOOR = 0.1  # where both sides solve less than this share, nothing is tested
PRIMARY = tuple(claim for claim in CLAIMS if claim.main)


@dataclass(frozen=True, kw_only=True)
class Tested(Finding):
    """A claim at one precision and budget. Differences in points; `holm` and `detectable` are adjusted within the
    `block`."""

    claim: Claim
    model: str
    precision: str
    multiple: int | None
    primary: bool
    a: tuple[Entry, ...]
    """One a set of problems; cut to the training seeds that both sides have."""
    b: tuple[Entry, ...]
    beyond: tuple[Entry, Entry] | None = None
    sides: tuple[str, str]
    """The precisions of both."""

    @property
    def block(self) -> str:
        """The family of comparisons that this one is adjusted with: the primary ones, or the rest of a precision."""
        return "primary" if self.primary else self.precision

    @property
    def paper(self) -> tuple[float, ...]:
        """The paper's differences, one a budget of its own, where it has this comparison at this precision and for this
        model; else empty."""
        return () if self.paper_of else printed.differences(self.claim, self.precision)

    @property
    def paper_of(self) -> str | None:
        """The precision or model that the paper's number is of, if that is another one."""
        return printed.source(self.claim, self.precision, self.model, self.sides)

    @property
    def paper_mean(self) -> float:
        """Mean of the paper's differences, points."""
        return fmean(self.paper) if self.paper else math.nan

    @property
    def paper_noise(self) -> float:
        """How far from 0 that mean can lie by the paper's sampling alone, points; NaN where that is not known."""
        return printed.noise(self.claim, self.precision) if self.paper else math.nan

    @property
    def within_noise(self) -> bool:
        """Whether the paper's number, which its direction comes from, is smaller than its own sampling noise."""
        return self.claim.kind == "direction" and printed.within_noise(self.claim, self.precision)


def hypothesis(claim: Claim, precision: str) -> tuple[float, int]:
    """Margin (points) and sign of a claim at a precision, as `Finding` has them."""
    if claim.kind == "direction":
        return 0.0, printed.direction(claim, precision)
    return (-PARITY_POINTS, 1) if claim.kind == "parity" else (PARITY_POINTS, -1)


def family_size(results: Results, model: str, block: str) -> int:
    """How many comparisons the protocol has in a block, whether the run has them or not."""
    if block == "primary":
        return len(PRIMARY)
    return sum(hypothesis(claim, block)[1] != 0 for claim in family_at(block, results.plan.tier, model))


def tested(results: Results) -> list[Tested]:
    """Every claim that the plan has both sides of, primary ones first; an empty list if it has none."""
    out = [_tested(results, c) for c in comparisons(results.plan)]
    out.sort(key=lambda t: (not t.primary, t.precision != REFERENCE_PRECISION, t.precision, t.multiple or 0))
    for model, block in {(t.model, t.block) for t in out}:
        at = [i for i, t in enumerate(out) if (t.model, t.block) == (model, block)]
        size = family_size(results, model, block)
        for i, finding in zip(at, adjusted([out[i] for i in at], size), strict=True):
            out[i] = finding
    return out


def missing(found: list[Tested], model: str) -> list[str]:
    """The primary claims that a run does not have for a model."""
    there = {t.claim.name for t in found if t.primary and t.model == model}
    return [claim.name for claim in PRIMARY if claim.name not in there]


def _tested(results: Results, c: Comparison) -> Tested:
    a, b = _entries(results, c.a, c.b)
    d: Difference | Mean = results.paired(a[0], b[0]) if len(a) == 1 else pooled.paired(results, a, b)
    seeds = d.n_training_seeds if any(e.total_tokens is not None for e in (a[0], b[0])) else 0
    pairs, beyond = [(a, b)], None
    if c.beyond is not None:
        (more_a,), (more_b,) = _entries(results, c.beyond[:1], c.beyond[1:])
        beyond = more_a, more_b
        pairs.append(((more_a,), (more_b,)))
        d = minus(results.paired(a[0], b[0]), results.paired(more_a, more_b))
    margin, sign = hypothesis(c.claim, c.precision)
    found = Tested(
        claim=c.claim,
        model=c.model,
        precision=c.precision,
        multiple=c.multiple,
        primary=primary(c.claim, c.precision, c.multiple, results.plan.tier.claim_total(c.model)),
        a=a,
        b=b,
        beyond=beyond,
        sides=(a[0].precision, b[0].precision),
        value=100 * d.value,
        lo=100 * d.lo,
        hi=100 * d.hi,
        std_error=100 * d.std_error,
        df=d.df,
        seeds=seeds,
        margin=margin,
        sign=sign,
        at_floor=any(max(pooled.estimate(results, side).value for side in pair) < FLOOR for pair in pairs),
    )
    return replace(found, p=p_of(found, d.p))


def _entries(results: Results, a: tuple[Cells, ...], b: tuple[Cells, ...]) -> tuple[tuple[Entry, ...], ...]:
    """The entries of both sides, one a set of problems, cut to the training seeds that both have."""
    pairs = [results.common(_entry(one), _entry(other)) for one, other in zip(a, b, strict=True)]
    return tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)


def _entry(cells: Cells) -> Entry:
    """Cells that differ in their training seed alone, as one entry."""
    (entry,) = entries(cells)
    return entry
