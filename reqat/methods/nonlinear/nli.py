"""NLI: breakpoints that no other choice on a grid beats, by dynamic programming (arXiv 2602.02988).

A table goes through the function's values at its breakpoints, so a segment's error depends on its two ends alone, and
the best M segments up to point j are the best M - 1 up to some i, then one from i to j (Bellman)::

    best[m][j] = min over i < j of best[m - 1][i] + error(i, j)

in O(M N^2) for N candidate points. The error is the mean relative error over the FP16 numbers of the range, with the
floor |y| >= 2^-14. ``parts`` cuts each segment into equal pieces, so that a unit finds the segment by comparing and the
piece by one multiplication: the released tables are one segment, eight of four (or 32) pieces each, and one segment.

Inferred: both ends of the range are points of every table, and beyond them it goes on with the function's tails.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reqat.config.errors import ReqatError
from reqat.methods.nonlinear._function import RELATIVE_FLOOR, Function, check_entries
from reqat.methods.nonlinear._table import Table, points, through

#: The layout of the released tables: with the values at its ends, 35 numbers.
RELEASED = (1, *[4] * 8, 1)


def fit(
    function: Function,
    entries: int | None = 16,
    *,
    parts: Sequence[int] | None = None,
    candidates: int = 256,
    samples: int = 2048,
) -> Table:
    """The table of least error.

    Args:
        entries: of the table, tails included; None with ``parts``.
        parts: pieces of each segment in order, instead of ``entries`` segments of one piece (:data:`RELEASED`).
        candidates: points among which breakpoints are chosen: FP16 numbers of the range, spread evenly among them.
        samples: FP16 numbers at which the error is measured.

    Raises ReqatError for too few entries, or for fewer candidates than breakpoints.
    """
    if parts is None:
        check_entries(function, entries or 0, 3)
        parts = (1,) * (points(entries or 0, function.tails) - 1)
    x = function.half(candidates)
    if len(x) < len(parts) + 1:
        raise ReqatError(f"{len(parts)} segments need {len(parts) + 1} candidate points, {len(x)} are given: give more")
    at = function.half(samples)
    # The FP16 numbers of a range need not hold its ends.
    x[0], x[-1] = function.low, function.high
    chosen = x[best_breakpoints(function, x, at, parts)]
    segments = zip(chosen[:-1], chosen.diff(), parts, strict=True)
    x = torch.cat([*(start + width * torch.arange(n) / n for start, width, n in segments), chosen[-1:]])
    return through(x, function(x), function.tails)


def best_breakpoints(function: Function, x: Tensor, at: Tensor, parts: Sequence[int]) -> Tensor:
    """Indices [M + 1] into the candidate points ``x`` [N] (increasing) of the segments of least error at ``at`` [G]
    (increasing); the first and the last candidate are the ends."""
    errors = {n: segment_errors(function, x, at, n) for n in set(parts)}
    best = torch.full((len(x),), torch.inf, dtype=torch.float64)
    best[0] = 0.0
    came_from = []
    for n in parts:
        best, index = (best[:, None] + errors[n]).min(0)
        came_from.append(index)
    path = [len(x) - 1]
    for index in reversed(came_from):
        path.append(int(index[path[-1]]))
    return torch.tensor(path[::-1])


def segment_errors(function: Function, x: Tensor, at: Tensor, parts: int = 1) -> Tensor:
    """[N, N] float64: the summed relative error over the numbers of ``at`` in ``[x_i, x_j)`` of the line through the
    values at ``x_i`` and ``x_j`` (of ``parts`` equal pieces); infinite for i >= j."""
    N = len(x)
    errors = torch.full((N, N), torch.inf, dtype=torch.float64)
    y_at = function(at)
    weight = 1.0 / y_at.abs().clamp(min=RELATIVE_FLOOR)
    owner = torch.searchsorted(x, at, right=True) - 1  # the interval between candidates that each number lies in
    firsts = torch.searchsorted(owner, torch.arange(N))
    for i in range(N - 1):
        begin = int(firsts[i])
        x_j, a = x[i + 1 :, None], at[begin:]
        place = (a - x[i]) / (x_j - x[i]) * parts  # [J, G]: in pieces
        piece = place.floor().clamp(0, parts - 1)
        if parts == 1:
            low, high = function(x[i]), function(x_j)
        else:
            knots = function(x[i] + (x_j - x[i]) * torch.arange(parts + 1, dtype=torch.float64) / parts)
            low, high = knots.gather(1, piece.long()), knots.gather(1, piece.long() + 1)
        off = (low + (high - low) * (place - piece) - y_at[begin:]).abs() * weight[begin:]
        inside = owner[begin:] < torch.arange(i + 1, N)[:, None]
        errors[i, i + 1 :] = off.masked_fill(~inside, 0.0).sum(1)
    return errors


FIT = fit
