"""The one training loop, its objective and its checkpoints."""

from __future__ import annotations

from reqat.training.distributed import joined
from reqat.training.forward import response_logits
from reqat.training.loop import (
    Observer,
    RunSettings,
    TrainResult,
    check_traces,
    learning_rate,
    train,
)
from reqat.training.objective import NLL, Objective, Term, TermContext

__all__ = [
    "NLL",
    "Objective",
    "Observer",
    "Term",
    "TermContext",
    "TrainResult",
    "RunSettings",
    "check_traces",
    "joined",
    "learning_rate",
    "response_logits",
    "train",
]
