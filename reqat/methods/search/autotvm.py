"""AutoTVM (arXiv 1805.08166): measure the candidates that the model thinks fastest."""

from __future__ import annotations

from reqat.methods.search._method import Candidates, Method
from reqat.methods.search._space import Points


def choose(candidates: Candidates, count: int) -> Points:
    """The first ``count``."""
    return candidates.points[:count]


METHOD = Method(choose)
