"""What tells one method of search from another: which candidates of a model's are measured next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from reqat.methods.search._space import Floats, Points, Space


@dataclass(frozen=True)
class Candidates:
    """What a method chooses from: ``points``, the best of a model's that are not measured, best first, with their
    ``scores``; ``measured`` are those measured so far."""

    space: Space
    points: Points
    scores: Floats
    measured: Points


@dataclass(frozen=True)
class Method:
    """A method of search.

    ``choose(candidates, count)``: the points to measure next, in order; None: no model, points at random.
    ``pool``: how many candidates it wants, for each that it chooses.
    """

    choose: Callable[[Candidates, int], Points] | None
    pool: int = 1
