"""What the training loop trains on: rows, in batches, of token ids or of images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from reqat.data.images import ImageBatch
from reqat.data.packing import Batch

AnyBatch = Batch | ImageBatch
"""A micro-batch. Both kinds say what the loop counts and where labels are; only the forward pass tells them apart."""


class Sequences(Protocol):
    """The token ids that rows are made of, sequence by sequence."""

    def __len__(self) -> int: ...
    def extremes(self) -> tuple[int, int]:
        """The smallest and the largest token id."""

    def tokens(self, number: int) -> Any:
        """Token ids of a sequence, integers [T]."""

    def id(self, number: int) -> str:
        """What to call a sequence in an error."""


class Reader(Protocol):
    """A model, for rows that ask whether it can read them. Methods raise ``ReqatError`` where it cannot."""

    def token_ids(self, ids: Sequence[int], what: str) -> None:
        """Whether it knows these token ids."""

    def sequences(self, sequences: Sequences) -> None:
        """Whether it knows all token ids of these."""

    def images(self, channels: int, classes: int) -> None:
        """Whether it takes images of so many channels, and tells so many classes apart."""


class Rows(Protocol):
    """:class:`~reqat.data.packing.PackedRows` of a decoder's traces, :class:`~reqat.data.labelled.LabelledRows` of an
    encoder's sequences, or :class:`~reqat.data.images.ImageRows`."""

    @property
    def unit(self) -> str:
        """What :attr:`n_tokens` counts, for the progress of a run."""

    @property
    def n_tokens(self) -> int:
        """Tokens without padding (images) of an epoch."""

    @property
    def digest(self) -> str:
        """sha256 (hex) of all that the batches are made of."""

    def check(self, reader: Reader) -> None:
        """Raise ``ReqatError`` for the first thing that a model cannot read."""

    def batches(self, rows_per_batch: int, epochs: int, seed: int) -> Iterator[list[int]]:
        """Row indices batch by batch."""

    def batch(self, indices: Sequence[int]) -> AnyBatch:
        """The rows at ``indices`` as one batch. What is random of it is drawn from torch's generator of the CPU."""
