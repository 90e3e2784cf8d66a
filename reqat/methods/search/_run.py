"""The loop that all methods share: plan, measure, learn.

As AutoTVM's tuner has it. A plan of points is measured; then the model is fitted on everything measured so far, the
annealing looks for the points of highest score that are not measured, and the method chooses the next plan among them.
The first plan is random and depends on the seed alone, so that methods can be compared seed by seed. The last
twentieth of every plan, rounded down, is random (AutoTVM's epsilon), as is what the annealing did not find. A point
that fails has speed 0, and the model learns from it; without a single success there is nothing to learn, and the next
plan is random.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from reqat.config.errors import ReqatError
from reqat.methods.search._annealing import Annealing, anneal, begin
from reqat.methods.search._method import Candidates, Method
from reqat.methods.search._space import Floats, Points, Space, listed
from reqat.methods.search._trees import RankingTrees

RANDOM_SHARE = 0.05


@dataclass(frozen=True)
class Budget:
    """``measurements`` in all, in plans of ``plan``."""

    measurements: int
    plan: int = 64
    annealing: Annealing = field(default_factory=Annealing)


@dataclass(frozen=True)
class History:
    """A search: ``points`` in the order in which they were measured and their ``speeds``; ``models``: how many points
    each model was fitted on, and its scores of all points of the space."""

    points: Points
    speeds: Floats
    models: tuple[tuple[int, Floats], ...]


def search(method: Method, space: Space, measure: Callable[[int], float], budget: Budget, seed: int) -> History:
    """Look for the fastest point. ``measure(point)``: its speed, 0 for one that fails.

    Raises ReqatError for a budget that the space does not hold, and for a speed that is negative or not finite.
    """
    if not 1 <= budget.plan <= budget.measurements <= len(space):
        raise ReqatError(
            f"{budget.measurements} measurements in plans of {budget.plan} do not fit a space of {len(space)} points; "
            "a plan holds at least one, and no more than all measurements"
        )
    # Streams of their own, so that nothing that a method draws changes another's first plan.
    first, random = (np.random.default_rng([seed, stream]) for stream in range(2))
    measured = np.zeros(len(space), dtype=bool)
    points: list[int] = []
    speeds: list[float] = []
    models: list[tuple[int, Floats]] = []
    chains = begin(space, budget.annealing, random)
    plan = first.permutation(len(space))[: budget.plan]
    while len(points) < budget.measurements:
        for point in plan[: budget.measurements - len(points)].tolist():
            speed = float(measure(point))
            if not (np.isfinite(speed) and speed >= 0):
                raise ReqatError(f"point {point} ({space.values(point)}) has speed {speed}; failures have speed 0")
            points.append(point)
            speeds.append(speed)
        measured[points] = True
        left = min(budget.plan, budget.measurements - len(points))
        if left <= 0:
            break
        chosen = listed([])
        if method.choose is not None and max(speeds) > 0:
            model = RankingTrees(space.features[points], np.asarray(speeds), budget.plan)
            scores = model.scores(space.features)
            models.append((len(points), scores))
            wanted = budget.plan * method.pool
            pool, chains = anneal(space, scores, measured, wanted, chains, budget.annealing, random)
            by_model = min(left, budget.plan - int(RANDOM_SHARE * budget.plan))
            chosen = method.choose(Candidates(space, pool, scores[pool], listed(points)), by_model)
        free = ~measured
        free[chosen] = False
        others = random.permutation(np.flatnonzero(free))[: left - len(chosen)]
        plan = np.concatenate([chosen, others])
    return History(listed(points), np.asarray(speeds), tuple(models))
