"""Decoding implementations under benchmark, and the check that each has to pass before it is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from reqat_kernels.bench.measure import Wrong

#: By how many standard deviations of a step's logits the tokens that were chosen may stand below the reference's best,
#: on average. Sums in another order move an activation across a rounding threshold here and there, which moves single
#: tokens by as much as one; those of a broken kernel all stand several below. A guard against nonsense: kernels have
#: their own tests, and packed models the table of agreement.
MARGIN = 0.5
CHECKED_TOKENS, CHECKED_PROMPT_TOKENS = 16, 512
"""Tokens that a decoder generates for its check, after at most so many of a prompt."""


@dataclass
class Steps:
    """One generation on the clock: nanoseconds at which each new token was there, and time spent waiting for a core."""

    tokens: Tensor
    """[B, T], new tokens only."""
    stamps_ns: list[int]
    waits_ns: list[int]
    cache: Any = None

    def durations_us(self, tokens: int) -> list[float]:
        """Of each step after the first token, up to ``tokens``."""
        stamps = self.stamps_ns[:tokens]
        return [(b - a) / 1e3 for a, b in zip(stamps, stamps[1:], strict=False)]

    def waits(self, tokens: int) -> list[float]:
        """Share of each of these steps that the thread waited."""
        waits = self.waits_ns[:tokens]
        took = self.durations_us(tokens)
        return [(b - a) / 1e3 / max(t, 1e-3) for a, b, t in zip(waits, waits[1:], took, strict=False)]


@dataclass
class Decoder:
    """A decoding implementation. ``generate(ids_BP, tokens)`` gives :class:`Steps`; bytes are as allocated."""

    name: str
    format: str
    generate: Callable[[Tensor, int], Steps]
    weight_bytes: int
    cache_bytes: Callable[[Any], int | None]
    batches: tuple[int, ...] | None = None
    """Batches that it can decode; None: any."""
    ours: bool = False
    foreign: bool = False
    """Whether it computes in a foreign library that could end the process."""

    @property
    def label(self) -> str:
        """For people: ``llama.cpp Q4_0 W4A8``."""
        return f"{self.name} {self.format}"

    samples: dict[int, list[Steps]] = field(default_factory=dict)


@torch.no_grad()
def agrees(reference: Any, ids: Tensor, tokens: Tensor, what: str) -> None:
    """Raise Wrong unless the reference finds the tokens [B, T] as good as its own, within MARGIN on average.

    The reference reads prompt and response in one forward pass and so says, for each step, what it would have chosen
    after the same tokens: a tie that falls the other way does not count against the steps after it.
    """
    logits = reference(input_ids=torch.cat([ids, tokens], 1)).logits[:, ids.shape[1] - 1 : -1].float()
    short = logits.amax(-1) - logits.gather(-1, tokens[..., None])[..., 0]
    mean = float((short / logits.std(-1)).mean())
    if not mean <= MARGIN:
        raise Wrong(f"{what} chose tokens {mean:.2f} standard deviations of the logits below the best, on average")
