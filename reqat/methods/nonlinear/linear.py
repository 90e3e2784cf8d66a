"""The plain table: points at equal distances over the range, and the function's values at them.

NN-LUT's baseline ("linear mode"; that it interpolates rather than fits each segment is inferred). It spends as many
entries where a function is straight as where it bends.
"""

from __future__ import annotations

from reqat.methods.nonlinear._function import Function, check_entries
from reqat.methods.nonlinear._table import Table, points, through


def fit(function: Function, entries: int) -> Table:
    """A table of ``entries`` entries. Raises ReqatError for too few."""
    check_entries(function, entries, 3)
    x = function.uniform(points(entries, function.tails))
    return through(x, function(x), function.tails)


FIT = fit
