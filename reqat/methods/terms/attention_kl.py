"""Attention-map distillation (KD for QAT of Transformer encoders, EMNLP 2022, arXiv 2211.11014), by KL divergence.

    sum over layers of  mean over heads of  KL(A_T || A_S) = sum over keys A_T (log A_T - log A_S)

summed over the response tokens as queries (the objective divides by their number, as the paper divides by the length);
probabilities are clamped at 1e-8 in the logarithms. Masked keys have probability 0 in both and add nothing. The
student's map is that of its quantized keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from reqat.training.objective import TermContext

_SMALLEST = 1e-8


@dataclass(frozen=True)
class AttentionKL:
    """KL to the teacher's attention maps as a term of the objective."""

    weight: float = 1.0
    name: str = "attention_kl"
    needs: ClassVar[frozenset[str]] = frozenset({"attentions", "teacher.attentions"})

    def __call__(self, ctx: TermContext) -> Tensor:
        """In nats. Raises ``ReqatError`` where the models' layers, heads or lengths differ."""
        assert ctx.responses is not None
        total = ctx.logits.new_zeros((), dtype=torch.float32)
        for student_BHTS, teacher_BHTS in ctx.pairs("attentions"):
            student, teacher = (maps.transpose(1, 2)[ctx.responses].float() for maps in (student_BHTS, teacher_BHTS))
            difference = teacher.clamp(min=_SMALLEST).log() - student.clamp(min=_SMALLEST).log()
            total = total + (teacher * difference).sum(-1).mean(-1).sum()
        return total


TERM = AttentionKL
