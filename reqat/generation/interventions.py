"""Interventions in decoding: routing between two models by token entropy, and noise on low- or high-entropy logits.

Both ask where quantization does its damage, by doing something to the decisions of low entropy alone, or of high:

* **Routing** between two models. At every step the reference's entropy says which of the two chooses the next token:
  below the threshold ``low``, at or above it ``high``. Both are fed the token that was chosen, so each sees the one
  trace, in its own cache. If a quantized model errs where it should be sure, then a trace whose sure tokens come from
  the reference is as good as the reference's.
* **Noise** on the logits, ``Z + M * (sigma * Z * eta)`` with ``eta ~ N(0, 1)`` an element: relative noise, as rounding
  errors are, on the decisions that ``M`` picks. Either the share of the *batch's* decisions of lowest (highest) entropy
  at each step, as published, or those below (above) a threshold measured beforehand. The first makes a row's tokens
  depend on the rows beside it; the second does not, and is the better experiment where batches differ.

Both are logits processors of the one generation path (:func:`reqat.generation.batches.generate`), so batches,
dropped rows, random numbers and grading are those of any other evaluation. Noise draws from a stream of its own a row,
by counter: the same problem and seed meet the same ``eta`` at a step for every sigma, every model and every mask, so
that comparisons are paired. Trade-off: routing costs two forward passes a token, whoever chooses.

Source: arXiv:2606.15682, section 3 (Figures 2c to 2e and 8).

Shapes: B rows, V vocabulary, N picked rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LogitsProcessor

from reqat.config.errors import ReqatError
from reqat.decoding.distributions import entropy_nats
from reqat.generation.batches import RunningBatch
from reqat.generation.processors import BatchStart
from reqat.generation.reset import collect_rows
from reqat.generation.sampling import random_bits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Who = Literal["reference", "candidate"]
Side = Literal["low", "high"]

# Keeps the stream of noise apart from the stream that tokens are drawn from.
_NOISE_STREAM = np.uint64(0xA0761D6478BD642F)


@dataclass(frozen=True)
class Routing:
    """Who chooses a token of ``low`` entropy (below ``threshold_nats``), and who one of ``high``.

    Raises ``ReqatError`` naming the value at fault.
    """

    low: Who
    high: Who
    threshold_nats: float = 0.6

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("low", "high"):
            if getattr(self, name) not in get_args(Who):
                raise ReqatError(f"routing {name}={getattr(self, name)!r} is none of {', '.join(get_args(Who))}")
        if not (math.isfinite(self.threshold_nats) and self.threshold_nats >= 0):
            raise ReqatError(f"routing threshold_nats={self.threshold_nats} must be an entropy in nats, 0 or more")

    def __str__(self) -> str:
        """For records and captions; the threshold is left out where it decides nothing."""
        if self.low == self.high:
            return f"route(all={self.low})"
        return f"route(low={self.low}, high={self.high}, threshold_nats={self.threshold_nats!r})"


def policies(threshold_nats: float) -> dict[str, Routing]:
    """The four policies by name, in the order in which figures show them."""
    who: dict[str, tuple[Who, Who]] = {
        "all-reference": ("reference", "reference"),
        "low-reference": ("reference", "candidate"),
        "low-candidate": ("candidate", "reference"),
        "all-candidate": ("candidate", "candidate"),
    }
    return {name: Routing(low, high, threshold_nats) for name, (low, high) in who.items()}


class Router(LogitsProcessor):
    """A logits processor that returns the logits of the model that the routing policy chooses. The model of
    ``generate`` is the reference.

    The candidate keeps its own cache in its own precision; it is read from the batch's beginning and fed every token
    after it. Works in :func:`reqat.generation.batches.generate` alone, which says where batches begin.

    Args:
        candidate: any model with the reference's vocabulary; put into evaluation mode.
        routing: who chooses what.
        autocast: as for ``generate``, for the candidate.

    Raises ``ReqatError`` where it is used without those hooks, or where the vocabularies differ in size.
    """

    def __init__(self, candidate: PreTrainedModel, routing: Routing, *, autocast: torch.dtype | None = None) -> None:
        self.candidate, self.routing, self.autocast = candidate.eval(), routing, autocast
        self._batch: RunningBatch | None = None
        self._steps: list[tuple[NDArray[np.int64], Tensor]] = []

    def begin_batch(self, start: BatchStart) -> None:
        """Read the prompts into a new cache."""
        self._rows = np.array(start.rows, dtype=np.int64)
        prompts = [ids[seen].tolist() for ids, seen in zip(start.input_ids, start.attention, strict=True)]
        self._length = start.input_ids.shape[1]
        self._batch = RunningBatch(self.candidate, prompts, start.capacity - self._length, self.autocast)

    def select_rows(self, index: Tensor) -> None:
        """Only the rows ``index`` go on."""
        assert self._batch is not None
        self._batch.select_rows(index.to(self._batch.device))
        self._rows = self._rows[index.cpu().numpy()]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Logits [B, V] of the chosen model, row by row; ``scores`` are the reference's."""
        if self._batch is None:
            raise ReqatError("Router needs begin_batch(): give it to reqat.evaluation.generate, not to transformers")
        if input_ids.shape[1] > self._length:
            self._length += 1
            self._batch.step(input_ids[:, -1].to(self._batch.device))
        other_BV = self._batch.logits.to(scores.device)
        if other_BV.shape != scores.shape:
            raise ReqatError(
                f"the candidate has {other_BV.shape[-1]} tokens and the reference {scores.shape[-1]}: route between "
                "models of one vocabulary"
            )
        low_B = entropy_nats(scores) < self.routing.threshold_nats
        theirs_B = torch.where(low_B, self.routing.low == "candidate", self.routing.high == "candidate")
        self._steps.append((self._rows, torch.stack([low_B, theirs_B], dim=1).cpu()))
        return torch.where(theirs_B[:, None], other_BV, scores)

    def decisions(self, n_tokens: Sequence[int]) -> list[NDArray[np.bool_]]:
        """Of each row of the call to ``generate``: was entropy low, did the candidate choose; bool [n_tokens, 2]."""
        return collect_rows(self._steps, n_tokens)


