"""Choosing tokens so that a row's choice depends on nothing but the row: its logits, its seed, its key and its step.

A generator shared by a batch would hand out numbers in the batch's order, so that a row's response changed with the
rows around it, and a comparison "on the same seeds" would mean nothing. Here the uniform number of a row at a step is a
pure function of (seed, row key, step): the row's BLAKE2b hash is the state of a SplitMix64 stream, a counter-based
generator whose step-th output is one mixing of ``state + (step + 1) * GAMMA`` (Steele, Lea and Flood, OOPSLA 2014). The
token is then read off the inverse of the row's cumulative distribution, sorted by probability. Two models that are
compared on the same seeds so share their random numbers, which makes a paired comparison sharper.

Shapes: B rows, V vocabulary, K candidates (the K most likely tokens of a large vocabulary). All maths in float32.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reqat.config.errors import ReqatError

# SplitMix64: the golden ratio in 64 bits, and Stafford's 13th variant of the finalizer of MurmurHash3.
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

# Above this vocabulary the K most likely tokens are looked at first: a full sort of [1000, 49152] takes seconds.
_SORT_ALL_UP_TO = 512
_CANDIDATES = 64
# Far above the error of a float32 sum over any vocabulary, far below any top_p of interest.
_MARGIN = 1e-3


def row_state(seed: int, row_key: str) -> int:
    """The 64-bit state of a row's random stream: the first 8 bytes of BLAKE2b of seed and key."""
    return int.from_bytes(hashlib.blake2b(f"{seed}|{row_key}".encode(), digest_size=8).digest(), "little")


def random_bits(states_B: NDArray[np.uint64], first_step: int, steps: int) -> NDArray[np.uint64]:
    """64 random bits a step and row, [steps, B]: outputs ``first_step`` and on of each SplitMix64 stream."""
    step_N1 = np.arange(first_step + 1, first_step + steps + 1, dtype=np.uint64)[:, None]
    z = states_B + step_N1 * _GAMMA  # wraps modulo 2^64, as it should
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


def uniforms(states_B: NDArray[np.uint64], first_step: int, steps: int) -> Tensor:
    """Uniform float32 numbers in [0, 1), [steps, B]; 24 bits each, so every value is exact and below 1."""
    bits = random_bits(states_B, first_step, steps) >> np.uint64(40)
    return torch.from_numpy(bits.astype(np.float32) * np.float32(2.0**-24))


def greedy_tokens(logits_BV: Tensor) -> Tensor:
    """The most likely token of each row, int64 [B].

    Raises ``ReqatError`` where a row holds NaN, +inf or nothing but -inf.
    """
    best_B, tokens_B = logits_BV.max(dim=-1)
    _check_finite(best_B)
    return tokens_B


