"""AutoTVM's simulated annealing: many chains walk through the space after a model's scores.

A chain steps to a neighbour (one knob drawn anew) always if its score is higher, else with the probability
``exp(difference / temperature)``; the temperature falls linearly from 1 to 0 over the steps. All points that a chain
has looked at compete for the places of the best that were not measured yet; 30 steps without a change among those end
the walk. Chains go on where they were when the next model comes.

A model's scores of a listed space are one array, so a step of all chains is a few operations on arrays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reqat.methods.search._space import Floats, Points, Space


@dataclass(frozen=True)
class Annealing:
    """AutoTVM's settings by default."""

    chains: int = 128
    steps: int = 500
    patience: int = 30
    start: float = 1.0
    end: float = 0.0


def begin(space: Space, settings: Annealing, random: np.random.Generator) -> Points:
    """Where the chains begin: different points, as far as there are enough."""
    return random.permutation(len(space))[: settings.chains].astype(np.int64)


def anneal(
    space: Space,
    scores: Floats,
    measured: NDArray[np.bool_],
    count: int,
    chains: Points,
    settings: Annealing,
    random: np.random.Generator,
) -> tuple[Points, Points]:
    """The best ``count`` points by ``scores`` [points] that the chains met and that are not ``measured`` [points], the
    best first (fewer where they met fewer), and where the chains ended."""
    at, met = chains.copy(), np.zeros(len(space), dtype=bool)
    met[at] = True
    least = _least(scores[met & ~measured], count)
    temperature, cooling = settings.start, (settings.start - settings.end) / (settings.steps + 1)
    changed = 0
    for step in range(settings.steps):
        if step >= changed + settings.patience:
            break
        new = space.step(at, random)
        gain = scores[new] - scores[at]
        taken = random.random(len(at)) < np.exp(np.minimum(gain / temperature, 0))
        at = np.where(taken, new, at)
        fresh = new[~met[new] & ~measured[new]]
        met[new] = True
        if len(fresh) and scores[fresh].max() > least:
            changed, least = step, _least(scores[met & ~measured], count)
        temperature -= cooling
    found = np.flatnonzero(met & ~measured)
    return found[np.argsort(-scores[found], kind="stable")][:count], at


def _least(scores: Floats, count: int) -> float:
    """What a point has to exceed to be among the best ``count``."""
    return -np.inf if len(scores) < count else float(np.partition(scores, -count)[-count])
