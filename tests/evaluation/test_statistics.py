"""Intervals against closed forms, simulation and scipy; p-values against enumeration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from reqat.config.errors import ReqatError
from reqat.evaluation import Outcomes, accuracy, accuracy_by_family, holm, paired
from reqat.evaluation.means import detectable, mean_over_runs, ratio_observations
from reqat.evaluation.statistics import clustered_means

Make = Callable[..., Outcomes]


def drawn(rng: np.random.Generator, P: int, S: int, spread: float = 1.0, mean: float = 0.6) -> np.ndarray:
    """Correct answers [P, S] of problems of different difficulty; small ``spread`` means all-or-nothing problems."""
    chance = rng.beta(mean * spread, (1 - mean) * spread, size=(P, 1))
    return rng.random((P, S)) < chance


def wilson(p: float, n: float, z: float) -> tuple[float, float]:
    """The two roots of (x - p)^2 = z^2 x (1 - x) / n."""
    a, b, c = 1 + z**2 / n, -(2 * p + z**2 / n), p**2
    root = math.sqrt(max(0.0, b**2 - 4 * a * c))
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


def test_interval_closed_form(outcomes: Make) -> None:
    """The variance is the cluster-robust sandwich over single responses; the interval solves Wilson's equation."""
    correct = drawn(np.random.default_rng(0), 50, 4)
    found = accuracy(outcomes(correct))
    p = correct.mean()
    sandwich = ((correct - p).sum(axis=1) ** 2).sum() * (50 / 49) / correct.size**2
    assert found.value == pytest.approx(p, abs=1e-12)
    assert found.std_error == pytest.approx(math.sqrt(sandwich), rel=1e-12)
    expected = wilson(p, p * (1 - p) / sandwich, stats.t.ppf(0.975, 49))
    assert (found.lo, found.hi) == pytest.approx(expected, abs=1e-12)
    assert (found.n_problems, found.n_seeds, found.n_training_seeds, found.n_responses) == (50, 4, 1, 200)


def test_identical_seeds_add_nothing(outcomes: Make) -> None:
    """Eight copies of each response are worth one."""
    once = drawn(np.random.default_rng(1), 60, 1)
    a, b = accuracy(outcomes(once)), accuracy(outcomes(np.repeat(once, 8, axis=1)))
    assert (a.lo, a.hi) == pytest.approx((b.lo, b.hi), abs=1e-12)
    assert b.n_responses == 480


@pytest.mark.parametrize("P", [1, 2, 40])
@pytest.mark.parametrize("value", [0, 1])
def test_all_right_or_all_wrong(outcomes: Make, P: int, value: int) -> None:
    found = accuracy(outcomes(np.full((P, 8), value)))
    quantile = stats.t.ppf(0.975, P - 1) if P > 1 else stats.norm.ppf(0.975)
    assert (found.lo, found.hi) == pytest.approx(wilson(value, P, quantile), abs=1e-12)
    assert found.hi - found.lo > 0.05