def sample_tokens(logits_BV: Tensor, uniforms_B: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token a row by inverse CDF, int64 [B]; temperature first, then top-p.

    The support is that of transformers' ``TopPLogitsWarper``: tokens in order of ascending probability are dropped
    while their cumulative probability is at most ``1 - top_p``; the last is always kept. Ties are in order of ascending
    id, so that the support is a function of the row (transformers leaves them to an unstable sort). What is kept is
    renormalized. A uniform near 1 gives the likeliest token.

    Raises ``ReqatError`` where a row holds NaN, +inf or nothing but -inf.
    """
    scores_BV = logits_BV.float()
    if temperature != 1.0:
        scores_BV = scores_BV / temperature
    best_B1, tokens_B1 = scores_BV.max(dim=-1, keepdim=True)
    _check_finite(best_B1[:, 0])
    if top_p >= 1.0:  # nothing to drop, so nothing to sort
        return _invert(scores_BV.softmax(dim=-1).cumsum(dim=-1), None, uniforms_B)
    # Most steps of a reasoning trace are all but decided. Where one token alone holds top_p (by a margin that float32
    # sums cannot close) it is the whole support, and only the other rows are worth a sort.
    tokens_B = tokens_B1[:, 0]
    decided_B = 1 / (scores_BV - best_B1).exp_().sum(dim=-1) > top_p + _MARGIN
    open_rows = (~decided_B).nonzero()[:, 0]
    if len(open_rows) == 0:
        return tokens_B
    if len(open_rows) < len(tokens_B):
        scores_BV, uniforms_B = scores_BV[open_rows], uniforms_B[open_rows]
    sample = _sample_sorted if scores_BV.shape[-1] <= _SORT_ALL_UP_TO else _sample_candidates
    tokens_B[open_rows] = sample(scores_BV, uniforms_B, top_p)
    return tokens_B


def _sample_sorted(scores_BV: Tensor, uniforms_B: Tensor, top_p: float) -> Tensor:
    """Sample with a full sort, ascending: the arithmetic of transformers' warper, token by token."""
    sorted_BV, ids_BV = torch.sort(scores_BV, dim=-1, stable=True)
    cumulative_BV = sorted_BV.softmax(dim=-1).cumsum(dim=-1)
    dropped_BV = cumulative_BV <= 1 - top_p
    dropped_BV[:, -1] = False
    return ids_BV.gather(1, _invert(cumulative_BV, dropped_BV, uniforms_B)[:, None])[:, 0]


def _sample_candidates(scores_BV: Tensor, uniforms_B: Tensor, top_p: float) -> Tensor:
    """Sample from the K most likely tokens, and by a full sort in the rows whose support may reach beyond them.

    Which way a row goes depends on that row alone. The least likely candidate stands for the tail: only where it is
    dropped, and is not tied with a token that is kept, is the support certainly inside the candidates.
    """
    values_BK, ids_BK = scores_BV.topk(_CANDIDATES, dim=-1, sorted=False)
    # Ascending scores with ties by ascending id, as in the full sort; topk itself promises no order of ties.
    ids_BK, order_BK = ids_BK.sort(dim=-1)
    values_BK, rank_BK = values_BK.gather(1, order_BK).sort(dim=-1, stable=True)
    ids_BK = ids_BK.gather(1, rank_BK)
    probability_BK = (values_BK - scores_BV.logsumexp(dim=-1, keepdim=True)).exp()
    tail_B1 = (1 - probability_BK.sum(dim=-1, keepdim=True)).clamp_(min=0)
    cumulative_BK = tail_B1 + probability_BK.cumsum(dim=-1)
    dropped_BK = cumulative_BK <= 1 - top_p
    dropped_BK[:, -1] = False
    least_kept_B = values_BK.masked_fill(dropped_BK, torch.inf).amin(dim=-1)
    tokens_B = ids_BK.gather(1, _invert(cumulative_BK, dropped_BK, uniforms_B)[:, None])[:, 0]
    beyond_B = least_kept_B <= values_BK[:, 0]
    if bool(beyond_B.any()):
        tokens_B[beyond_B] = _sample_sorted(scores_BV[beyond_B], uniforms_B[beyond_B], top_p)
    return tokens_B


def _invert(cumulative_BN: Tensor, dropped_BN: Tensor | None, uniforms_B: Tensor) -> Tensor:
    """The first position whose cumulative probability exceeds ``below + u * (total - below)``, int64 [B].

    ``below`` is the cumulative probability of what was dropped (a prefix of the row).
    """
    total_B = cumulative_BN[:, -1]
    if dropped_BN is None:
        target_B = uniforms_B * total_B
    else:
        below_B = cumulative_BN.masked_fill(~dropped_BN, 0.0).amax(dim=-1)
        target_B = below_B + uniforms_B * (total_B - below_B)
    # Rounding may lift the target to the total, which no position exceeds. One float lower, the position found has a
    # probability above zero.
    target_B = torch.minimum(target_B, torch.nextafter(total_B, torch.zeros_like(total_B)))
    return torch.searchsorted(cumulative_BN.contiguous(), target_B[:, None], right=True)[:, 0]


def _check_finite(best_B: Tensor) -> None:
    finite_B = torch.isfinite(best_B)
    if not bool(finite_B.all()):
        bad = int((~finite_B).nonzero()[0, 0])
        raise ReqatError(
            f"the logits of {int((~finite_B).sum())} of {len(best_B)} rows hold {float(best_B[bad])} (first: row {bad} "
            "of the batch); look for NaN weights, a diverged run, or a logits processor that forbids every token"
        )
