"""Exhausted spaces: every point was measured once, so that a search can be replayed and its optimum is known.

A replayed search reads its speeds from the table. It is deterministic, takes no time but its own, and can be repeated
over many seeds; what it cannot show is the noise of measuring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from reqat.config.errors import ReqatError
from reqat.methods.search._run import History
from reqat.methods.search._space import Floats, Space

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Table:
    """``speeds`` [points] of a space, 0 for points that fail; ``unit`` is theirs.

    Raises ReqatError where a speed is missing, negative or not finite, or all of them are 0.
    """

    space: Space
    speeds: Floats
    unit: str

    def __post_init__(self) -> None:
        wrong = np.flatnonzero(~(np.isfinite(self.speeds) & (self.speeds >= 0)))
        if len(wrong):
            point = int(wrong[0])
            raise ReqatError(f"{self.space.values(point)} has speed {self.speeds[point]}; failures have speed 0")
        if len(self.speeds) != len(self.space) or not self.speeds.max() > 0:
            raise ReqatError(
                f"{len(self.speeds)} speeds of {len(self.space)} points, or none above 0; measure them all"
            )

    @classmethod
    def of(cls, frame: pd.DataFrame, knobs: list[str], speed: str, unit: str) -> Table:
        """The table of a frame with a row a point: columns of knobs, and the column ``speed``.

        Raises ReqatError for a column that is missing, and unless every combination of values is there once.
        """
        for name in (*knobs, speed):
            if name not in frame.columns:
                raise ReqatError(f"no column {name!r}; the table has {', '.join(map(str, frame.columns))}")
        space = Space({name: tuple(sorted(frame[name].unique().tolist())) for name in knobs})
        columns = [np.searchsorted(values, frame[name]) for name, values in space.knobs.items()]
        at = space.numbers(np.stack(columns, axis=1).astype(np.int64))
        seen = np.bincount(at, minlength=len(space))
        if (seen != 1).any():
            point = int((seen != 1).argmax())
            raise ReqatError(f"{space.values(point)} is there {seen[point]} times; every combination is needed once")
        speeds = np.empty(len(space))
        speeds[at] = frame[speed].to_numpy(float)
        return cls(space, speeds, unit)

    def measure(self, point: int) -> float:
        """The speed of a point."""
        return float(self.speeds[point])

    @property
    def best(self) -> float:
        """The speed of the fastest point."""
        return float(self.speeds.max())

    def progress(self, history: History) -> Floats:
        """The best speed after each measurement, as a share of the optimum."""
        return np.maximum.accumulate(history.speeds) / self.best

    def measurements_to(self, share: float, history: History) -> float:
        """Measurements until ``share`` of the optimum was reached; NaN if it was not."""
        reached = np.flatnonzero(self.progress(history) >= share)
        return float(reached[0] + 1) if len(reached) else float("nan")

    def rank_correlations(self, history: History) -> list[tuple[int, float]]:
        """Of each model: how many points it was fitted on, and Spearman's correlation of its scores with the speeds of
        all points that were not measured yet (NaN where one of them does not vary)."""
        from scipy.stats import spearmanr

        out = []
        for fitted, scores in history.models:
            rest = np.ones(len(self.space), dtype=bool)
            rest[history.points[:fitted]] = False
            a, b = scores[rest], self.speeds[rest]
            varies = len(a) > 1 and np.ptp(a) > 0 and np.ptp(b) > 0
            out.append((fitted, float(spearmanr(a, b).statistic) if varies else float("nan")))
        return out
