"""Hooks by which the generation loop informs logits processors that keep state for each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class BatchStart:
    """Arguments of `begin_batch` of a stateful logits processor.

    ``input_ids`` [B, P] are the padded prompts, ``attention`` [B, P] is False on padding, ``rows`` are the indices of
    the batch's rows in the caller's prompts, and ``capacity`` is the most tokens that a row can come to hold.
    ``streams`` are the states of the rows' random streams (:func:`reqat.generation.sampling.row_state`): whoever draws
    numbers for a row derives its own stream from them. A row whose last token is one of ``eos_ids`` has finished.
    """

    input_ids: Tensor
    attention: Tensor
    rows: tuple[int, ...]
    capacity: int
    streams: tuple[int, ...] = ()
    eos_ids: tuple[int, ...] = ()


class StatefulProcessor(Protocol):
    """Optional hooks of a logits processor that keeps state a row (a second model's cache, a noise stream)."""

    def begin_batch(self, start: BatchStart) -> None:
        """Reset the state for a new batch."""

    def select_rows(self, index: Tensor) -> None:
        """Only the rows ``index`` of the batch go on, in that order."""

    def take_tokens(self, tokens_B: Tensor) -> None:
        """The rows took ``tokens_B``; a finished row is fed its end again, which is no token of its response."""
