"""A space of schedules: every combination of the values of a few knobs, numbered from 0.

The space is small enough to be listed (some thousands of points), so that its features are one array and a model's
predictions another. A point is its number throughout the package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from reqat.config.errors import ReqatError, unknown

Points = NDArray[np.int64]
"""Numbers of points."""
Floats = NDArray[np.float64]
MOST_POINTS = 1_000_000


@dataclass(frozen=True)
class Space:
    """Knobs by name, each with its values, in order.

    Raises ReqatError for a space without a choice, one too large to be listed, and a knob with a value twice.
    """

    knobs: Mapping[str, tuple[float, ...]]

    def __post_init__(self) -> None:
        for name, values in self.knobs.items():
            if len(set(values)) != len(values):
                raise ReqatError(f"knob {name}: {list(values)} contains duplicates; give each value once")
        if not 1 < len(self) <= MOST_POINTS:
            raise ReqatError(f"a space of {len(self)} points cannot be searched; give 2 to {MOST_POINTS}")

    def __len__(self) -> int:
        """Number of points."""
        return int(np.prod(self.sizes, dtype=object)) if self.knobs else 0

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """How many values each knob has."""
        return tuple(len(values) for values in self.knobs.values())

    @cached_property
    def positions(self) -> NDArray[np.int64]:
        """[points, knobs]: which of its values each knob has."""
        return np.stack(np.unravel_index(np.arange(len(self)), self.sizes), axis=1).astype(np.int64)

    @cached_property
    def features(self) -> Floats:
        """[points, knobs]: the values themselves, AutoTVM's features ``knob``."""
        columns = [np.asarray(values, float)[self.positions[:, k]] for k, values in enumerate(self.knobs.values())]
        return np.stack(columns, axis=1)

    def values(self, point: int) -> dict[str, float]:
        """The values of a point, by knob."""
        return {name: values[self.positions[point, k]] for k, (name, values) in enumerate(self.knobs.items())}

    def point(self, values: Mapping[str, float]) -> int:
        """The point that has these values. Raises ReqatError for an unknown or missing knob, or an unknown value."""
        for name in values:
            if name not in self.knobs:
                raise unknown("knob", name, self.knobs)
        at = []
        for name, known in self.knobs.items():
            if values.get(name) not in known:
                raise unknown(f"value of knob {name}", values.get(name), known)
            at.append(known.index(values[name]))
        return int(np.ravel_multi_index(at, self.sizes))

    def step(self, points: Points, random: np.random.Generator) -> Points:
        """A neighbour of each point: one knob drawn anew, until something differs (AutoTVM's random walk)."""
        choices, moved = np.asarray(self.sizes), self.positions[points].copy()
        same = np.arange(len(points))
        while len(same):
            knob = random.integers(len(choices), size=len(same))
            moved[same, knob] = random.integers(choices[knob])
            same = same[(moved[same] == self.positions[points[same]]).all(axis=1)]
        return self.numbers(moved)

    def numbers(self, positions: NDArray[np.int64]) -> Points:
        """Points at these positions [n, knobs]."""
        return np.ravel_multi_index(tuple(positions.T), self.sizes).astype(np.int64)


def hamming(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many knobs differ between positions a [n, knobs] and b [m, knobs]: [n, m]."""
    return (a[:, None, :] != b[None, :, :]).sum(axis=2)


def listed(points: Sequence[int]) -> Points:
    """Points as an array, also where there are none."""
    return np.asarray(points, dtype=np.int64)
