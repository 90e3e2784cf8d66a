"""Packing traces into rows of one length, and rows into batches.

Several traces share a row; each attends only to itself (``segment_ids``) and counts its positions from zero, so a
packed trace computes what it would alone. The loss is completion-only: labels are -100 on prompts and padding (ReQAT
section 3.2).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reqat.config.errors import ReqatError
from reqat.data.traces import Trace

IGNORE = -100
# Rows that stay open for a later, shorter trace; more gives denser rows and a less local order.
_OPEN_ROWS = 32


@dataclass(frozen=True)
class Batch:
    """``[B, T]`` int64 tensors. ``segment_ids`` is 0 on padding and 1, 2, … on the traces of a row; ``labels[b, t]``
    is the token to predict *at* position t (already shifted: the token at t + 1), or -100.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    apart: bool = False
    """Whether attention is to be computed trace by trace (``segments``), not under the mask of whole rows."""

    @property
    def n_tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.segment_ids > 0).sum())

    @property
    def n_response_tokens(self) -> int:
        """Tokens that the loss counts."""
        return int((self.labels != IGNORE).sum())

    def traces(self, keep: Tensor) -> Tensor:
        """[N] int64: which trace each of the N positions where ``keep`` [B, T] holds belongs to, numbered from 0."""
        # Traces of a row are numbered from 1 (0 is padding); rows of a batch have traces of their own.
        row = torch.arange(len(keep), device=keep.device)[:, None] * (int(self.segment_ids.max()) + 1)
        return torch.unique((row + self.segment_ids)[keep], return_inverse=True)[1]

    def attention_mask(self) -> Tensor:
        """Bool ``[B, 1, T, T]``: causal within a segment. Padding attends to itself alone, so no row of the softmax
        is empty.
        """
        t = self.segment_ids.shape[1]
        same = self.segment_ids[:, :, None] == self.segment_ids[:, None, :]
        causal = torch.ones(t, t, dtype=torch.bool).tril()
        mask = same & causal
        pad = self.segment_ids == 0
        mask[pad] = torch.eye(t, dtype=torch.bool).expand(len(pad), t, t)[pad]
        return mask[:, None]

    def segments(self) -> tuple[tuple[tuple[int, bool], ...], ...]:
        """Row by row, what it is made of in its order: the length of each trace, or run of padding, and whether it is a
        trace. :meth:`attention_mask` is causal within each trace, and lets padding see itself alone.
        """
        found = []
        for row in self.segment_ids:
            ids, lengths = torch.unique_consecutive(row, return_counts=True)
            found.append(tuple(zip(lengths.tolist(), (ids > 0).tolist(), strict=True)))
        return tuple(found)


@dataclass(frozen=True)
class PackedRows:
    """Rows as lists of traces, in a fixed order; ``row_tokens`` is the length they are padded to.

    ``bos_id`` opens the traces that have a ``<bos>``; None where none of them has.
    """

    rows: tuple[tuple[Trace, ...], ...]
    row_tokens: int
    bos_id: int | None
    pad_id: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def n_tokens(self) -> int:
        """Tokens without padding."""
        return sum(t.n_tokens for row in self.rows for t in row)

    @property
    def digest(self) -> str:
        """sha256 (hex) of all that the batches are made of."""
        hasher = hashlib.sha256(f"{self.row_tokens} {self.bos_id} {self.pad_id}".encode())
        for row in self.rows:
            for trace in row:
                hasher.update(f" {len(trace.prompt_ids)} {len(trace.response_ids)} ".encode())
                hasher.update(array("q", trace.prompt_ids).tobytes() + array("q", trace.response_ids).tobytes())
            hasher.update(b"\n")
        return hasher.hexdigest()

    def batch(self, indices: Sequence[int]) -> Batch:
        """The rows at ``indices`` as one batch."""
        shape = (len(indices), self.row_tokens)
        ids = torch.full(shape, self.pad_id)
        labels = torch.full(shape, IGNORE)
        positions = torch.zeros(shape, dtype=torch.int64)
        segments = torch.zeros(shape, dtype=torch.int64)
        for b, index in enumerate(indices):
            at = 0
            for s, trace in enumerate(self.rows[index], start=1):
                opening = (self.bos_id,) if trace.bos else ()
                tokens = torch.tensor((*opening, *trace.prompt_ids, *trace.response_ids))
                n, prompt = len(tokens), len(opening) + len(trace.prompt_ids)
                ids[b, at : at + n] = tokens
                positions[b, at : at + n] = torch.arange(n)
                segments[b, at : at + n] = s
                labels[b, at + prompt - 1 : at + n - 1] = tokens[prompt:]
                at += n
        return Batch(ids, labels, positions, segments)


def pack(traces: Sequence[Trace], row_tokens: int, *, bos_id: int | None, pad_id: int) -> PackedRows:
    """First-fit packing in the traces' order over a window of open rows; every trace lands whole in exactly one row.

    Raises ``ReqatError`` for no traces, or naming a trace that is longer than a row, has no prompt (nothing predicts
    its first token), or begins with ``<bos>`` where ``bos_id`` is None.
    """
    if not traces:
        raise ReqatError("no traces to pack; the selection is empty")
    done: list[list[Trace]] = []
    open_rows: list[tuple[int, list[Trace]]] = []
    for trace in traces:
        n = trace.n_tokens
        if trace.bos and bos_id is None:
            raise ReqatError(
                f"trace {trace.id} begins with <bos>, and the tokenizer has none: the traces were written for another "
                "tokenizer or by an older version; make them again"
            )
        if n == len(trace.response_ids):
            raise ReqatError(f"trace {trace.id} has an empty prompt, so nothing predicts its first token; leave it out")
        if n > row_tokens:
            raise ReqatError(
                f"trace {trace.id} has {n} tokens, more than a row of {row_tokens}; raise row_tokens or leave it out"
            )
        for i, (left, row) in enumerate(open_rows):
            if n <= left:
                row.append(trace)
                open_rows[i] = (left - n, row)
                break
        else:
            row = [trace]
            done.append(row)
            open_rows.append((row_tokens - n, row))
            if len(open_rows) > _OPEN_ROWS:
                open_rows.remove(min(open_rows, key=lambda entry: entry[0]))
    return PackedRows(tuple(tuple(r) for r in done), row_tokens, bos_id, pad_id)


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
