"""Evaluation: grading, token entropies, and statistics clustered by problem.

Names load on first use: reading outcomes and computing intervals needs neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reqat.evaluation.grading import evaluate
    from reqat.evaluation.outcomes import Outcomes
    from reqat.evaluation.statistics import (
        Difference,
        Estimate,
        accuracy,
        accuracy_by_family,
        holm,
        paired,
    )

_HOME = {
    "Difference": "statistics",
    "Estimate": "statistics",
    "Outcomes": "outcomes",
    "accuracy": "statistics",
    "accuracy_by_family": "statistics",
    "evaluate": "grading",
    "holm": "statistics",
    "paired": "statistics",
}

__all__ = [
    "Difference",
    "Estimate",
    "Outcomes",
    "accuracy",
    "accuracy_by_family",
    "evaluate",
    "holm",
    "paired",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
