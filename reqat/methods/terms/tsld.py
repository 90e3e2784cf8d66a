"""TSLD, token-scaled logit distillation (NeurIPS 2023, arXiv 2308.06744), for QAT of decoders with ternary weights.

Where the teacher itself is unsure of the label, its distribution says most. Each token's distillation loss is scaled by
the teacher's own loss there, relative to the other tokens of its sequence::

    CE_t    = -log p_T(label_t)
    scale_t = softmax over the sequence of (CE_t / 10), a constant for the gradient
    TSLD    = sum over sequences of  sum_t scale_t * (-sum_v p_T(v) log p_S(v))

The published objective adds the mean likelihood of the label (the term ``nll``), and *sums* TSLD over a batch of 4
sequences. A term here is a sum that is divided by the response tokens of the whole batch, and a sequence of n of them
counts n times: the result is the mean over sequences, weighted by their tokens, whatever the size of the batch. Where
all sequences have one length, as the paper's blocks of 512 tokens have, that is the plain mean, and ``weight=4`` is the
published sum; where lengths differ, no weight gives the published sum.

A sequence is the response of one trace.
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
class TSLD:
    """Soft cross-entropy to the teacher, scaled by token. Raises ``ReqatError`` unless the temperature is positive."""

    weight: float = 1.0
    temperature: float = 10.0
    name: str = "tsld"
    needs: ClassVar[frozenset[str]] = frozenset({"logits", "teacher.logits"})

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ReqatError(f"TSLD temperature must be positive, got {self.temperature} (10 is the paper's)")

    def __call__(self, ctx: TermContext) -> Tensor:
        """Sum over sequences of ``n * sum_t scale_t * CE(p_T, p_S)_t`` in nats, n the tokens of the sequence."""
        assert ctx.teacher_logits is not None and ctx.traces is not None
        with torch.no_grad():
            teacher_NV = torch.log_softmax(ctx.teacher_logits.float(), dim=-1)
            scaled_N = F.nll_loss(teacher_NV, ctx.labels, reduction="none") / self.temperature
            weights_N = _softmax_within(scaled_N, ctx.traces)
            count_N = torch.bincount(ctx.traces)[ctx.traces]
        cross_entropy_N = -(teacher_NV.exp() * ctx.log_probs()).sum(-1)
        return (count_N * weights_N * cross_entropy_N).sum()


def _softmax_within(x_N: Tensor, group_N: Tensor) -> Tensor:
    """Softmax of ``x`` among the elements of the same group (int64 from 0)."""
    groups = int(group_N.max()) + 1 if len(group_N) else 0
    top_G = x_N.new_full((groups,), -torch.inf).scatter_reduce(0, group_N, x_N, "amax")
    e_N = (x_N - top_G[group_N]).exp()
    return e_N / e_N.new_zeros(groups).index_add(0, group_N, e_N)[group_N]


TERM = TSLD
