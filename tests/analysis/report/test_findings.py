"""Verdicts: what a comparison tests, that one training seed concludes nothing, and families of a fixed size."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from analysis.report.findings import Finding, adjusted, p_of
from reqat.config.errors import ReqatError
from reqat.evaluation.means import detectable, mean_over_runs


def finding(value: float, std_error: float = 1.0, df: float = 4.0, **more: Any) -> Finding:
    half = stats.t.ppf(0.975, df) * std_error
    made = Finding(value=value, lo=value - half, hi=value + half, std_error=std_error, df=df, **({"seeds": 5} | more))
    p = p_of(made, 2 * stats.t.sf(abs(value) / std_error, df))
    return Finding(**(vars(made) | {"p": p}))


@pytest.mark.parametrize(
    ("value", "margin", "sign", "seeds", "verdict"),
    [
        (9.0, 0.0, 1, 5, "agrees"),
        (-9.0, 0.0, 1, 5, "disagrees"),
        (-9.0, 0.0, -1, 5, "agrees"),
        (2.0, 0.0, 1, 5, "inconclusive"),
        (9.0, 0.0, 0, 5, "no direction"),
        (9.0, 0.0, 1, 1, "one training seed"),
        (9.0, 0.0, 0, 1, "no direction"),
        (9.0, 0.0, 1, 0, "agrees"),  # nothing is trained: there is no seed to ask for
        (0.0, -3.0, 1, 5, "agrees"),  # as good: its whole interval is above -3
        (4.0, -3.0, 1, 5, "agrees"),
        (-1.0, -3.0, 1, 5, "inconclusive"),  # no difference to 0 shows nothing
        (-9.0, -3.0, 1, 5, "disagrees"),
        (0.0, 3.0, -1, 5, "agrees"),  # no gain
        (9.0, 3.0, -1, 5, "disagrees"),
        (3.0, 3.0, -1, 5, "inconclusive"),
    ],
)
def test_verdicts(value: float, margin: float, sign: int, seeds: int, verdict: str) -> None:
    (made,) = adjusted([finding(value, margin=margin, sign=sign, seeds=seeds)], 1)
    assert made.verdict == verdict
    tested = sign != 0 and seeds != 1
    assert made.testable == tested == (not math.isnan(made.p)) == (not math.isnan(made.holm))
    if tested:
        assert made.p == pytest.approx(2 * stats.t.sf(abs(value - margin), 4))
        # Alone in its family, p below 0.05 is the whole interval on one side of the margin.
        assert (made.p < 0.05) == (not made.lo <= margin <= made.hi)


@pytest.mark.parametrize(("margin", "sign"), [(0.0, 1), (-3.0, 1), (3.0, -1)])  # a direction, as good, no gain
def test_models_that_solve_nothing_show_nothing(margin: float, sign: int) -> None:
    low = finding(0.0, std_error=0.1, margin=margin, sign=sign, at_floor=True)
    (made, other) = adjusted([low, finding(9.0, sign=1)], 2)
    assert made.verdict == "at the floor" and not made.testable
    assert math.isnan(made.p) and math.isnan(made.holm) and math.isnan(made.detectable)
    assert other.holm == pytest.approx(2 * other.p), "the family keeps its size"
    assert finding(0.0, sign=0, at_floor=True).verdict == "no direction"
    assert finding(0.0, sign=1, seeds=1, at_floor=True).verdict == "at the floor"


def test_an_exact_p_of_zero_is_kept() -> None:
    assert p_of(finding(2.0, sign=1), 0.123) == 0.123
    assert p_of(finding(2.0, sign=1, margin=-3.0), 0.123) == pytest.approx(2 * stats.t.sf(5, 4))


def test_families_have_the_size_of_the_protocol_whatever_is_there() -> None:
    strong, weak = finding(8.0, sign=1), finding(4.0, sign=1)
    nothing, one = finding(9.0), finding(9.0, sign=1, seeds=1)
    both = adjusted([strong, nothing, weak, one], 5)
    assert [f.holm for f in both if f.testable] == pytest.approx([5 * strong.p, 4 * weak.p])
    (alone,) = adjusted([strong], 5)
    assert alone.holm == both[0].holm and alone.comparisons == both[0].comparisons == 5
    assert alone.detectable == pytest.approx(detectable(1.0, 4, alpha=0.05 / 5))
    assert both[1].comparisons == both[3].comparisons == 0, "in no family"
    with pytest.raises(ReqatError, match="family of 1"):
        adjusted([strong, weak], 1)


def test_as_good_is_claimed_as_rarely_as_it_says_where_it_is_not_so() -> None:
    """Five trainings that truly lie at the margin: of many experiments, one in forty says that they are as good."""
    rng, trials, margin = np.random.default_rng(1), 1500, -3.0
    wrong = 0
    for values in margin + rng.normal(0, 3, (trials, 5, 1)) + rng.normal(0, 2, (trials, 5, 40)):
        m = mean_over_runs(values)
        f = Finding(value=m.value, lo=m.lo, hi=m.hi, std_error=m.std_error, df=m.df, seeds=5, margin=margin, sign=1)
        (f,) = adjusted([Finding(**(vars(f) | {"p": p_of(f, m.p)}))], 1)
        wrong += f.verdict == "agrees"
    assert 0.014 < wrong / trials < 0.036  # 0.025, give or take what 1,500 experiments leave open
