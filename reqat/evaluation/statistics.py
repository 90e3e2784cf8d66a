"""Confidence intervals of accuracies, clustered by problem, and paired comparisons on the same problems and seeds.

Eight sampled responses to one problem are not eight problems: hard problems stay hard. The unit of evidence is the
problem, so a response's outcomes are first averaged over the sampling seeds, within its problem, and every variance is
taken over problems (for equal numbers of seeds that is the cluster-robust sandwich with the P / (P - 1) correction).

**Accuracy.** A Wilson interval on the effective sample size ``n_eff = p (1 - p) / variance`` with a Student quantile,
as in survey statistics (Korn and Graubard 1998; Dean and Pagano 2015). It stays inside [0, 1], covers well near its
ends, and never has zero width: where all responses are right (or wrong) and the variance is estimated as 0, each
problem counts as one observation.

**Several training seeds.** A method is a recipe, not one checkpoint, so given the outcomes of R training runs on the
same problems the interval is for the mean over runs *and* problems yet to come: ``variance = s2_problem / P +
s2_training / R``, with Satterthwaite's degrees of freedom, which fall towards R - 1 where the runs differ most. The
overlap of the two terms (the noise of a problem within a run) is counted twice, which errs on the wide side. One run
says nothing about training noise: ``n_training_seeds`` is 1 and the interval is for that checkpoint.

**Paired difference.** The same variances, of the differences problem by problem, in a Student interval. Where fewer
than ten problems depart from the rest, one problem for and one against are added first (Bonett and Price 2012), so that
methods that never differ get an interval of positive width too. The p-value flips the signs of the problems'
differences; because differences are whole numbers of responses, its null distribution is computed exactly for any
number of problems, and there is nothing to seed. Over several training runs ``p`` is that of the Student statistic with
both variances (flipping three runs could not go below 1/4), and the sign-flip value for these very checkpoints is kept
beside it.

Shapes: R training runs, P problems, S sampling seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reqat.config.errors import ReqatError
from reqat.evaluation.outcomes import Outcomes

# Fewer problems than this that depart from the most common difference, and a Student interval is not to be trusted.
_FEW_DISCORDANT = 10


@dataclass(frozen=True)
class Estimate:
    """An accuracy in [0, 1] with its interval ``lo`` to ``hi``.

    ``std_error`` is the root of the variance behind it. ``training_interval`` is the plain Student interval over the
    runs' accuracies with the problems as given, None below three runs or where all are equal; ``training_sd`` the
    standard deviation between runs. ``n_unfinished`` counts responses that the token limit cut off, among
    ``n_responses``.
    """

    value: float
    lo: float
    hi: float
    std_error: float
    n_problems: int
    n_seeds: int
    n_training_seeds: int
    n_unfinished: int
    training_interval: tuple[float, float] | None = None
    training_sd: float | None = None
    level: float = 0.95

    @property
    def n_responses(self) -> int:
        """Graded responses in all."""
        return self.n_problems * self.n_seeds * self.n_training_seeds

    def __str__(self) -> str:
        """Percent, with what it rests on."""
        runs = f", {self.n_training_seeds} training seeds" if self.n_training_seeds > 1 else ""
        return (
            f"{100 * self.value:.1f}% [{100 * self.lo:.1f}, {100 * self.hi:.1f}] "
            f"({self.n_problems} problems, {self.n_seeds} sampling seeds{runs})"
        )


@dataclass(frozen=True)
class Difference:
    """Accuracy of a minus accuracy of b, on the same problems and seeds, with its interval and two-sided p-value.

    ``p`` is the value to report: ``p_problems`` for one training run, the Student value with both variances for
    several. ``p_problems`` is the exact sign-flip test over problems for these very checkpoints.
    """

    value: float
    lo: float
    hi: float
    p: float
    std_error: float
    value_a: float
    value_b: float
    n_problems: int
    n_seeds: int
    n_training_seeds: int
    p_problems: float
    level: float = 0.95
    df: float = math.inf
    """Degrees of freedom behind the interval."""

    def __str__(self) -> str:
        """Points, with what they rest on."""
        runs = f", {self.n_training_seeds} training seeds" if self.n_training_seeds > 1 else ""
        return (
            f"{100 * self.value:+.1f} points [{100 * self.lo:+.1f}, {100 * self.hi:+.1f}], p = {self.p:.2g} "
            f"({self.n_problems} problems, {self.n_seeds} sampling seeds{runs})"
        )


def accuracy(outcomes: Outcomes | Sequence[Outcomes], *, level: float = 0.95) -> Estimate:
    """Accuracy of one evaluation, or of one recipe over several training runs (one :class:`Outcomes` a run).

    Raises ``ReqatError`` where a problem lacks a seed that others have, or where runs differ in problems or seeds.
    """
    check_level(level)
    runs = _as_runs(outcomes, "outcomes")
    grid = _grid(runs, [f"run {r}" for r in range(len(runs))])
    R, P, S = grid.correct_RPS.shape
    mean_RP = grid.correct_RPS.mean(axis=2)
    value = float(mean_RP.mean())
    spread = spread_over_runs(mean_RP, augment=False)

    n_eff = float(R * P * S)  # what responses are worth at most, as if they were independent
    if P == 1 or value in (0.0, 1.0):  # no variance over problems to speak of: a problem is one observation
        n_eff = P
    elif spread.variance > 0:
        n_eff = min(value * (1 - value) / spread.variance, n_eff)
    lo, hi = _wilson(value, n_eff, t_quantile(level, spread.df))
    run_R = mean_RP.mean(axis=1)
    training_sd = float(run_R.std(ddof=1)) if R > 1 else None
    training_interval = None
    if R >= 3 and training_sd:
        half = t_quantile(level, R - 1) * training_sd / math.sqrt(R)
        training_interval = (max(0.0, value - half), min(1.0, value + half))
    return Estimate(
        value=value,
        lo=lo,
        hi=hi,
        std_error=math.sqrt(spread.variance),
        n_problems=P,
        n_seeds=S,
        n_training_seeds=R,
        n_unfinished=sum(run.n_unfinished for run in runs),
        training_interval=training_interval,
        training_sd=training_sd,
        level=level,
    )


def accuracy_by_family(outcomes: Outcomes | Sequence[Outcomes], *, level: float = 0.95) -> dict[str, Estimate]:
    """:func:`accuracy` of each task family on its own, families in alphabetical order."""
    runs = _as_runs(outcomes, "outcomes")
    families = sorted({family for run in runs for family in run.family})
    return {family: accuracy([_of_family(run, family) for run in runs], level=level) for family in families}


def paired(a: Outcomes | Sequence[Outcomes], b: Outcomes | Sequence[Outcomes], *, level: float = 0.95) -> Difference:
    """Accuracy of ``a`` minus accuracy of ``b``; with several training runs, the r-th of a is paired with the r-th of
    b.

    Raises ``ReqatError`` naming what differs where a and b are not on the same problems (same ids and families), the
    same sampling seeds and the same number of training runs.
    """
    check_level(level)
    runs_a, runs_b = _as_runs(a, "a"), _as_runs(b, "b")
    if len(runs_a) != len(runs_b):
        raise ReqatError(
            f"cannot pair {len(runs_a)} training runs of a with {len(runs_b)} of b; give one of each for "
            "every training seed"
        )
    R = len(runs_a)
    label = (lambda r: f" run {r}") if R > 1 else (lambda r: "")
    grid = _grid([*runs_a, *runs_b], [f"a{label(r)}" for r in range(R)] + [f"b{label(r)}" for r in range(R)])
    _, P, S = grid.correct_RPS.shape
    correct_RP = grid.correct_RPS.sum(axis=2)
    difference_RP = correct_RP[:R] - correct_RP[R:]  # in responses
    spread = spread_over_runs(difference_RP / S, augment=True)
    value = float(difference_RP.mean() / S)
    std_error = math.sqrt(spread.variance)
    half = t_quantile(level, spread.df) * std_error
    p_problems = _sign_flip_p(difference_RP.sum(axis=0))
    p = p_problems if R == 1 else student_p(value, std_error, spread.df)
    return Difference(
        value=value,
        lo=max(-1.0, spread.centre - half),
        hi=min(1.0, spread.centre + half),
        p=p,
        std_error=std_error,
        value_a=float(correct_RP[:R].mean() / S),
        value_b=float(correct_RP[R:].mean() / S),
        n_problems=P,
        n_seeds=S,
        n_training_seeds=R,
        p_problems=p_problems,
        level=level,
        df=spread.df,
    )


def student_p(distance: float, std_error: float, df: float) -> float:
    """Two-sided p-value of an estimate that lies ``distance`` from the value that is tested; normal for infinite
    ``df``."""
    from scipy.stats import norm
    from scipy.stats import t as student

    if std_error == 0:
        return 1.0 if distance == 0 else 0.0
    ratio = abs(distance) / std_error
    return float(2 * (norm.sf(ratio) if math.isinf(df) else student.sf(ratio, df)))


def holm(p_values: Sequence[float], *, comparisons: int | None = None) -> list[float]:
    """Holm's adjusted p-values (1979), in the order given: compare each with the level wanted for the whole family.

    ``comparisons``: how many the family has, where some were not made; they count as found nowhere (p = 1), so that a
    family's size does not hang on which of them are there. Raises ``ReqatError`` for a value outside [0, 1], and for
    more values than comparisons.
    """
    size = len(p_values) if comparisons is None else comparisons
    if size < len(p_values):
        raise ReqatError(f"{len(p_values)} p-values of a family of {size} comparisons")
    for value in p_values:
        if not 0 <= value <= 1:
            raise ReqatError(f"{value} is no p-value; it must lie in [0, 1]")
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (size - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


@dataclass(frozen=True)
class ClusteredMeans:
    """Means of G groups of observations with their intervals; NaN where a group is empty, and an interval of NaN where
    a single cluster leaves nothing to estimate it from. ``n_G`` counts observations, ``clusters_G`` clusters.
    """

    value_G: NDArray[np.float64]
    lo_G: NDArray[np.float64]
    hi_G: NDArray[np.float64]
    n_G: NDArray[np.int64]
    clusters_G: NDArray[np.int64]


def clustered_means(
    values_N: NDArray[Any],
    group_N: NDArray[Any],
    cluster_N: NDArray[Any],
    n_groups: int,
    *,
    weights_N: NDArray[Any] | None = None,
    proportion: bool = False,
    level: float = 0.95,
) -> ClusteredMeans:
    """The mean of each group, ``sum(values) / sum(weights)``, clustered: observations of a cluster are not independent.

    A ratio of two sums over clusters, with the linearized (sandwich) variance and a Student quantile of one degree of
    freedom less than the group has clusters: ``variance = C / (C - 1) * sum_c (values_c - mean * weights_c)^2 /
    (sum of weights)^2``.

    Args:
        values_N: what is averaged, or the numerator of a ratio.
        group_N: the group of each observation, 0 to ``n_groups - 1``; negative: none.
        cluster_N: whole numbers from 0; a cluster may have observations in several groups.
        weights_N: the denominator of the ratio; 1 each if None.
        proportion: values are 0 or 1: Wilson's interval on the effective sample size, as for accuracies.

    Raises ``ReqatError`` for arrays of different lengths.
    """
    check_level(level)
    if not len(values_N) == len(group_N) == len(cluster_N) == (len(values_N) if weights_N is None else len(weights_N)):
        raise ReqatError(
            f"clustered_means wants one group and cluster an observation: got {len(values_N)} values, {len(group_N)} "
            f"groups and {len(cluster_N)} clusters"
        )
    inside_N = np.asarray(group_N) >= 0
    group_N, cluster_N = np.asarray(group_N)[inside_N].astype(np.int64), np.asarray(cluster_N)[inside_N]
    values_N = np.asarray(values_N)[inside_N].astype(np.float64)
    n_clusters = int(cluster_N.max()) + 1 if len(cluster_N) else 1
    # Only the pairs of group and cluster that occur, so that many small groups cost no more than a few large ones.
    pairs, pair_N = np.unique(group_N * n_clusters + cluster_N, return_inverse=True)
    group_P = pairs // n_clusters
    value_P = np.bincount(pair_N, values_N, len(pairs))
    count_P = np.bincount(pair_N, minlength=len(pairs))
    weight_P = count_P if weights_N is None else np.bincount(pair_N, np.asarray(weights_N)[inside_N], len(pairs))
    n_G = np.bincount(group_P, count_P, n_groups).astype(np.int64)
    clusters_G = np.bincount(group_P, minlength=n_groups)
    weight_G = np.bincount(group_P, weight_P, n_groups)
    with np.errstate(invalid="ignore", divide="ignore"):
        value_G = np.bincount(group_P, value_P, n_groups) / weight_G
        squares_G = np.bincount(group_P, (value_P - value_G[group_P] * weight_P) ** 2, n_groups)
        variance_G = clusters_G / (clusters_G - 1) * squares_G / weight_G**2
    lo_G, hi_G = np.full(n_groups, np.nan), np.full(n_groups, np.nan)
    for g in range(n_groups):
        value, variance, clusters = float(value_G[g]), float(variance_G[g]), int(clusters_G[g])
        if clusters <= 1:
            continue
        quantile = t_quantile(level, clusters - 1)
        if not proportion:
            half = quantile * math.sqrt(variance)
            lo_G[g], hi_G[g] = value - half, value + half
            continue
        n_eff = float(n_G[g])
        if value in (0.0, 1.0):  # as in accuracy(): no variance to speak of
            n_eff = clusters
        elif variance > 0:
            n_eff = min(value * (1 - value) / variance, n_eff)
        lo_G[g], hi_G[g] = _wilson(value, n_eff, quantile)
    return ClusteredMeans(value_G, lo_G, hi_G, n_G, clusters_G)


@dataclass(frozen=True)
class _Grid:
    """Outcomes as a full array, problems and seeds in one order."""

    problems: list[str]
    seeds: list[int]
    correct_RPS: NDArray[np.int64]


@dataclass(frozen=True)
class Spread:
    """A mean, and its variance over problems and, where there are several, training runs."""

    centre: float
    variance: float
    df: float


def spread_over_runs(values_RP: NDArray[np.float64], *, augment: bool) -> Spread:
    """The variance of the mean of ``values_RP``, see the module's text; ``augment`` allows the Bonett-Price pair."""
    R, P = values_RP.shape
    values_P = values_RP.mean(axis=0)
    if augment:
        _, counts = np.unique(values_RP.sum(axis=0).round(9), return_counts=True)
        if P - counts.max() < _FEW_DISCORDANT:
            values_P = np.append(values_P, (1.0, -1.0))
    n = len(values_P)
    # One problem alone has no variance to estimate; accuracy() then falls back on one observation a problem.
    problem = float(values_P.var(ddof=1)) / n if n > 1 else 0.0
    problem_df = float(n - 1) if n > 1 else math.inf
    if R == 1:
        return Spread(float(values_P.mean()), problem, problem_df)
    training = float(values_RP.mean(axis=1).var(ddof=1)) / R
    variance = problem + training
    df = problem_df if variance == 0 else variance**2 / (problem**2 / problem_df + training**2 / (R - 1))
    return Spread(float(values_P.mean()), variance, df)


