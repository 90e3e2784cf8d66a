"""The training objective: a sum of named terms over one forward pass.

Every published loss here is a sum over response tokens of something computed from the student's logits (and, for
distillation, the teacher's): negative log-likelihood, SEM's selective entropy, QAD's KL. A :class:`Term` returns that
*sum*; the loop divides all terms by one token count, that of the whole accumulated batch, so gradient accumulation
changes nothing but memory (ReQAT section 3.3: both terms are divided by the same count).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class TermContext:
    """What a term may look at: one micro-batch, response positions only.

    Shapes: ``logits`` and ``teacher_logits`` are ``[N, V]`` in the dtype of the forward pass, ``labels`` is ``[N]``
    int64; position ``n`` of ``logits`` predicts ``labels[n]``.
    """

    logits: Tensor
    labels: Tensor
    teacher_logits: Tensor | None = None
    _log_probs: Tensor | None = field(default=None, repr=False)

    def log_probs(self) -> Tensor:
        """Float32 log-softmax of ``logits`` ``[N, V]`` in nats, computed once and shared by all terms."""
        if self._log_probs is None:
            self._log_probs = torch.log_softmax(self.logits.float(), dim=-1)
        return self._log_probs


@runtime_checkable
class Term(Protocol):
    """One summand of the objective. ``__call__`` gives a float32 scalar, the SUM over the ``N`` response tokens."""

    @property
    def name(self) -> str:
        """What metrics call it."""

    @property
    def weight(self) -> float:
        """Factor in the objective."""

    @property
    def needs_teacher(self) -> bool:
        """Whether ``ctx.teacher_logits`` must be there."""

    def __call__(self, ctx: TermContext) -> Tensor:
        """Unweighted sum over response tokens."""


@dataclass(frozen=True)
class NLL:
    """Negative log-likelihood of the trace, the ``L_SFT`` of every recipe (ReQAT section 3.2)."""

    weight: float = 1.0
    name: str = "nll"
    needs_teacher: bool = False

    def __call__(self, ctx: TermContext) -> Tensor:
        """Sum over response tokens of ``-log p(label)`` in nats."""
        return F.nll_loss(ctx.log_probs(), ctx.labels, reduction="sum")


@dataclass(frozen=True)
class Objective:
    """A weighted sum of terms, evaluated on one micro-batch.

    Raises ``ValueError`` where two terms share a name, because their metrics could not be told apart.
    """

    terms: tuple[Term, ...] = (NLL(),)

    def __post_init__(self) -> None:
        names = [t.name for t in self.terms]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"objective terms must be non-empty with distinct names, got {names}")

    @property
    def needs_teacher(self) -> bool:
        """Whether any term looks at the teacher's logits."""
        return any(t.needs_teacher for t in self.terms)

    def __call__(self, ctx: TermContext) -> tuple[Tensor, dict[str, float]]:
        """Weighted sum over response tokens (scalar, differentiable) and each term's unweighted sum."""
        if self.needs_teacher and ctx.teacher_logits is None:
            raise ValueError(f"objective {[t.name for t in self.terms]} needs a teacher; give the stage one")
        total: Tensor | None = None
        sums: dict[str, float] = {}
        for term in self.terms:
            value = term(ctx)
            sums[term.name] = float(value.detach())
            weighted = value if term.weight == 1.0 else value * term.weight
            total = weighted if total is None else total + weighted
        assert total is not None
        return total, sums
