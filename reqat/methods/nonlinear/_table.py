"""A piecewise-linear table: E entries of slope and intercept, and the E - 1 breakpoints between them.

``y = slopes[k] x + intercepts[k]`` with k the number of breakpoints that are not above x. The outermost entries go on
to infinity. A hardware unit needs comparators, one look-up, one multiplication and one addition for any function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reqat.config.errors import ReqatError

#: A segment that moves values by less than this share of their spread counts as none.
LEAST_EFFECT = 1e-4


@dataclass(frozen=True, eq=False)
class Table:
    """``breakpoints`` [E - 1], strictly increasing, ``slopes`` and ``intercepts`` [E]: float64, finite.

    Raises ReqatError for other lengths, for NaN or infinity, and for breakpoints that fall or coincide (:func:`merged`
    drops the segments of no width between them).
    """

    breakpoints: Tensor
    slopes: Tensor
    intercepts: Tensor

    def __post_init__(self) -> None:
        for name in ("breakpoints", "slopes", "intercepts"):
            object.__setattr__(self, name, getattr(self, name).detach().double())
        E = len(self.slopes)
        if E < 1 or self.slopes.ndim != 1 or self.intercepts.shape != (E,) or self.breakpoints.shape != (E - 1,):
            raise ReqatError(
                f"a table of {E} slopes needs as many intercepts and one breakpoint less, got shapes "
                f"{list(self.intercepts.shape)} and {list(self.breakpoints.shape)}"
            )
        for name in ("breakpoints", "slopes", "intercepts"):
            if not bool(getattr(self, name).isfinite().all()):
                raise ReqatError(f"a table's {name} must be finite numbers, got {getattr(self, name).tolist()}")
        if bool((self.breakpoints.diff() <= 0).any()):
            at = int((self.breakpoints.diff() <= 0).nonzero()[0])
            raise ReqatError(
                f"breakpoints {at} and {at + 1} of a table are {float(self.breakpoints[at])!r} and "
                f"{float(self.breakpoints[at + 1])!r}: they must increase; merged() drops segments of no width"
            )

    @property
    def entries(self) -> int:
        """How many segments it has."""
        return len(self.slopes)

    def segment(self, x: Tensor) -> Tensor:
        """The entry [...] int64 that each ``x`` belongs to."""
        return torch.bucketize(x, self.breakpoints.to(x.dtype), right=True)

    def __call__(self, x: Tensor) -> Tensor:
        """Values in float64; ``reqat.methods.nonlinear.VERSIONS`` compute as hardware would."""
        x = x.double()
        at = self.segment(x)
        return self.slopes[at] * x + self.intercepts[at]

    def effective(self, low: float, high: float) -> int:
        """How many segments count on ``[low, high]``.

        One counts if the values there would move by more than :data:`LEAST_EFFECT` of their spread were its neighbours
        to meet without it: its width times the smaller of the two changes of slope at its ends.
        """
        inside = (self.breakpoints > low) & (self.breakpoints < high)
        ends = torch.cat([torch.tensor([low]).double(), self.breakpoints[inside], torch.tensor([high]).double()])
        first = int((self.breakpoints <= low).sum())
        slopes = self.slopes[first : first + len(ends) - 1]
        values = self(ends)
        change = torch.full((len(slopes) + 1,), torch.inf, dtype=torch.float64)
        change[1:-1] = slopes.diff().abs()
        effect = ends.diff() * torch.minimum(change[:-1], change[1:])
        return int((effect > LEAST_EFFECT * (values.max() - values.min())).sum()) if len(slopes) > 1 else 1


def merged(breakpoints: Tensor, slopes: Tensor, intercepts: Tensor) -> Table:
    """A table of breakpoints [E - 1] in order, some of which may coincide: entries of no width are left out, so it
    computes the same with fewer. Raises ReqatError as :class:`Table`."""
    breakpoints, slopes, intercepts = (x.detach().double() for x in (breakpoints, slopes, intercepts))
    kept = torch.ones(len(slopes), dtype=torch.bool)
    kept[1:-1] = breakpoints.diff() != 0  # entry k lies between breakpoints k - 1 and k
    first = torch.ones(len(breakpoints), dtype=torch.bool)
    first[1:] = breakpoints.diff() != 0
    return Table(breakpoints[first], slopes[kept], intercepts[kept])


def through(x: Tensor, y: Tensor, tails: Sequence[float | None]) -> Table:
    """The continuous table through the points (x, y) [P], x increasing; P - 1 entries, and one for each tail that has a
    slope of its own. Where a tail is None the outermost segment goes on."""
    x, y = x.double(), y.double()
    slopes = y.diff() / x.diff()
    intercepts = y[:-1] - slopes * x[:-1]
    breakpoints = x[1:-1]
    left, right = tails
    if left is not None:
        breakpoints = torch.cat([x[:1], breakpoints])
        slopes = torch.cat([slopes.new_tensor([left]), slopes])
        intercepts = torch.cat([y[:1] - left * x[:1], intercepts])
    if right is not None:
        breakpoints = torch.cat([breakpoints, x[-1:]])
        slopes = torch.cat([slopes, slopes.new_tensor([right])])
        intercepts = torch.cat([intercepts, y[-1:] - right * x[-1:]])
    return Table(breakpoints, slopes, intercepts)


def points(entries: int, tails: Sequence[float | None]) -> int:
    """How many points :func:`through` needs for a table of this many entries."""
    return entries + 1 - sum(tail is not None for tail in tails)
