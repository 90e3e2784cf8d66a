"""Attention-map distillation (KD for QAT of Transformer encoders, EMNLP 2022, arXiv 2211.11014), by KL divergence.

    sum over layers of  mean over heads of  KL(A_T || A_S) = sum over keys A_T (log A_T - log A_S)

over the response tokens as queries (the mean over these), or as the paper has it over all tokens that are not padding:
``over="tokens"`` is the mean over a row's tokens, then over rows. Probabilities are clamped at 1e-8 in the logarithms.
Masked keys have probability 0 in both and add nothing. The student's map is that of its quantized queries and keys,
before dropout and before it is rounded itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from reqat.config.errors import unknown

if TYPE_CHECKING:
    from reqat.training.objective import TermContext

_SMALLEST = 1e-8
_OVER = ("responses", "tokens")


@dataclass(frozen=True)
class AttentionKL:
    """KL to the teacher's attention maps as a term of the objective. Raises ``ReqatError`` for an unknown ``over``."""

    weight: float = 1.0
    over: str = "responses"
    name: str = "attention_kl"
    needs: ClassVar[frozenset[str]] = frozenset({"attentions", "teacher.attentions"})

    def __post_init__(self) -> None:
        if self.over not in _OVER:
            raise unknown("queries", self.over, _OVER)

    def __call__(self, ctx: TermContext) -> Tensor:
        """In nats, times the N response positions. Raises ``ReqatError`` where the models' layers, heads or lengths
        differ."""
        where_BT = ctx.positions(self.over)
        weights = _row_weights(where_BT, len(ctx.labels)) if self.over == "tokens" else None
        total = ctx.logits.new_zeros((), dtype=torch.float32)
        for student_BHTS, teacher_BHTS in ctx.pairs("attentions"):
            student, teacher = (maps.transpose(1, 2)[where_BT].float() for maps in (student_BHTS, teacher_BHTS))
            difference = teacher.clamp(min=_SMALLEST).log() - student.clamp(min=_SMALLEST).log()
            each = (teacher * difference).sum(-1).mean(-1)
            total = total + (each.sum() if weights is None else (each * weights).sum())
        return total


def _row_weights(tokens_BT: Tensor, count: int) -> Tensor:
    """For each token that counts, what makes of a sum the mean over its row, then over rows, times ``count``."""
    length_B1 = tokens_BT.sum(1, keepdim=True).clamp(min=1)
    return (count / len(tokens_BT) / length_B1).expand_as(tokens_BT)[tokens_BT]


TERM = AttentionKL
