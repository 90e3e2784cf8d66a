"""Search over schedules: the space, the model against autograd, choices against brute force, replays."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from reqat.config.errors import ReqatError
from reqat.methods.search import METHODS, Annealing, Budget, Candidates, Space, Table, analytic, method_called, search
from reqat.methods.search._annealing import anneal, begin
from reqat.methods.search._trees import RankingTrees, _pairwise, average_recall

SPACE = Space({"a": (1, 2, 4), "b": (0, 1), "c": (8, 16, 32, 64)})
TABLE = analytic()


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# -- the space --------------------------------------------------------------------------------------------------------


def test_points_are_the_combinations_of_values() -> None:
    found = [tuple(SPACE.values(point).values()) for point in range(len(SPACE))]
    assert found == list(itertools.product(*SPACE.knobs.values()))
    assert [SPACE.point(SPACE.values(point)) for point in range(len(SPACE))] == list(range(len(SPACE)))
    assert SPACE.features.tolist() == [list(values) for values in found]


def test_a_step_changes_one_knob_and_can_reach_every_value() -> None:
    start = np.full(2000, 5)
    differs = SPACE.positions[SPACE.step(start, random())] != SPACE.positions[start]
    assert (differs.sum(axis=1) == 1).all()
    reached = {tuple(SPACE.positions[p]) for p in SPACE.step(start, random(1)).tolist()}
    assert len(reached) == sum(size - 1 for size in SPACE.sizes)


@pytest.mark.parametrize("knobs", [{}, {"a": (1,)}, {"a": (1, 1)}, {"a": tuple(range(2000)), "b": tuple(range(2000))}])
def test_spaces_that_cannot_be_searched_are_refused(knobs: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(ReqatError):
        Space(knobs)


@pytest.mark.parametrize("values", [{"a": 1, "b": 0}, {"a": 3, "b": 0, "c": 8}, {"a": 1, "b": 0, "c": 8, "d": 1}])
def test_values_that_no_point_has_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(ReqatError):
        SPACE.point(values)


# -- the model --------------------------------------------------------------------------------------------------------


def test_gradient_and_hessian_are_those_of_the_pairwise_loss() -> None:
    speeds = np.array([3.0, 0.0, 7.0, 7.0, 0.0, 5.0])
    score = random().normal(size=6)
    s = torch.tensor(score, requires_grad=True)

    def loss(s: torch.Tensor) -> torch.Tensor:
        pairs = [(i, j) for i in range(6) for j in range(6) if speeds[i] > speeds[j]]
        return 2 / 5 * sum(torch.nn.functional.softplus(s[j] - s[i]) for i, j in pairs)  # type: ignore[return-value]

    (gradient,) = torch.autograd.grad(loss(s), s)
    hessian = torch.autograd.functional.hessian(loss, s.detach()).diagonal()
    found = _pairwise(score, np.sign(speeds[:, None] - speeds[None, :]))
    np.testing.assert_allclose(found[0], gradient.numpy(), rtol=1e-9)
    np.testing.assert_allclose(found[1], hessian.numpy(), rtol=1e-9)


@pytest.mark.parametrize(("seed", "n", "top"), [(0, 1, 1), (1, 5, 9), (2, 12, 5), (3, 30, 30), (4, 30, 12)])
def test_average_recall_is_what_counting_gives(seed: int, n: int, top: int) -> None:
    score, speeds = random(seed).normal(size=n), random(seed + 1).permutation(n).astype(float)
    shares = []
    for k in range(1, min(top, n) + 1):
        shares.append(len(set(np.argsort(-score)[:k]) & set(np.argsort(-speeds)[:k])) / k)
    assert average_recall(score, speeds, top) == pytest.approx(np.mean(shares))


def test_the_model_orders_what_it_has_not_seen() -> None:
    chosen = random().permutation(len(TABLE.space))
    seen, rest = chosen[:120], chosen[120:]
    model = RankingTrees(TABLE.space.features[seen], TABLE.speeds[seen], 16)
    scores = model.scores(TABLE.space.features)
    assert spearmanr(scores[seen], TABLE.speeds[seen]).statistic > 0.9
    assert spearmanr(scores[rest], TABLE.speeds[rest]).statistic > 0.6
    # Only the order counts.
    again = RankingTrees(TABLE.space.features[seen], TABLE.speeds[seen] ** 3, 16)
    np.testing.assert_array_equal(again.scores(TABLE.space.features), scores)


def test_equal_speeds_teach_nothing() -> None:
    model = RankingTrees(SPACE.features, np.ones(len(SPACE)), 4)
    assert not model.scores(SPACE.features).any()


# -- annealing, and what is chosen ------------------------------------------------------------------------------------


def test_annealing_finds_the_best_that_are_not_measured() -> None:
    scores = random().normal(size=len(SPACE))
    measured = np.zeros(len(SPACE), dtype=bool)
    measured[np.argsort(-scores)[:3]] = True
    settings = Annealing(chains=8, steps=300, patience=300)
    found, chains = anneal(SPACE, scores, measured, 5, begin(SPACE, settings, random()), settings, random())
    assert found.tolist() == np.argsort(-scores)[3:8].tolist()
    assert len(chains) == 8
    # With everything measured there is nothing left to find.
    found, _ = anneal(SPACE, scores, np.ones(len(SPACE), dtype=bool), 5, chains, settings, random())
    assert not len(found)


def test_annealing_stops_without_progress() -> None:
    calls = []

    class Counting(Space):
        def step(self, points, random):  # type: ignore[no-untyped-def]
            calls.append(len(points))
            return super().step(points, random)

    space = Counting(SPACE.knobs)
    settings = Annealing(chains=64, steps=400, patience=7)  # more chains than points: all are met at once
    start = np.arange(len(space))
    anneal(space, np.zeros(len(space)), np.zeros(len(space), dtype=bool), 3, start, settings, random())
    assert len(calls) == 7


def candidates(seed: int, n: int = 12, measured: int = 4) -> Candidates:
    points = random(seed).permutation(len(SPACE))
    scores = np.sort(random(seed).normal(size=n))[::-1]
    return Candidates(SPACE, points[:n], scores, points[n : n + measured])


@pytest.mark.parametrize("seed", range(5))
def test_the_filter_of_autotvm_covers_values(seed: int) -> None:
    given = candidates(seed)
    values = [list(SPACE.values(point).items()) for point in given.points.tolist()]
    left, seen, wanted = list(range(12)), set(), []
    for _ in range(7):
        gains = [len(set(values[i]) - seen) for i in left]
        best = left.pop(gains.index(max(gains)))
        seen |= set(values[best])
        wanted.append(int(given.points[best]))
    assert METHODS["autotvm_filter"].choose(given, 7).tolist() == wanted  # type: ignore[misc]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("measured", [0, 4])
def test_distinctive_candidates_are_the_farthest_ones(seed: int, measured: int) -> None:
    given = candidates(seed, measured=measured)
    known = [tuple(SPACE.positions[p]) for p in given.measured.tolist()]
    left, wanted = given.points.tolist(), []

    def distance(point: int) -> int:
        own = SPACE.positions[point]
        return min((sum(a != b for a, b in zip(own, other, strict=True)) for other in known), default=99)

    for _ in range(7):
        best = max(left, key=distance)  # the first of equals, and candidates come best first
        left.remove(best)
        known.append(tuple(SPACE.positions[best]))
        wanted.append(best)
    assert METHODS["distinctive"].choose(given, 7).tolist() == wanted  # type: ignore[misc]


@pytest.mark.parametrize("name", METHODS)
def test_a_small_pool_is_taken_whole(name: str) -> None:
    if (choose := METHODS[name].choose) is not None:
        given = candidates(0, n=3)
        assert sorted(choose(given, 10).tolist()) == sorted(given.points.tolist())


# -- whole searches ---------------------------------------------------------------------------------------------------

BUDGET = Budget(measurements=70, plan=20, annealing=Annealing(chains=16, steps=40))


@pytest.fixture(scope="module")
def histories():  # type: ignore[no-untyped-def]
    return {name: search(method, TABLE.space, TABLE.measure, BUDGET, 3) for name, method in METHODS.items()}


def test_searches_share_their_first_plan_and_measure_nothing_twice(histories) -> None:  # type: ignore[no-untyped-def]
    for history in histories.values():
        assert len(history.points) == len(set(history.points.tolist())) == 70
        np.testing.assert_array_equal(history.speeds, TABLE.speeds[history.points])
        np.testing.assert_array_equal(history.points[:20], histories["uniform"].points[:20])
    assert {name: [n for n, _ in h.models] for name, h in histories.items()} == {
        name: ([] if name == "uniform" else [20, 40, 60]) for name in METHODS
    }


def test_searches_are_deterministic_and_depend_on_their_seed(histories) -> None:  # type: ignore[no-untyped-def]
    method = METHODS["distinctive"]
    again = search(method, TABLE.space, TABLE.measure, BUDGET, 3)
    np.testing.assert_array_equal(again.points, histories["distinctive"].points)
    other = search(METHODS["uniform"], TABLE.space, TABLE.measure, BUDGET, 4)
    assert other.points.tolist() != histories["uniform"].points.tolist()


def test_a_plan_ends_with_points_at_random(histories) -> None:  # type: ignore[no-untyped-def]
    """A twentieth of 20 is one; the others of AutoTVM's plan are the model's best."""
    history = histories["autotvm"]
    (fitted, scores), plan = history.models[0], history.points[20:40]
    assert (np.diff(scores[plan[:19]]) <= 0).all()
    assert fitted == 20 and scores[plan[19]] < scores[plan[18]]


def test_without_a_success_points_are_random() -> None:
    history = search(METHODS["autotvm"], SPACE, lambda point: 0.0, Budget(24, 6), 0)
    assert sorted(history.points.tolist()) == list(range(24)) and not history.models


def test_failures_are_learned_from() -> None:
    """Half of this space fails; once a model is there, few of its choices do."""
    space = Space({"a": tuple(range(8)), "b": tuple(range(8)), "c": (0, 1)})
    speeds = np.where(space.features[:, 2] == 1, 0.0, 1 + space.features[:, 0])
    history = search(METHODS["autotvm"], space, lambda point: speeds[point], Budget(48, 16), 0)
    assert (history.speeds[:16] == 0).mean() > 0.2 > (history.speeds[16:] == 0).mean()


@pytest.mark.parametrize("budget", [Budget(25, 5), Budget(5, 6), Budget(5, 0)])
def test_budgets_that_do_not_fit_are_refused(budget: Budget) -> None:
    with pytest.raises(ReqatError):
        search(METHODS["uniform"], SPACE, lambda point: 1.0, budget, 0)


@pytest.mark.parametrize("speed", [-1.0, float("nan"), float("inf")])
def test_speeds_that_are_none_are_refused(speed: float) -> None:
    with pytest.raises(ReqatError):
        search(METHODS["uniform"], SPACE, lambda point: speed, Budget(4, 2), 0)


def test_unknown_methods_are_named_with_the_closest() -> None:
    with pytest.raises(ReqatError, match="distinctive"):
        method_called("distinctiv")


# -- tables -----------------------------------------------------------------------------------------------------------


def frame() -> pd.DataFrame:
    rows = [SPACE.values(point) | {"speed": float(point % 7), "status": "ok"} for point in range(len(SPACE))]
    return pd.DataFrame(rows).sample(frac=1, random_state=0)


def test_a_table_is_read_whatever_the_order_of_its_rows() -> None:
    table = Table.of(frame(), list(SPACE.knobs), "speed", "GMAC/s")
    assert table.space == SPACE and table.best == 6
    assert table.speeds.tolist() == [point % 7 for point in range(len(SPACE))]


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f.iloc[1:],
        lambda f: pd.concat([f, f.iloc[:1]]),
        lambda f: f.drop(columns="a"),
        lambda f: f.drop(columns="speed"),
        lambda f: f.assign(speed=-1.0),
        lambda f: f.assign(speed=float("nan")),
        lambda f: f.assign(speed=0.0),
    ],
)
def test_tables_that_are_not_whole_are_refused(change) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ReqatError):
        Table.of(change(frame()), list(SPACE.knobs), "speed", "GMAC/s")


def test_progress_of_a_search(histories) -> None:  # type: ignore[no-untyped-def]
    history = histories["autotvm"]
    progress = TABLE.progress(history)
    assert (np.diff(progress) >= 0).all() and progress[-1] == history.speeds.max() / TABLE.best
    n = int(TABLE.measurements_to(0.5, history))
    assert progress[n - 1] >= 0.5 and (n == 1 or progress[n - 2] < 0.5)
    assert np.isnan(TABLE.measurements_to(1.01, history))
    rest = np.setdiff1d(np.arange(len(TABLE.space)), history.points[:40])
    wanted = spearmanr(history.models[1][1][rest], TABLE.speeds[rest]).statistic
    assert TABLE.rank_correlations(history)[1] == (40, pytest.approx(wanted))
