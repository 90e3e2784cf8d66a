"""AutoTVM with its own diversity filter (``diversity_filter_ratio`` of its tuner): cover values of knobs.

Of a pool larger than the plan, whose order by score counts no more, the candidate is taken that has the most values of
knobs that no candidate taken before it has, and so on. Once all values have been seen the rest is taken in the pool's
order. What was measured in earlier plans has no part in it. AutoTVM has no default for the ratio; the pool is as large
as that of :mod:`reqat.methods.search.distinctive`, so that the two differ by their choice alone.
"""

from __future__ import annotations

import numpy as np

from reqat.methods.search._method import Candidates, Method
from reqat.methods.search._space import Points


def choose(candidates: Candidates, count: int) -> Points:
    """Greedily, those that add the most unseen (knob, value) pairs; among equals the best one by the model."""
    space = candidates.space
    first = np.concatenate([[0], np.cumsum(space.sizes)])[:-1]  # all values of all knobs in one row
    pairs = space.positions[candidates.points] + first
    unseen, left = np.ones(sum(space.sizes), dtype=bool), np.ones(len(pairs), dtype=bool)
    taken: list[int] = []
    for _ in range(min(count, len(pairs))):
        best = int(np.argmax(np.where(left, unseen[pairs].sum(axis=1), -1)))  # the first of equals
        unseen[pairs[best]] = left[best] = False
        taken.append(best)
    return candidates.points[taken]


METHOD = Method(choose, pool=4)