@settings(max_examples=60, deadline=None)
@given(
    P=st.integers(1, 12),
    S=st.integers(1, 4),
    R=st.integers(1, 3),
    mean=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_intervals_hold_the_value_and_have_width(
    outcomes: Make, P: int, S: int, R: int, mean: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    runs = [outcomes(rng.random((P, S)) < mean) for _ in range(R)]
    found = accuracy(runs)
    assert 0 <= found.lo <= found.value <= found.hi <= 1 and found.hi > found.lo
    others = [outcomes(rng.random((P, S)) < 0.5) for _ in range(R)]
    difference = paired(runs, others)
    assert -1 <= difference.lo <= difference.value <= difference.hi <= 1 and difference.hi > difference.lo
    assert 0 < difference.p <= 1
    mirrored = paired(others, runs)
    assert (mirrored.value, mirrored.lo, mirrored.hi, mirrored.p) == pytest.approx(
        (-difference.value, -difference.hi, -difference.lo, difference.p), abs=1e-9
    )


@pytest.mark.parametrize(("P", "S", "mean", "spread"), [(60, 4, 0.6, 0.8), (25, 8, 0.9, 2.0), (40, 1, 0.5, 1.0)])
def test_coverage_over_problems(outcomes: Make, P: int, S: int, mean: float, spread: float) -> None:
    rng = np.random.default_rng(11)
    n = 300
    intervals = [accuracy(outcomes(drawn(rng, P, S, spread, mean))) for _ in range(n)]
    covered = sum(e.lo <= mean <= e.hi for e in intervals)
    # 95%, within what 300 trials and a few dozen problems allow; responses taken as independent would cover far less.
    assert 0.925 * n <= covered <= 0.985 * n


def test_coverage_over_training_runs(outcomes: Make) -> None:
    """Three runs whose true accuracies differ: the interval is for the mean over runs, not for these three."""
    rng = np.random.default_rng(12)
    P, n, sd = 150, 200, 0.08
    covered = 0
    for _ in range(n):
        difficulty = rng.normal(size=(P, 1))
        runs = [outcomes(rng.random((P, 2)) < stats.norm.cdf(difficulty + rng.normal() * sd / 0.28)) for _ in range(3)]
        found = accuracy(runs)
        covered += found.lo <= 0.5 <= found.hi  # by symmetry
    assert 0.93 * n <= covered <= n


def test_training_runs_closed_form(outcomes: Make) -> None:
    rng = np.random.default_rng(2)
    correct = np.stack([drawn(rng, 30, 2, mean=m) for m in (0.5, 0.6, 0.8)])
    found = accuracy([outcomes(c) for c in correct])
    run = correct.mean(axis=(1, 2))
    over_problems = correct.mean(axis=(0, 2)).var(ddof=1) / 30
    over_runs = run.var(ddof=1) / 3
    variance = over_problems + over_runs
    df = variance**2 / (over_problems**2 / 29 + over_runs**2 / 2)
    p = correct.mean()
    assert found.std_error == pytest.approx(math.sqrt(variance), rel=1e-12)
    assert (found.lo, found.hi) == pytest.approx(wilson(p, p * (1 - p) / variance, stats.t.ppf(0.975, df)), abs=1e-12)
    assert found.training_sd == pytest.approx(run.std(ddof=1), rel=1e-12)
    assert found.training_interval == pytest.approx(stats.t.interval(0.95, 2, run.mean(), stats.sem(run)), abs=1e-12)
    assert found.n_training_seeds == 3
    assert accuracy([outcomes(correct[0])]) == accuracy(outcomes(correct[0]))


def test_paired_interval_is_the_student_interval_of_the_differences(outcomes: Make) -> None:
    rng = np.random.default_rng(3)
    a, b = drawn(rng, 80, 4, mean=0.7), drawn(rng, 80, 4, mean=0.6)
    found = paired(outcomes(a), outcomes(b))
    reference = stats.ttest_rel(a.mean(axis=1), b.mean(axis=1))
    assert (found.lo, found.hi) == pytest.approx(tuple(reference.confidence_interval(0.95)), abs=1e-12)
    assert found.value == pytest.approx(a.mean() - b.mean(), abs=1e-12)
    assert (found.value_a, found.value_b) == pytest.approx((a.mean(), b.mean()), abs=1e-12)
    assert found.p == found.p_problems == pytest.approx(reference.pvalue, rel=0.25)  # another test, a like answer


@pytest.mark.parametrize("seed", range(8))
def test_exact_sign_flip_against_scipy(outcomes: Make, seed: int) -> None:
    """scipy enumerates all 2^n flips; twice the smaller tail is the two-sided value of a symmetric distribution."""
    rng = np.random.default_rng(seed)
    P, S = 11, int(rng.integers(1, 4))
    a, b = rng.random((P, S)) < 0.75, rng.random((P, S)) < 0.5
    reference = stats.permutation_test(
        (a.sum(axis=1), b.sum(axis=1)), lambda x, y: (x - y).sum(), permutation_type="samples", n_resamples=np.inf
    )
    assert paired(outcomes(a), outcomes(b)).p == pytest.approx(min(1, reference.pvalue), rel=1e-12)


def test_exact_sign_flip_against_enumeration_and_mcnemar(outcomes: Make) -> None:
    a = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1], [1, 0, 1]])
    b = np.array([[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1], [1, 0, 0], [0, 1, 1]])
    d = (a - b).sum(axis=1)
    sums = [abs(sum(s * x for s, x in zip(signs, d, strict=True))) for signs in itertools.product((1, -1), repeat=6)]
    assert paired(outcomes(a), outcomes(b)).p == pytest.approx(np.mean([s >= abs(d.sum()) for s in sums]), rel=1e-12)
    # With one seed it is McNemar's exact test.
    rng = np.random.default_rng(5)
    a, b = rng.random((400, 1)) < 0.6, rng.random((400, 1)) < 0.5
    wins, losses = int((a & ~b).sum()), int((b & ~a).sum())
    found = paired(outcomes(a), outcomes(b))
    assert found.p == pytest.approx(stats.binomtest(wins, wins + losses).pvalue, rel=1e-9)


def test_methods_that_never_differ(outcomes: Make) -> None:
    correct = drawn(np.random.default_rng(4), 50, 2)
    same = paired(outcomes(correct), outcomes(correct))
    # Bonett and Price: one problem for, one against.
    half = stats.t.ppf(0.975, 51) * math.sqrt(2 / 51 / 52)
    assert (same.value, same.p) == (0, 1)
    assert (same.lo, same.hi) == pytest.approx((-half, half), abs=1e-12)
    always = paired(outcomes(np.ones((50, 2))), outcomes(np.zeros((50, 2))))
    assert always.value == 1 and 0.8 < always.lo < always.hi == 1
    assert always.p == pytest.approx(2.0**-49, rel=1e-9)


