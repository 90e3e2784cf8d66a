"""SEM, selective entropy minimization (ReQAT): sharpen what is nearly certain, leave alone what is not.

A reasoning trace mixes decisions that should be certain (the digit of a sum) with free ones (which phrase opens the
next step). Quantization leaks probability mass out of the first kind, and when sampling a leaked digit is a wrong
answer. SEM adds the entropy of the model's own next-token distribution to the loss, weighted so that only low-entropy
positions feel it::

    L = L_SFT + lambda * (1/T) * sum_t w_t * H_t,      w_t = max(0, 1 - (H_t - H_min) / (tau - H_min + eps))

``H_t`` is the Shannon entropy in nats over the whole vocabulary at response token t, ``H_min`` the minibatch's
smallest, ``tau`` its 75th percentile. The weight falls linearly from 1 at ``H_min`` to 0 at ``tau``; weights and
``tau`` are constants for the gradient. The percentile interpolates linearly between order statistics (Hyndman-Fan
type 7, the default of numpy and torch). The minibatch is all that one optimizer step sees: with gradient accumulation
the loop finds the entropies of every micro-batch first, without gradients, and then the loss of each.

The released code differs from that text: there ``tau`` is the ``floor(0.75 n)``-th smallest entropy, and it and
``H_min`` are those of one micro-batch. ``tau="released"`` does the same.

This file computes it from logits that are there. Where they are too large to hold (25k tokens of a 152k-word
vocabulary) the same loss comes from the hidden states, chunk by chunk (:mod:`reqat_kernels.sem_loss`); the training
loop chooses.

Shapes: N response tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from reqat.config.errors import ReqatError
from reqat.training.objective import FusedPart, TermContext
from reqat_kernels.sem_loss import TAUS, sem_bounds, sem_weights

__all__ = ["SEM", "sem_weights", "token_entropies", "weighted_entropy_sum"]


def _plogp(log_probs_NV: Tensor) -> Tensor:
    """``p log p`` with the limit 0 where p is 0 (an excluded word has log p = -inf, and 0 * inf would be NaN)."""
    return log_probs_NV.exp().mul_(log_probs_NV.clamp(min=torch.finfo(log_probs_NV.dtype).min))


def token_entropies(log_probs_NV: Tensor) -> Tensor:
    """Shannon entropy in nats of each row of log-probabilities ``[N, V]``: ``[N]``, same dtype, without gradient.

    Computed from log-softmax, not from softmax, so a probability that underflows adds 0 and none loses its logarithm.
    """
    with torch.no_grad():
        return _plogp(log_probs_NV).sum(dim=-1).neg_()


class _WeightedEntropySum(torch.autograd.Function):
    """``sum_n w_n H_n`` from log-probabilities, without keeping the probabilities for the backward pass."""

    @staticmethod
    def forward(ctx: Any, log_probs_NV: Tensor, weights_N: Tensor, entropies_N: Tensor) -> Tensor:
        ctx.save_for_backward(log_probs_NV, weights_N)
        return torch.dot(weights_N, entropies_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        # With l = log p, H = -sum_v e^l_v l_v and dH/dl_v = -p_v (1 + l_v); the backward of log-softmax then makes
        # it -p_v (l_v + H).
        log_probs_NV, weights_N = ctx.saved_tensors
        grad_NV = _plogp(log_probs_NV).add_(log_probs_NV.exp())
        return grad_NV.mul_((weights_N * -grads[0]).unsqueeze(-1)), None, None


def weighted_entropy_sum(log_probs_NV: Tensor, weights_N: Tensor, entropies_N: Tensor | None = None) -> Tensor:
    """``sum_n w_n H_n`` in nats, a scalar; its gradient goes to ``log_probs_NV`` [N, V], none to the weights [N].

    ``entropies_N``: what :func:`token_entropies` gave for these rows, if it is at hand.
    """
    if entropies_N is None:
        entropies_N = token_entropies(log_probs_NV)
    result: Tensor = _WeightedEntropySum.apply(log_probs_NV, weights_N.detach(), entropies_N)
    return result


@dataclass(frozen=True)
class SEM:
    """The selective entropy term of the objective.

    ``weight`` is the paper's lambda (0.1; ablation 0.03, 0.1, 0.5), ``percentile`` places tau. Raises ``ReqatError``
    where one is out of range. ``tau``: where tau comes from, ``minibatch`` (the paper's text) or ``released`` (its
    code). ``bounds``: H_min and tau of the whole minibatch in nats, where a context holds a part of it.
    """

    weight: float = 0.1
    percentile: float = 0.75
    binary: bool = False
    eps: float = 1e-12
    name: str = "sem"
    tau: str = "minibatch"
    bounds: tuple[float, float] | None = field(default=None, repr=False)
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})

    def __post_init__(self) -> None:
        if not 0 <= self.percentile <= 1:
            raise ReqatError(f"SEM percentile must lie in [0, 1], got {self.percentile} (0.75 is the paper's)")
        if not self.weight >= 0:
            raise ReqatError(f"SEM weight must be 0 or more, got {self.weight} (0.1 is the paper's)")
        if self.tau not in TAUS:
            raise ReqatError(f"SEM tau is {' or '.join(TAUS)}, got {self.tau!r}")
        if not self.eps > 0:
            raise ReqatError(f"SEM eps must be positive, got {self.eps}: equal entropies would divide zero by zero")

    def __call__(self, ctx: TermContext) -> Tensor:
        """Sum over the response tokens of ``w_t * H_t`` in nats (a scalar; lambda is not applied)."""
        log_probs_NV = ctx.log_probs()
        entropies_N = token_entropies(log_probs_NV)
        weights_N = sem_weights(entropies_N, **self._settings)
        return weighted_entropy_sum(log_probs_NV, weights_N, entropies_N)

    @property
    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("percentile", "binary", "eps", "tau", "bounds")}

    @property
    def needs_minibatch(self) -> bool:
        """Whether it wants the entropies of all that an optimizer step sees."""
        return self.tau == "minibatch"

    def within(self, entropies_N: Tensor) -> SEM:
        """This term for the parts of a minibatch with these entropies in nats, ``[N]``."""
        if entropies_N.numel() == 0:
            return self
        return replace(self, bounds=sem_bounds(entropies_N, percentile=self.percentile, tau=self.tau))

    def fused(self) -> FusedPart | None:
        """Its place in the fused loss. None at weight 0, where that would leave the sum, a metric here, uncomputed."""
        if self.weight == 0:
            return None
        return FusedPart("sem", {"lam": self.weight, **self._settings})


TERM = SEM
