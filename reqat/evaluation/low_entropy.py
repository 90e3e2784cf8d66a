"""What counts as a low-entropy token, in one place for every measurement that asks.

ReQAT does not say which threshold its figures have. Two kinds stand beside each other: percentiles of the entropies at
hand (25, as in its noise experiment; 75, tau of SEM), which hold the share of tokens fixed, and 0.6 nats, that of its
routed decoding, which holds the meaning fixed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from reqat.config.errors import ReqatError

LOW_PERCENTILES = (25, 75)
LOW_NATS = 0.6
# As files and figures call the thresholds, percentiles first.
LOW_NAMES = (*(f"percentile {p}" for p in LOW_PERCENTILES), f"{LOW_NATS} nats")


def low_thresholds(entropy_N: NDArray[Any]) -> dict[str, float]:
    """Name of each threshold (`LOW_NAMES`) and its value in nats among the entropies of N tokens.

    A token is low where its entropy is below the value. Raises ``ReqatError`` for no token.
    """
    if not len(entropy_N):
        raise ReqatError("thresholds of no token: give at least one entropy")
    nats = [*np.percentile(entropy_N, LOW_PERCENTILES).tolist(), LOW_NATS]
    return dict(zip(LOW_NAMES, nats, strict=True))