def test_paired_false_alarms(outcomes: Make) -> None:
    """Two methods of one accuracy: the interval excludes 0, and p < 0.05, in about one comparison of twenty."""
    rng = np.random.default_rng(6)
    n = 400
    excluded = small = 0
    for _ in range(n):
        chance = rng.beta(1, 1, size=(40, 1))
        found = paired(*(outcomes(rng.random((40, 3)) < chance) for _ in range(2)))
        excluded += not found.lo <= 0 <= found.hi
        small += found.p < 0.05
    assert excluded < 0.08 * n and small < 0.08 * n
    assert excluded > 0.02 * n and small > 0.02 * n


def test_paired_over_training_runs(outcomes: Make) -> None:
    """A recipe that is better in every run by the same margin is surer than one that is better on average."""
    rng = np.random.default_rng(7)
    chance = rng.beta(1, 1, size=(200, 1))

    def runs(shifts: list[float]) -> list[Outcomes]:
        return [outcomes(rng.random((200, 4)) < np.clip(chance + shift, 0, 1)) for shift in shifts]

    base = runs([0, 0, 0])
    steady, fickle = paired(runs([0.1, 0.1, 0.1]), base), paired(runs([-0.1, 0.1, 0.3]), base)
    assert steady.p < 0.01 < 0.1 < fickle.p
    assert fickle.hi - fickle.lo > 2 * (steady.hi - steady.lo)
    assert fickle.p_problems < 1e-6  # these very checkpoints do differ
    assert steady.n_training_seeds == 3


def test_families(outcomes: Make) -> None:
    rng = np.random.default_rng(8)
    a, b = drawn(rng, 21, 2), drawn(rng, 21, 2)
    by_family = accuracy_by_family(outcomes(a))
    assert list(by_family) == ["even", "odd"]
    assert by_family["odd"].value == pytest.approx(a[1::2].mean()) and by_family["even"].n_problems == 11
    over_runs = accuracy_by_family([outcomes(a), outcomes(b)])
    assert over_runs["odd"].n_training_seeds == 2


def test_order_of_rows_does_not_matter(outcomes: Make) -> None:
    rng = np.random.default_rng(9)
    a, b = outcomes(drawn(rng, 20, 3)), outcomes(drawn(rng, 20, 3))
    assert paired(a.select(rng.permutation(60)), b.select(rng.permutation(60))) == paired(a, b)


def test_refuses_to_pair_what_differs(outcomes: Make) -> None:
    a = outcomes(np.ones((6, 2)))
    with pytest.raises(ValueError, match=r"problems: 2 only in a \(p4, p5\)"):
        paired(a, outcomes(np.ones((4, 2))))
    with pytest.raises(ValueError, match=r"seeds: 1 only in b \(2\)"):
        paired(a, outcomes(np.ones((6, 3))))
    with pytest.raises(ValueError, match=r"seeds: 2 only in a run 0 \(0, 1\).*2 only in b run 1 \(5, 6\)"):
        paired([a, a], [a, outcomes(np.ones((6, 2)), seed=[5, 6] * 6)])
    with pytest.raises(ValueError, match="'p0'.*'even' in a.*'else' in b"):
        paired(a, outcomes(np.ones((6, 2)), family=["else"] * 12))
    with pytest.raises(ValueError, match="2 training runs.*1 of b"):
        paired([a, a], [a])
    with pytest.raises(ValueError, match=r"b lacks 1 of 12.*'p3', seed 1"):
        paired(a, a.select(np.arange(12) != 7))
    with pytest.raises(ValueError, match="run 0 and run 1.*problems"):
        accuracy([a, outcomes(np.ones((5, 2)))])
    with pytest.raises(ValueError, match="no outcomes"):
        accuracy([])
    with pytest.raises(ValueError, match="level=95"):
        accuracy(a, level=95)


def test_unfinished_are_counted(outcomes: Make) -> None:
    run = outcomes([[1, 0], [1, 1]], finished=[True, False, False, True])
    assert accuracy([run, run]).n_unfinished == 4


def test_mean_over_runs_is_the_interval_of_paired_differences(outcomes: Make) -> None:
    rng = np.random.default_rng(5)
    a, b = ([drawn(rng, 50, 4) for _ in range(3)] for _ in range(2))
    d = paired([outcomes(x) for x in a], [outcomes(x) for x in b])
    found = mean_over_runs(np.stack(a).mean(axis=2) - np.stack(b).mean(axis=2))
    for name in ("value", "lo", "hi", "p", "std_error", "df"):
        assert getattr(found, name) == pytest.approx(getattr(d, name)), name


