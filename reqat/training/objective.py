"""The training objective: a sum of named terms over one forward pass of student and, if a term asks, teacher.

Every published loss here is a sum over response tokens of something computed from the student's logits, hidden states
or attention maps (and, for distillation, the teacher's): negative log-likelihood, SEM's selective entropy, QAD's KL. A
:class:`Term` says what it looks at (``needs``) and returns that *sum*; the loop runs the forward passes so that it is
there, and divides all terms by one token count, that of the whole accumulated batch, so gradient accumulation changes
nothing but memory (ReQAT section 3.3: both terms are divided by the same count).

Logits of a large vocabulary do not fit in memory. An objective whose terms all say how (:class:`Fusable`) can also be
computed from the hidden states before the head, chunk by chunk: :meth:`Objective.from_hidden`. Same value and
gradients up to float32 rounding; terms that need the logits themselves (distillation) rule it out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from reqat.config.errors import ReqatError, unknown
from reqat_kernels.sem_loss import fused_sem_loss

#: What a forward pass gives layer by layer.
LAYERWISE = ("hidden_states", "attentions", "attention_scores", "attention_outputs")
OUTPUTS = ("logits", *LAYERWISE)
#: What a term may need: an output of the student, or of the teacher (``teacher.logits``).
NEEDS = frozenset(OUTPUTS) | {f"teacher.{output}" for output in OUTPUTS}


@dataclass
class TermContext:
    """What a term may look at: one micro-batch. Of the optional parts, those that some term needs are there.

    Shapes: ``logits`` and ``teacher_logits`` are ``[N, V]`` in the dtype of the forward pass, at the N response
    positions; ``labels`` is ``[N]`` int64; position ``n`` of ``logits`` predicts ``labels[n]``. ``traces`` ``[N]``
    int64: which trace each position belongs to, numbered from 0. ``hidden_states``: the embeddings, then the output of
    each layer, the last one after the final norm, L + 1 of ``[B, T, D]``. ``attentions``: each layer's attention
    probabilities, L of ``[B, H, T, S]`` float32, 0 where masked; ``attention_scores``: what they are the softmax of,
    minus infinity where masked. ``attention_outputs``: the output of each self-attention block after residual and norm,
    L of ``[B, T, D]``. ``responses`` ``[B, T]`` bool: ``hidden[responses]`` are the N positions; ``tokens`` ``[B, T]``
    bool: not padding. For an encoder a response position is one that has a label.
    """

    logits: Tensor
    labels: Tensor
    teacher_logits: Tensor | None = None
    traces: Tensor | None = None
    responses: Tensor | None = None
    tokens: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    attention_scores: tuple[Tensor, ...] | None = None
    attention_outputs: tuple[Tensor, ...] | None = None
    teacher_hidden_states: tuple[Tensor, ...] | None = None
    teacher_attentions: tuple[Tensor, ...] | None = None
    teacher_attention_scores: tuple[Tensor, ...] | None = None
    teacher_attention_outputs: tuple[Tensor, ...] | None = None
    _log_probs: Tensor | None = field(default=None, repr=False)

    def log_probs(self) -> Tensor:
        """Float32 log-softmax of ``logits`` ``[N, V]`` in nats, computed once and shared by all terms."""
        if self._log_probs is None:
            self._log_probs = torch.log_softmax(self.logits.float(), dim=-1)
        return self._log_probs

    def positions(self, over: str) -> Tensor:
        """[B, T] bool: the ``responses``, the ``tokens`` (all but padding), or ``all``. Raises ReqatError for what is
        none of these."""
        assert self.responses is not None and self.tokens is not None
        found = {"responses": self.responses, "tokens": self.tokens, "all": torch.ones_like(self.responses)}
        if over not in found:
            raise unknown("positions", over, found)
        return found[over]

    def pairs(self, output: str) -> list[tuple[Tensor, Tensor]]:
        """(student's, teacher's) of one of :data:`LAYERWISE`, layer by layer. Raises ReqatError where they do
        not match in number or shape."""
        student, teacher = getattr(self, output), getattr(self, f"teacher_{output}")
        shapes = [[tuple(t.shape) for t in side or ()] for side in (student, teacher)]
        if not student or shapes[0] != shapes[1]:
            raise ReqatError(
                f"{output} of student and teacher do not match layer by layer ({len(shapes[0])} of shape "
                f"{shapes[0][:1]} against {len(shapes[1])} of {shapes[1][:1]}): take a teacher of the same architecture"
            )
        return list(zip(student, teacher, strict=True))


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
    def needs(self) -> frozenset[str]:
        """What of the context it looks at besides the labels, of :data:`NEEDS`."""

    def __call__(self, ctx: TermContext) -> Tensor:
        """Unweighted sum over response tokens."""


@dataclass(frozen=True)
class FusedPart:
    """A term's place in :func:`reqat_kernels.sem_loss.fused_sem_loss`: which of its sums it is, by which arguments."""

    part: str
    arguments: Mapping[str, Any]


