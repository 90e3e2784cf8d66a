"""Means that are no accuracies, over problems and training runs; differences of differences; and power.

The variances are those of :mod:`reqat.evaluation.statistics`: over problems and, where there are several, over training
runs. A ratio of two sums over problems, such as nats per token, is brought into the same form by linearization.

Shapes: R training runs, P problems.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reqat.config.errors import ReqatError
from reqat.evaluation.statistics import Difference, Spread, check_level, spread_over_runs, student_p, t_quantile


@dataclass(frozen=True)
class Mean:
    """A mean over problems and training runs with its interval ``lo`` to ``hi``, and the two-sided p-value of 0."""

    value: float
    lo: float
    hi: float
    p: float
    std_error: float
    n_problems: int
    n_training_seeds: int
    df: float = math.inf
    level: float = 0.95


def ratio_observations(sums_RP: NDArray[Any], counts_RP: NDArray[Any]) -> NDArray[np.float64]:
    """Ratios of sums over problems, such as nats per token, as one observation a problem: [R, P] float64.

    The mean of a row is ``sum(sums) / sum(counts)`` of that run; its spread is that of the linearized ratio, ``ratio +
    (sums - ratio * counts) / mean(counts)``. So means and differences of them have :func:`mean_over_runs`' intervals.

    Raises ``ReqatError`` for a run without a single count.
    """
    total_R = counts_RP.sum(axis=1)
    if not (total_R > 0).all():
        raise ReqatError(f"run {int((total_R > 0).argmin())} counts nothing, so there is no ratio; leave it out")
    ratio_R1 = (sums_RP.sum(axis=1) / total_R)[:, None]
    return ratio_R1 + (sums_RP - ratio_R1 * counts_RP) / counts_RP.mean(axis=1)[:, None]


def mean_over_runs(values_RP: NDArray[Any], *, level: float = 0.95) -> Mean:
    """The mean of one observation a training run and problem, with the variances of `paired`: over problems and,
    where there are several, over training runs (Student's interval with Satterthwaite's degrees of freedom).

    Raises ``ReqatError`` for fewer than two problems.
    """
    check_level(level)
    R, P = values_RP.shape
    if P < 2:
        raise ReqatError(f"{P} problems have no spread to estimate; ask two or more")
    return _mean(spread_over_runs(np.asarray(values_RP, dtype=np.float64), augment=False), P, R, level)


def _mean(spread: Spread, n_problems: int, n_training_seeds: int, level: float) -> Mean:
    std_error, value = math.sqrt(spread.variance), spread.centre
    half = t_quantile(level, spread.df) * std_error
    p = student_p(value, std_error, spread.df)
    return Mean(value, value - half, value + half, p, std_error, n_problems, n_training_seeds, spread.df, level)


def minus(a: Difference, b: Difference) -> Mean:
    """Difference ``a`` minus difference ``b`` where the two are of different problems, and so independent: variances
    add, with Satterthwaite's degrees of freedom (Student's interval at the level of ``a``)."""
    variance = a.std_error**2 + b.std_error**2
    terms = a.std_error**4 / a.df + b.std_error**4 / b.df
    spread = Spread(a.value - b.value, variance, variance**2 / terms if terms else math.inf)
    return _mean(spread, min(a.n_problems, b.n_problems), min(a.n_training_seeds, b.n_training_seeds), a.level)


def detectable(std_error: float, df: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest true difference (in the unit of ``std_error``) that a two-sided Student test at ``alpha`` with
    ``df`` degrees of freedom would find with probability ``power``: the noncentrality at which the noncentral t
    distribution has ``power`` outside of ``+-t(1 - alpha / 2)``, times ``std_error``. Normal for infinite ``df``.

    Student's quantiles in place of the noncentral t (``t(1 - alpha / 2) + t(power)``) would understate it, by 13% at 2
    degrees of freedom and an ``alpha`` of 0.01. For Holm's procedure over m comparisons take ``alpha / m``, the level
    of its first step: what passes that is found whatever the other comparisons show.
    """
    from scipy.optimize import brentq
    from scipy.stats import nct, norm

    check_level(1 - alpha)
    check_level(power)
    critical = t_quantile(1 - alpha, df)

    def lacking(noncentrality: float) -> float:
        if math.isinf(df):
            return float(norm.sf(critical - noncentrality) + norm.cdf(-critical - noncentrality)) - power
        wrong_side = float(nct.cdf(-critical, df, noncentrality))  # scipy gives NaN where it is below some 1e-9
        return float(nct.sf(critical, df, noncentrality)) + (0.0 if math.isnan(wrong_side) else wrong_side) - power

    if lacking(0.0) >= 0:  # a test so lenient that it finds nothing as often
        return 0.0
    above = critical + 1.0
    while lacking(above) < 0:
        above *= 2
    return float(brentq(lacking, 0.0, above, xtol=1e-9)) * std_error


def mean_of_seeds(values_R: NDArray[Any], *, level: float = 0.95) -> Mean:
    """The mean of one number a training seed, with Student's interval over seeds; of one seed interval and p-value are
    NaN. Raises ``ReqatError`` for none."""
    check_level(level)
    values = np.asarray(values_R, dtype=np.float64)
    if not len(values):
        raise ReqatError("no seeds: there is no mean of nothing")
    value, df = float(values.mean()), len(values) - 1
    if not df:
        return Mean(value, math.nan, math.nan, math.nan, math.nan, 0, 1, math.nan, level)
    std_error = float(values.std(ddof=1)) / math.sqrt(len(values))
    half = t_quantile(level, df) * std_error
    p = student_p(value, std_error, df)
    return Mean(value, value - half, value + half, p, std_error, 0, len(values), df, level)
