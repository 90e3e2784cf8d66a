"""A table in closed form, for tests and the smallest tier: a tiled matrix product on a machine that does not exist.

Its shape is that of measured tables: larger tiles reuse operands until their sums no longer fit the registers (those
points fail), chunks hide latency until they no longer fit a cache, packing pays only for narrow tiles, and knobs that
interact make the optimum rare. Its numbers mean nothing.
"""

from __future__ import annotations

import numpy as np

from reqat.methods.search._space import Space
from reqat.methods.search._table import Table

_REGISTERS, _CACHE = 32, 2048


def analytic() -> Table:
    """Some 2,000 points; about a tenth fails."""
    space = Space(
        {
            "rows": (1, 2, 4, 6, 8, 12),
            "cols": (1, 2, 3, 4),
            "chunk": (16, 32, 64, 128, 256, 512),
            "unroll": (1, 2, 4, 8),
            "pack": (0, 1),
            "order": (0, 1),
        }
    )
    rows, cols, chunk, unroll, pack, order = space.features.T
    sums = rows * cols
    loads = 1 / rows + 1 / cols + np.where(pack == 1, 0.15, 0.5 / cols)  # a multiply-add waits for these
    chains = np.minimum(1, sums * unroll / 16)  # multiply-adds that do not wait for each other
    footprint = chunk * (rows * (1 + pack) + 16 * cols) / np.where(order == 1, 4, 2)
    cache = 1 / (1 + (footprint / _CACHE) ** 2)
    code = 1 / (1 + (sums * unroll / 96) ** 2)
    spent = 1 / chains + loads + 0.4 / np.sqrt(chunk / 16) + (1 - cache) * np.where(order == 1, 0.6, 1.2) + (1 - code)
    return Table(space, np.where(sums + cols + 1 <= _REGISTERS, 100 / spent, 0.0), "arbitrary units")
