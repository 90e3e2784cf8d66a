"""Attention-score distillation: MSE of what the softmax is taken of, summed over layers.

TernaryBERT (arXiv 2009.12812) counts masked scores as 0 in both models, so that they enter the mean
(``masked="zero"``); layer-to-layer distillation of decoders, the baseline L2L of TSLD (arXiv 2308.06744), takes the
lower triangle alone, here all scores that no mask hides (``masked="out"``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from reqat.config.errors import unknown

if TYPE_CHECKING:
    from reqat.training.objective import TermContext

_MASKED = ("out", "zero")


@dataclass(frozen=True)
class AttentionScoreMSE:
    """Mean squared difference to the teacher's attention scores as a term of the objective. Raises ``ReqatError`` for
    an unknown ``masked``."""

    weight: float = 1.0
    masked: str = "out"
    name: str = "attention_score_mse"
    needs: ClassVar[frozenset[str]] = frozenset({"attention_scores", "teacher.attention_scores"})

    def __post_init__(self) -> None:
        if self.masked not in _MASKED:
            raise unknown("treatment of masked scores", self.masked, _MASKED)

    def __call__(self, ctx: TermContext) -> Tensor:
        """The mean over batch, heads, queries and keys, times the N response positions, by which the objective divides.
        Raises ``ReqatError`` where the models' layers, heads or lengths differ."""
        total = ctx.logits.new_zeros((), dtype=torch.float32)
        for student_BHTS, teacher_BHTS in ctx.pairs("attention_scores"):
            hidden = teacher_BHTS == -torch.inf
            # Filled before the difference: infinity less infinity would be NaN, in the gradient too.
            student, teacher = (x.float().masked_fill(hidden, 0.0) for x in (student_BHTS, teacher_BHTS))
            count = hidden.numel() - (int(hidden.sum()) if self.masked == "out" else 0)
            total = total + (student - teacher).square().sum() / max(1, count)
        return total * len(ctx.labels)


TERM = AttentionScoreMSE
