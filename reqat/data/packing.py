"""Packing traces into rows of one length, and rows into batches.

Several traces share a row; each attends only to itself (``segment_ids``) and counts its positions from zero, so a
packed trace computes what it would alone. The loss is completion-only: labels are -100 on prompts and padding (ReQAT
section 3.2).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reqat.config.errors import ReqatError
from reqat.data.traces import Trace, Traces

if TYPE_CHECKING:
    from reqat.data.rows import Reader

IGNORE = -100
# Rows that stay open for a later, shorter trace; more gives denser rows and a less local order.
_OPEN_ROWS = 32
# Mapped token ids are dropped from memory after a sweep over so many.
_SWEEP = 2**24


@dataclass(frozen=True)
class Batch:
    """``[B, T]`` int64 tensors. ``segment_ids`` is 0 on padding and 1, 2, … on the traces of a row; ``labels[b, t]``
    is the token to predict *at* position t (already shifted: the token at t + 1), or -100; for an encoder the class of
    the token at t.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    apart: bool = False
    """Whether attention is to be computed trace by trace, not under the mask of whole rows."""
    token_types: Tensor | None = None
    """Of an encoder's pairs of texts: 0 on the first, 1 on the second."""

    @property
    def n_tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.segment_ids > 0).sum())

    @property
    def n_response_tokens(self) -> int:
        """Tokens that the loss counts."""
        return int((self.labels != IGNORE).sum())

    @property
    def tokens(self) -> Tensor:
        """[B, T] bool: not padding."""
        return self.segment_ids > 0

    def to(self, device: torch.device, *, apart: bool = False) -> Batch:
        """The same on a device, with attention trace by trace or not."""
        moved: dict[str, Any] = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        moved = {name: part.to(device) if isinstance(part, Tensor) else part for name, part in moved.items()}
        return Batch(**{**moved, "apart": apart})

    def traces(self, keep: Tensor) -> Tensor:
        """[N] int64: which trace each of the N positions where ``keep`` [B, T] holds belongs to, numbered from 0."""
        # Traces of a row are numbered from 1 (0 is padding); rows of a batch have traces of their own.
        row = torch.arange(len(keep), device=keep.device)[:, None] * (int(self.segment_ids.max()) + 1)
        return torch.unique((row + self.segment_ids)[keep], return_inverse=True)[1]