def _wilson(value: float, n: float, quantile: float) -> tuple[float, float]:
    """Wilson's interval for a proportion of ``n`` observations."""
    z2 = quantile**2 / n
    centre = (value + z2 / 2) / (1 + z2)
    half = math.sqrt(value * (1 - value) * z2 + z2**2 / 4) / (1 + z2)
    # At 0 and 1 one end is the value itself; keep rounding from pushing it past.
    return max(0.0, min(centre - half, value)), min(1.0, max(centre + half, value))


def t_quantile(level: float, df: float) -> float:
    """Two-sided Student quantile; normal for infinite degrees of freedom."""
    from scipy.stats import norm
    from scipy.stats import t as student

    tail = (1 + level) / 2
    return float(norm.ppf(tail) if math.isinf(df) else student.ppf(tail, df))


def _sign_flip_p(difference_P: NDArray[np.int64]) -> float:
    """Two-sided p-value of the sum of ``difference_P`` (whole numbers) if each sign is a fair coin, exactly.

    The distribution of the sum is built one problem at a time: half of it moves up, half moves down.
    """
    sizes = np.abs(difference_P[difference_P != 0])
    if len(sizes) == 0:
        return 1.0
    sizes = sizes // np.gcd.reduce(sizes)
    total = int(sizes.sum())
    observed = abs(int((np.sign(difference_P[difference_P != 0]) * sizes).sum()))
    mass = np.zeros(2 * total + 1)  # index j stands for a sum of j - total; only the first 2 * reach + 1 are in use
    mass[0] = 1.0
    reach = 0
    for size in sizes.tolist():
        old = mass[: 2 * reach + 1] / 2
        reach += size
        mass[: 2 * reach + 1] = 0.0
        mass[: len(old)] = old
        mass[2 * size : 2 * size + len(old)] += old
    return min(1.0, float(mass[np.abs(np.arange(-total, total + 1)) >= observed].sum()))


