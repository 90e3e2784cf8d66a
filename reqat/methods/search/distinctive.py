"""Learning from distinctive candidates (arXiv 2202.06819): measure those that differ most from what is known.

AutoTVM's model is refitted on what it believed to be fast, and such points resemble each other: a plan teaches it
little. Here the plan is the most *distinctive* part of a larger pool of good candidates: one after the other, the
candidate is taken whose nearest neighbour among all points measured or taken is farthest away, by the number of knobs
that differ; among equals the best one by the model.

The paper's text was not at hand. That the choice is made by diversity among the candidates of a learned model follows
from its abstract; the pool of four plans, the distance and the greedy order are inferred.
"""

from __future__ import annotations

import numpy as np

from reqat.methods.search._method import Candidates, Method
from reqat.methods.search._space import Points, hamming


def choose(candidates: Candidates, count: int) -> Points:
    """Greedy farthest points by Hamming distance over knobs; ties go to the higher score."""
    positions = candidates.space.positions[candidates.points]
    known = candidates.space.positions[candidates.measured]
    far = np.full(len(positions), candidates.space.positions.shape[1] + 1)
    if len(known):
        far = hamming(positions, known).min(axis=1)
    taken: list[int] = []
    for _ in range(min(count, len(positions))):
        best = int(np.argmax(far))  # the first of equals: candidates come best first
        taken.append(best)
        far = np.minimum(far, hamming(positions, positions[best : best + 1])[:, 0])
        far[taken] = -1
    return candidates.points[taken]


METHOD = Method(choose, pool=4)