@dataclass(frozen=True)
class PackedRows:
    """Rows of traces, in a fixed order; ``row_tokens`` is the length they are padded to.

    Row ``r`` holds the traces ``order[starts[r] : starts[r + 1]]`` of ``traces`` (int64 both, [traces] and [rows + 1]).
    ``bos_id`` opens the traces that have a ``<bos>``; None where none of them has.
    """

    traces: Traces
    order: NDArray[np.int64]
    starts: NDArray[np.int64]
    row_tokens: int
    bos_id: int | None
    pad_id: int
    unit: ClassVar[str] = "tokens"

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def n_tokens(self) -> int:
        """Tokens without padding."""
        return self.traces.n_tokens

    def numbers(self, row: int) -> list[int]:
        """Which of ``traces`` a row holds, in their order there."""
        return self.order[self.starts[row] : self.starts[row + 1]].tolist()

    @property
    def rows(self) -> Iterator[tuple[Trace, ...]]:
        """The traces of each row."""
        return (tuple(self.traces[number] for number in self.numbers(row)) for row in range(len(self)))

    @property
    def digest(self) -> str:
        """sha256 (hex) of all that the batches are made of."""
        hasher = hashlib.sha256(f"{self.row_tokens} {self.bos_id} {self.pad_id}".encode())
        swept = 0
        for row in range(len(self)):
            for number in self.numbers(row):
                tokens, prompt = self.traces.tokens(number), int(self.traces.prompts[number])
                hasher.update(f" {prompt} {len(tokens) - prompt} ".encode())
                hasher.update(tokens.astype(np.int64).data)
                swept += len(tokens)
            hasher.update(b"\n")
            if swept > _SWEEP:
                self.traces.forget()
                swept = 0
        return hasher.hexdigest()

    def check(self, reader: Reader) -> None:
        """Raise ``ReqatError`` for a token id that a model does not know."""
        check_tokens(self, self.traces, reader)

    def batches(self, rows_per_batch: int, epochs: int, seed: int) -> Iterator[list[int]]:
        """Row indices batch by batch, as :func:`batches` gives them."""
        return batches(len(self), rows_per_batch, epochs, seed)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The rows at ``indices`` as one batch."""
        shape = (len(indices), self.row_tokens)
        ids = torch.full(shape, self.pad_id)
        labels = torch.full(shape, IGNORE)
        positions = torch.zeros(shape, dtype=torch.int64)
        segments = torch.zeros(shape, dtype=torch.int64)
        for b, index in enumerate(indices):
            at = 0
            for s, number in enumerate(self.numbers(index), start=1):
                tokens = torch.from_numpy(self.traces.tokens(number).astype(np.int64))
                prompt = int(self.traces.prompts[number])
                if self.traces.bos[number]:
                    tokens = torch.cat([torch.tensor([self.bos_id]), tokens])
                    prompt += 1
                n = len(tokens)
                ids[b, at : at + n] = tokens
                positions[b, at : at + n] = torch.arange(n)
                segments[b, at : at + n] = s
                labels[b, at + prompt - 1 : at + n - 1] = tokens[prompt:]
                at += n
        return Batch(ids, labels, positions, segments)


def check_tokens(rows: Any, sequences: Any, reader: Reader) -> None:
    """Raise ``ReqatError`` for a token id of ``sequences``, of padding or of ``<bos>`` that a model does not know."""
    reader.token_ids([i for i in (rows.pad_id, rows.bos_id) if i is not None], "padding and <bos>")
    reader.sequences(sequences)


def pack(traces: Sequence[Trace], row_tokens: int, *, bos_id: int | None, pad_id: int) -> PackedRows:
    """First-fit packing in the traces' order over a window of open rows; every trace lands whole in exactly one row.

    Raises ``ReqatError`` for no traces, or naming a trace that is longer than a row, has no prompt (nothing predicts
    its first token), or begins with ``<bos>`` where ``bos_id`` is None.
    """
    if not traces:
        raise ReqatError("no traces to pack; the selection is empty")
    given = Traces.of(traces)
    lengths = given.lengths
    nameless = given.bos & (bos_id is None)
    promptless = (given.prompts == 0) & ~given.bos
    wrong = nameless | promptless | (lengths > row_tokens)
    if wrong.any():
        number = int(wrong.argmax())
        id, n = given.id(number), int(lengths[number])
        if nameless[number]:
            raise ReqatError(
                f"trace {id} begins with <bos>, and the tokenizer has none: the traces were written for another "
                "tokenizer or by an older version; make them again"
            )
        if promptless[number]:
            raise ReqatError(f"trace {id} has an empty prompt, so nothing predicts its first token; leave it out")
        raise ReqatError(
            f"trace {id} has {n} tokens, more than a row of {row_tokens}; raise row_tokens or leave it out"
        )
    row_of = np.empty(len(given), dtype=np.int64)
    open_rows: list[tuple[int, int]] = []  # tokens left, row
    rows = 0
    for number, n in enumerate(lengths.tolist()):
        for i, (left, row) in enumerate(open_rows):
            if n <= left:
                row_of[number] = row
                open_rows[i] = (left - n, row)
                break
        else:
            row_of[number] = rows
            open_rows.append((row_tokens - n, rows))
            rows += 1
            if len(open_rows) > _OPEN_ROWS:
                open_rows.remove(min(open_rows, key=lambda entry: entry[0]))
    order = np.argsort(row_of, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(row_of))])
    return PackedRows(given, order, starts, row_tokens, bos_id, pad_id)


def batches(n_rows: int, rows_per_batch: int, epochs: int, seed: int) -> Iterator[list[int]]:
    """Row indices batch by batch: each epoch is a fresh seeded permutation; the last batch of all may be smaller, and
    an epoch's end may share a batch with the next one's start.
    """
    generator = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    for _ in range(epochs):
        queue += torch.randperm(n_rows, generator=generator).tolist()
        while len(queue) >= rows_per_batch:
            yield queue[:rows_per_batch]
            queue = queue[rows_per_batch:]
    if queue:
        yield queue