def _as_runs(outcomes: Outcomes | Sequence[Outcomes], name: str) -> list[Outcomes]:
    runs = [outcomes] if isinstance(outcomes, Outcomes) else list(outcomes)
    if not runs:
        raise ReqatError(f"{name} holds no outcomes; give one a training run")
    return runs


def _of_family(run: Outcomes, family: str) -> Outcomes:
    return run.select(np.array([f == family for f in run.family]))


def _grid(runs: Sequence[Outcomes], names: Sequence[str]) -> _Grid:
    """Outcomes of several runs as one array [run, problem, seed]. Raises ``ReqatError`` where they do not match."""
    families = dict(zip(runs[0].problem_id, runs[0].family, strict=True))
    problems, seeds = sorted(families), list(runs[0].seeds)
    for run, name in zip(runs, names, strict=True):
        own = dict(zip(run.problem_id, run.family, strict=True))
        _refuse("problems", names[0], set(problems), name, set(own))
        _refuse("sampling seeds", names[0], set(seeds), name, set(run.seeds))
        moved = [p for p in problems if own[p] != families[p]]
        if moved:
            raise ReqatError(
                f"problem {moved[0]!r} belongs to family {families[moved[0]]!r} in {names[0]} and to "
                f"{own[moved[0]]!r} in {name}; evaluate both on one data set"
            )
    row_of = {problem: i for i, problem in enumerate(problems)}
    correct_RPS = np.full((len(runs), len(problems), len(seeds)), -1, dtype=np.int64)
    for r, run in enumerate(runs):
        rows = np.array([row_of[problem] for problem in run.problem_id])
        correct_RPS[r, rows, np.searchsorted(seeds, run.seed)] = run.correct
        holes = np.argwhere(correct_RPS[r] < 0)
        if len(holes):
            problem, seed = problems[holes[0, 0]], seeds[holes[0, 1]]
            raise ReqatError(
                f"{names[r]} lacks {len(holes)} of {len(problems) * len(seeds)} outcomes (first: problem "
                f"{problem!r}, seed {seed}); every problem needs every seed"
            )
    return _Grid(problems, seeds, correct_RPS)


def _refuse(what: str, name_a: str, a: set[str] | set[int], name_b: str, b: set[str] | set[int]) -> None:
    if a == b:
        return
    parts = []
    for name, only in ((name_a, sorted(a - b)), (name_b, sorted(b - a))):  # type: ignore[type-var]
        if only:
            shown = ", ".join(str(v) for v in only[:3]) + (", ..." if len(only) > 3 else "")
            parts.append(f"{len(only)} only in {name} ({shown})")
    raise ReqatError(f"{name_a} and {name_b} have different {what}: {'; '.join(parts)}; evaluate both on the same ones")


def check_level(level: float) -> None:
    """Raise `ReqatError` for a probability that is 0, 1 or none at all."""
    if not 0 < level < 1:
        raise ReqatError(f"confidence level={level} must lie between 0 and 1, as 0.95 does")
