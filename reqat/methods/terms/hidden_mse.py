"""Hidden-state distillation (TinyBERT, arXiv 1909.10351; KD for QAT of encoders): MSE between all hidden states.

The states are the embeddings and the output of every layer, the last one after the final norm. The error is a mean over
channels, summed over states and response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from reqat.training.objective import TermContext


@dataclass(frozen=True)
class HiddenMSE:
    """Mean squared difference to the teacher's hidden states as a term of the objective."""

    weight: float = 1.0
    name: str = "hidden_mse"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden_states", "teacher.hidden_states"})

    def __call__(self, ctx: TermContext) -> Tensor:
        """Raises ``ReqatError`` where the models' layers or widths differ."""
        assert ctx.responses is not None
        total = ctx.logits.new_zeros((), dtype=torch.float32)
        for student_BTD, teacher_BTD in ctx.pairs("hidden_states"):
            error_ND = student_BTD[ctx.responses].float() - teacher_BTD[ctx.responses].float()
            total = total + error_ND.square().mean(-1).sum()
        return total


TERM = HiddenMSE