def test_ratio_of_one_run_is_the_clustered_ratio() -> None:
    rng = np.random.default_rng(6)
    counts = rng.integers(1, 90, 70)
    sums = counts * 0.3 + rng.normal(0, np.sqrt(counts))
    found = mean_over_runs(ratio_observations(sums[None], counts[None]))
    means = clustered_means(sums, np.zeros(70, int), np.arange(70), 1, weights_N=counts)
    assert found.value == pytest.approx(sums.sum() / counts.sum()) == pytest.approx(means.value_G[0])
    assert (found.lo, found.hi) == pytest.approx((means.lo_G[0], means.hi_G[0]))
    with pytest.raises(ReqatError, match="run 1 counts nothing"):
        ratio_observations(np.ones((2, 3)), np.array([[1, 1, 1], [0, 0, 0]]))


def test_training_seeds_are_the_unit_above_problems() -> None:
    """Trainings that differ by 3 points: the interval covers 0 as often as it says, that of the problems alone does
    not; a difference of the size called detectable is found in four of five experiments."""
    rng = np.random.default_rng(7)
    trials, R, P = 700, 5, 200

    def experiments(true: float) -> np.ndarray:
        problem = rng.normal(0, 0.2, (trials, 1, P))
        return true + rng.normal(0, 0.03, (trials, R, 1)) + problem + rng.normal(0, 0.1, (trials, R, P))

    null = [mean_over_runs(values) for values in experiments(0.0)]
    missed = np.mean([not m.lo <= 0 <= m.hi for m in null])
    alone = np.mean([mean_over_runs(m.mean(axis=0)[None]).p < 0.05 for m in experiments(0.0)])
    assert missed < 0.065 < 0.09 < alone
    assert missed == np.mean([m.p < 0.05 for m in null])
    size = detectable(float(np.median([m.std_error for m in null])), float(np.median([m.df for m in null])))
    found = np.mean([mean_over_runs(values).p < 0.05 for values in experiments(size)])
    assert 0.75 < found < 0.87


def test_detectable_is_that_of_a_z_test_with_many_problems() -> None:
    assert detectable(1.0, math.inf) == pytest.approx(1.959964 + 0.841621, abs=1e-5)
    assert detectable(1.0, 1e7) == pytest.approx(1.959964 + 0.841621, abs=1e-4)
    assert detectable(2.0, 9, alpha=0.01) == pytest.approx(2 * detectable(1.0, 9, alpha=0.01))
    assert detectable(1.0, 4, alpha=0.5, power=0.3) == 0  # what it finds anyway


@pytest.mark.parametrize("df", [2, 3.5, 4])
@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_a_detectable_difference_is_found_as_often_as_it_says_with_few_seeds(df: float, alpha: float) -> None:
    """A t test over df + 1 seeds, drawn: with Student's quantiles in place of the noncentral t it finds too few."""
    rng = np.random.default_rng(5)
    n = 200_000
    noise, spread = rng.normal(size=n), np.sqrt(rng.chisquare(df, n) / df)
    critical = stats.t.ppf(1 - alpha / 2, df)

    def found(true: float) -> float:
        return float((np.abs((noise + true) / spread) > critical).mean())

    assert found(detectable(1.0, df, alpha=alpha)) == pytest.approx(0.8, abs=0.005)
    assert found(critical + stats.t.ppf(0.8, df)) < found(detectable(1.0, df, alpha=alpha)) - 0.004


def test_holm() -> None:
    # Worked by hand: 4 * 0.005, 3 * 0.01, 2 * 0.03, then 0.04 held up to the value before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.7, 0.8]) == [1.0, 1.0]
    # Of a family of six, two comparisons were not made: they found nothing.
    assert holm([0.01, 0.04, 0.03, 0.005], comparisons=6) == holm([0.01, 0.04, 0.03, 0.005, 1.0, 1.0])[:4]
    with pytest.raises(ValueError, match="family of 1"):
        holm([0.1, 0.2], comparisons=1)
    for bad in (math.nan, -0.1, 1.2):
        with pytest.raises(ValueError, match="no p-value"):
            holm([0.5, bad])


@given(st.lists(st.floats(0, 1), max_size=12), st.floats(0.001, 0.2))
def test_holm_is_the_step_down_procedure(p_values: list[float], alpha: float) -> None:
    rejected: set[int] = set()
    for i in sorted(range(len(p_values)), key=lambda i: p_values[i]):
        if p_values[i] * (len(p_values) - len(rejected)) > alpha:
            break
        rejected.add(i)
    assert {i for i, q in enumerate(holm(p_values)) if q <= alpha} == rejected
