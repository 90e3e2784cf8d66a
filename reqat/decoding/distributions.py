"""Statistics of next-token distributions: entropy, tail mass, the most likely tokens, the probability of a token.

All of it is of the logits at temperature 1, in nats and float32. Tail and entropy are summed without the most likely
token, because where a model is sure that token holds all but 1e-6 of the mass, and a plain sum would round the rest
away: with ``r = sum of exp(z - max)`` over the others, ``H = log1p(r) + sum(exp(z - max) * (max - z)) / (1 + r)``.

Shapes: N rows of logits, K most likely tokens, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# A logit so far below the largest has probability 0 in float32; -inf becomes it, so that 0 * -inf is 0.
_LOWEST = -1e4


class Statistics(NamedTuple):
    """Statistics of N distributions: ``best`` and ``total`` (max, and sum of exp(z - max)) give any probability."""

    entropy_N: Tensor
    tail_N: Tensor
    top_NK: Tensor
    top_prob_NK: Tensor
    best_N1: Tensor
    total_N: Tensor

    def prob(self, logits_NV: Tensor, tokens_N: Tensor) -> Tensor:
        """Probability of one token a row, [N]."""
        return (logits_NV.gather(1, tokens_N[:, None]).float() - self.best_N1).exp_()[:, 0] / self.total_N


def token_statistics(logits_NV: Tensor, k: int = 5) -> Statistics:
    """Entropy, tail mass and the ``k`` most likely tokens of each row of logits; all float32.

    Logits of -inf (forbidden tokens) are fine. Rows that are no distribution (NaN, +inf, all -inf) have an entropy of
    NaN.
    """
    z_NV = logits_NV.float()
    top_score_NK, top_NK = z_NV.topk(min(k, z_NV.shape[-1]), dim=-1)
    best_N1 = top_score_NK[:, :1]
    entropy_N, rest_N = _entropy(z_NV, best_N1, top_NK[:, :1])
    total_N = 1 + rest_N
    top_prob_NK = (top_score_NK - best_N1).exp_().div_(total_N[:, None])
    return Statistics(entropy_N, rest_N / total_N, top_NK, top_prob_NK, best_N1, total_N)


def entropy_nats(logits_NV: Tensor) -> Tensor:
    """Shannon entropy of ``softmax(logits)`` over the vocabulary, float32 [N]; -inf is a token of probability 0.

    NaN where a row holds NaN, +inf or nothing but -inf.
    """
    z_NV = logits_NV.float()
    return _entropy(z_NV, *z_NV.max(dim=-1, keepdim=True))[0]


def _entropy(z_NV: Tensor, best_N1: Tensor, where_N1: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy, and the sum of exp(z - max) over all tokens but the most likely one, whose logit and index are given."""
    shifted_NV = (z_NV - best_N1).clamp_(min=_LOWEST)
    mass_NV = shifted_NV.exp().scatter_(-1, where_N1, 0.0)
    rest_N = mass_NV.sum(dim=-1)
    entropy_N = rest_N.log1p() - torch.linalg.vecdot(mass_NV, shifted_NV) / (1 + rest_N)
    # NaN and +inf count as the largest, so the largest logit alone tells whether a row is a distribution.
    return torch.where(torch.isfinite(best_N1[:, 0]), entropy_N, torch.nan), rest_N
