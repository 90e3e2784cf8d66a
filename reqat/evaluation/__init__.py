"""Evaluation: the one generation path, grading, and statistics that know what a cluster is (floor 3).

Names load on first use: reading outcomes and computing intervals needs neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reqat.evaluation.decoding import Decoding
    from reqat.evaluation.generation import BatchStart, Generation, StatefulProcessor, generate
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
    "BatchStart": "generation",
    "Decoding": "decoding",
    "Difference": "statistics",
    "Estimate": "statistics",
    "Generation": "generation",
    "Outcomes": "outcomes",
    "StatefulProcessor": "generation",
    "accuracy": "statistics",
    "accuracy_by_family": "statistics",
    "evaluate": "grading",
    "generate": "generation",
    "holm": "statistics",
    "paired": "statistics",
}

__all__ = [
    "BatchStart",
    "Decoding",
    "Difference",
    "Estimate",
    "Generation",
    "Outcomes",
    "StatefulProcessor",
    "accuracy",
    "accuracy_by_family",
    "evaluate",
    "generate",
    "holm",
    "paired",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