@dataclass(frozen=True)
class Noise:
    """Noise of relative size ``sigma`` on the decisions of low (``side`` = low) or high entropy.

    Without ``threshold_nats``, on the ``share`` of the batch's decisions with the lowest (highest) entropy at each step
    (rounded to whole rows, half up; of the rows that have not finished); with it, on the decisions below it (for high:
    at or above it), and ``share`` means nothing. Raises ``ReqatError`` naming the value at fault.
    """

    sigma: float
    side: Side
    share: float = 0.25
    threshold_nats: float | None = None

    def __post_init__(self) -> None:
        """Check the values; where there is a threshold, ``share`` has one value, so that equal noises compare equal."""
        if not (math.isfinite(self.sigma) and self.sigma >= 0):
            raise ReqatError(f"noise sigma={self.sigma} must be 0 or a positive finite number")
        if self.side not in get_args(Side):
            raise ReqatError(f"noise side={self.side!r} is none of {', '.join(get_args(Side))}")
        if not 0 < self.share <= 1:
            raise ReqatError(f"noise share={self.share} must lie in (0, 1]")
        if self.threshold_nats is not None:
            object.__setattr__(self, "share", 0.25)
            if not (math.isfinite(self.threshold_nats) and self.threshold_nats >= 0):
                raise ReqatError(f"noise threshold_nats={self.threshold_nats} must be an entropy in nats, 0 or more")

    def __str__(self) -> str:
        """For records and captions."""
        where = f"share={self.share!r}" if self.threshold_nats is None else f"threshold_nats={self.threshold_nats!r}"
        return f"noise(sigma={self.sigma!r}, side={self.side}, {where})"


