"""QAD, quantization-aware distillation (arXiv 2601.20088): the quantized student imitates its full-precision teacher.

The term is the forward KL divergence from the teacher's next-token distribution to the student's, at temperature 1 and
over the whole vocabulary, summed over response tokens. It takes the place of the likelihood of the trace (an objective
of this term alone), or stands beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from reqat.config.errors import ReqatError

if TYPE_CHECKING:
    from reqat.training.objective import TermContext


@dataclass(frozen=True)
class QAD:
    """Forward KL to the teacher as a term of the objective."""

    weight: float = 1.0
    name: str = "qad"
    needs: ClassVar[frozenset[str]] = frozenset({"logits", "teacher.logits"})

    def __call__(self, ctx: TermContext) -> Tensor:
        """``sum_t KL(p_teacher || p_student)`` in nats. Raises ``ReqatError`` without the teacher's logits."""
        if ctx.teacher_logits is None:
            raise ReqatError("the QAD term needs the teacher's logits: give the stage a teacher")
        with torch.no_grad():
            teacher_NV = torch.log_softmax(ctx.teacher_logits.float(), dim=-1)
        return F.kl_div(ctx.log_probs(), teacher_NV, reduction="sum", log_target=True)


TERM = QAD