@runtime_checkable
class Fusable(Protocol):
    """A term that the fused loss can compute."""

    def fused(self) -> FusedPart | None:
        """Its place there; None where these settings have none."""


@runtime_checkable
class OverMinibatch(Protocol):
    """A term with constants that come from the entropies of all response tokens that an optimizer step sees."""

    @property
    def needs_minibatch(self) -> bool:
        """Whether it has such constants, with these settings."""

    def within(self, entropies_N: Tensor) -> Term:
        """The term for the micro-batches of a minibatch with these entropies (nats)."""


@dataclass(frozen=True)
class NLL:
    """Negative log-likelihood of the trace, the ``L_SFT`` of every recipe (ReQAT section 3.2)."""

    weight: float = 1.0
    name: str = "nll"
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})

    def __call__(self, ctx: TermContext) -> Tensor:
        """Sum over response tokens of ``-log p(label)`` in nats."""
        return F.nll_loss(ctx.log_probs(), ctx.labels, reduction="sum")

    def fused(self) -> FusedPart:
        """Its place in the fused loss."""
        return FusedPart("nll", {"nll": self.weight})


@dataclass(frozen=True)
class Objective:
    """A weighted sum of terms, evaluated on one micro-batch.

    Raises ``ReqatError`` where two terms share a name, because their metrics could not be told apart, and where one
    needs what is none of :data:`NEEDS`.
    """

    terms: tuple[Term, ...] = (NLL(),)

    def __post_init__(self) -> None:
        names = [t.name for t in self.terms]
        if not names or len(set(names)) != len(names):
            raise ReqatError(f"objective terms must be non-empty with distinct names, got {names}")
        for need in sorted(self.needs - NEEDS):
            raise unknown("output that a term needs", need, NEEDS)

    @property
    def needs(self) -> frozenset[str]:
        """What the terms need together."""
        return frozenset().union(*(t.needs for t in self.terms))

    @property
    def needs_teacher(self) -> bool:
        """Whether any term looks at the teacher."""
        return any(need.startswith("teacher.") for need in self.needs)

    @property
    def needs_minibatch(self) -> bool:
        """Whether some term of a weight wants the entropies of the whole minibatch before the first loss."""
        return any(isinstance(t, OverMinibatch) and t.needs_minibatch and t.weight for t in self.terms)

    @property
    def needs_micro_batch(self) -> bool:
        """Whether some term of a weight takes its constants from the micro-batch at hand."""
        return any(isinstance(t, OverMinibatch) and not t.needs_minibatch and t.weight for t in self.terms)

    def within(self, entropies_N: Tensor) -> Objective:
        """The objective for the micro-batches of a minibatch whose response tokens have these entropies (nats)."""
        return Objective(
            tuple(
                t.within(entropies_N) if isinstance(t, OverMinibatch) and t.needs_minibatch else t for t in self.terms
            )
        )

    @property
    def fusable(self) -> bool:
        """Whether :meth:`from_hidden` can compute it: every term has a place of its own in the fused loss."""
        return self._fused_parts() is not None

    def _fused_parts(self) -> dict[str, FusedPart] | None:
        parts = {t.name: t.fused() if isinstance(t, Fusable) else None for t in self.terms}
        found = {name: part for name, part in parts.items() if part is not None}
        places = {part.part for part in found.values()}
        return found if len(places) == len(parts) else None

    def from_hidden(self, hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor) -> tuple[Tensor, dict[str, float]]:
        """What calling it with the logits ``hidden @ head.T`` gives, without holding more of them than a chunk.

        Call it under the autocast of the forward pass. Raises ``ReqatError`` where it is not :attr:`fusable`, where
        hidden or logits are not finite, and for shapes, dtypes or labels that do not fit.
        """
        parts = self._fused_parts()
        if parts is None:
            raise ReqatError(
                f"objective {[t.name for t in self.terms]} cannot be fused: a term needs logits; call it with a context"
            )
        arguments: dict[str, Any] = {"nll": 0.0, "lam": 0.0}  # of terms that are not there
        for part in parts.values():
            arguments.update(part.arguments)
        total, sums = fused_sem_loss(hidden_ND, head_VD, labels_N, **arguments)
        return total, {name: sums[part.part] for name, part in parts.items()}

    def __call__(self, ctx: TermContext) -> tuple[Tensor, dict[str, float]]:
        """Weighted sum over response tokens (scalar, differentiable) and each term's unweighted sum."""
        for need in sorted(self.needs):
            if getattr(ctx, need.replace(".", "_")) is None:
                raise ReqatError(f"objective {[t.name for t in self.terms]} needs {need}; give the stage a teacher")
        total: Tensor | None = None
        sums: dict[str, float] = {}
        for term in self.terms:
            value = term(ctx)
            sums[term.name] = float(value.detach())
            weighted = value if term.weight == 1.0 else value * term.weight
            total = weighted if total is None else total + weighted
        assert total is not None
        return total, sums
