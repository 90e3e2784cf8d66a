"""Decoding implementations under benchmark, each in a process of its own, and the check that it has to pass first.

An :class:`Entry` names an implementation, builds it where it is to run, and says which model it is held against. The
worker process that serves it (:class:`ServedDecoders`) returns the tokens that it chose; another one, which holds the
reference (:class:`Judge`), judges them. So a library that crashes takes nothing with it but its own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reqat_kernels.bench.measure import Wrong
from reqat_kernels.bench.worker import Moved, cpus, settle

#: By how many standard deviations of a step's logits the tokens that were chosen may stand below the reference's best,
#: on average. Sums in another order move an activation across a rounding threshold here and there, which moves single
#: tokens by as much as one; those of a broken kernel all stand several below. A guard against nonsense: kernels have
#: their own tests, and packed models the table of agreement.
MARGIN = 0.5
CHECKED_TOKENS, CHECKED_PROMPT_TOKENS = 16, 512
"""Tokens that a decoder generates for its check, after at most so many of a prompt."""


@dataclass
class Steps:
    """One generation on the clock: nanoseconds at which each new token was there, and time spent waiting for a core.

    ``begun_ns``: when the prompt was handed over; ``cache_bytes``: what the key/value cache takes at the end.
    """

    tokens: Tensor
    """[B, T], new tokens only."""
    stamps_ns: list[int]
    waits_ns: list[int]
    cache: Any = None
    begun_ns: int = 0
    cache_bytes: int | None = None

    def prefill_us(self) -> float:
        """From the prompt to the first token."""
        return (self.stamps_ns[0] - self.begun_ns) / 1e3

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
    """An implementation that is ready. ``generate(ids_BP, tokens)`` gives :class:`Steps`, with as many threads as torch
    is set to; bytes are as allocated."""

    generate: Callable[[Tensor, int], Steps]
    weight_bytes: int
    cache_bytes: Callable[[Any], int | None]
    bits: tuple[float, float, float] | None = None
    """Bits a number, scales included, of the decoder's matrices, the output head and the embeddings."""


@dataclass(frozen=True)
class Entry:
    """A decoding implementation under benchmark. ``make(ids)`` builds it, in the process that serves it; entries of one
    ``library`` share such a process, and what they keep between them. ``ids``: the prompt of the check, on which it may
    be calibrated."""

    name: str
    format: str
    make: Callable[[Tensor], Decoder]
    held_to: Callable[[Any, Tensor], Any] = lambda reference, ids: reference
    """From the reference, a float32 model, and the prompt to the model whose choice of tokens it is held to."""
    library: str = ""
    batches: tuple[int, ...] | None = None
    """Batches that it can decode; None: any."""
    ours: bool = False

    @property
    def label(self) -> str:
        """For people: ``llama.cpp Q4_0 W4A8``."""
        return f"{self.name} {self.format}"


class ServedDecoders:
    """The worker's side of the entries of one library."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._entries, self._made = entries, dict[int, Decoder]()
        self._cpus = cpus()

    def prepare(self, which: int, ids: Tensor) -> int:
        """Build an entry; returns the bytes of its weights. Raises what it raises."""
        self._made[which] = self._entries[which].make(ids)
        return self._made[which].weight_bytes

    def bits(self, which: int) -> tuple[float, float, float] | None:
        """Of an entry that was built, :attr:`Decoder.bits`."""
        return self._made[which].bits

    def generate(self, which: int, ids: Tensor, tokens: int, threads: int) -> Steps:
        """A generation with so many threads. Raises Moved if the process may not use the CPUs that it began with."""
        torch.set_num_threads(threads)
        steps = self._made[which].generate(ids, tokens)
        steps.cache_bytes, steps.cache = self._made[which].cache_bytes(steps.cache), None
        if (now := cpus()) != self._cpus:
            raise Moved(f"its CPUs changed from {sorted(self._cpus)} to {sorted(now)} while it was measured")
        if threads > 1:
            settle()
        return steps


class Judge:
    """Holds the reference model, and what others choose against it."""

    def __init__(self, load: Callable[[], Any], entries: Sequence[Entry]) -> None:
        self._reference: Any = load()
        self._entries = entries

    def vocabulary(self) -> int:
        """How many tokens there are."""
        return int(self._reference.config.vocab_size)

    def judge(self, which: int, ids: Tensor, chosen: Sequence[Tensor]) -> None:
        """Raise Wrong unless the model that an entry is held to agrees with each of these choices."""
        entry = self._entries[which]
        model = entry.held_to(self._reference, ids)
        for tokens in chosen:
            agrees(model, ids, tokens, entry.label)


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