class LogitNoise(LogitsProcessor):
    """Adds :class:`Noise` to the logits. Works in :func:`reqat.generation.batches.generate` alone.

    Raises ``ReqatError`` where it is used without that function's hooks.
    """

    def __init__(self, noise: Noise) -> None:
        self.noise = noise
        self._states: NDArray[np.uint64] | None = None
        self._steps: list[tuple[NDArray[np.int64], Tensor]] = []

    def begin_batch(self, start: BatchStart) -> None:
        """Streams of the batch's rows."""
        self._rows = np.array(start.rows, dtype=np.int64)
        self._states = np.array(start.streams, dtype=np.uint64) ^ _NOISE_STREAM
        self._prompt_tokens = start.input_ids.shape[1]
        self._eos = torch.tensor(start.eos_ids, dtype=torch.int64)

    def select_rows(self, index: Tensor) -> None:
        """Only the rows ``index`` go on."""
        assert self._states is not None
        keep = index.cpu().numpy()
        self._rows, self._states = self._rows[keep], self._states[keep]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Logits [B, V], those of the picked rows with noise; a logit of -inf stays one."""
        if self._states is None:
            raise ReqatError(
                "LogitNoise needs begin_batch(): give it to reqat.evaluation.generate, not to transformers"
            )
        step = input_ids.shape[1] - self._prompt_tokens
        alive_B = torch.ones(len(scores), dtype=torch.bool)
        if step > 0 and len(self._eos):
            alive_B = ~torch.isin(input_ids[:, -1].cpu(), self._eos)
        picked_B = self._pick(entropy_nats(scores).cpu(), alive_B)
        self._steps.append((self._rows, picked_B))
        picked = picked_B.nonzero()[:, 0]
        if len(picked) == 0 or self.noise.sigma == 0:
            return scores
        eta_NV = normals(self._states[picked.numpy()], step, scores.shape[-1])
        picked = picked.to(scores.device)
        old_NV = scores[picked]
        new_NV = old_NV + self.noise.sigma * old_NV * eta_NV.to(scores.device, scores.dtype)
        return scores.index_copy(0, picked, torch.where(old_NV.isinf(), old_NV, new_NV))

    def _pick(self, entropies_B: Tensor, alive_B: Tensor) -> Tensor:
        low = self.noise.side == "low"
        if self.noise.threshold_nats is not None:
            below_B = entropies_B < self.noise.threshold_nats
            return (below_B if low else ~below_B) & alive_B
        alive = alive_B.nonzero()[:, 0]
        order = entropies_B[alive].argsort(descending=not low, stable=True)
        picked_B = torch.zeros_like(alive_B)
        picked_B[alive[order[: int(self.noise.share * len(alive) + 0.5)]]] = True
        return picked_B

    def decisions(self, n_tokens: Sequence[int]) -> list[NDArray[np.bool_]]:
        """Of each row of the call to ``generate``: which of its tokens met noise; bool [n_tokens]."""
        return collect_rows(self._steps, n_tokens)


def normals(states_N: NDArray[np.uint64], step: int, size: int) -> Tensor:
    """Standard normal numbers of each row at a step, float32 [N, size]: a pure function of (state, step, place).

    Box and Muller: 64 random bits make a radius and an angle of 32 bits each, hence two numbers.
    """
    pairs = -(-size // 2)
    bits_NP = random_bits(states_N, step * pairs, pairs).T
    # Middles of 2^32 equal cells: the radius is finite, at most sqrt(-2 log 2^-33) = 6.8.
    radius_NP = np.sqrt(-2 * np.log(((bits_NP >> np.uint64(32)).astype(np.float64) + 0.5) * 2.0**-32))
    angle_NP = ((bits_NP & np.uint64(0xFFFFFFFF)).astype(np.float64) + 0.5) * (2 * math.pi * 2.0**-32)
    both_NP2 = np.stack([radius_NP * np.cos(angle_NP), radius_NP * np.sin(angle_NP)], axis=-1)
    return torch.from_numpy(both_NP2.reshape(len(states_N), 2 * pairs)[:, :size].astype(np.float32))
