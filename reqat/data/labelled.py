"""Sequences with labels at some of their tokens, as an encoder is trained on them: batches padded to their longest.

Tagging has a label on the first piece of each word, classification of sequences one on the first token. Both are rows
of the training loop (:class:`reqat.data.packing.Batch`), whose labels here stand *at* their own token.

Sequences of a batch have similar lengths: each epoch is a seeded permutation cut into pools of 16 batches, sorted by
length within a pool, and the batches are shuffled again. For sentences, half of a batch would otherwise be padding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reqat.config.errors import ReqatError
from reqat.data.packing import IGNORE, Batch, check_tokens

if TYPE_CHECKING:
    from reqat.data.rows import Reader

_POOL = 16

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class LabelledRows:
    """One sequence a row. Of each, int64 [T]: token ids, labels (0 to ``classes - 1``, or -100 for none), and token
    types (``types`` None: a model that has none). Raises ReqatError where there is no sequence, or a label outside the
    classes, naming it."""

    ids: tuple[Ids, ...]
    labels: tuple[Ids, ...]
    types: tuple[Ids, ...] | None
    classes: int
    pad_id: int
    bos_id: int | None = None
    """None: a sequence holds all of its tokens itself."""
    unit: ClassVar[str] = "tokens"

    def __post_init__(self) -> None:
        if not self.ids:
            raise ReqatError("no sequences to train on; the selection is empty")
        for number, labels in enumerate(self.labels):
            given = labels[labels != IGNORE]
            wrong = given[(given < 0) | (given >= self.classes)]
            if len(wrong):
                raise ReqatError(
                    f"{self.id(number)} has the label {int(wrong[0])}, the classes are 0 to {self.classes - 1}"
                )
            if not len(given):
                raise ReqatError(f"{self.id(number)} has no label within its {len(labels)} tokens; leave it out")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_tokens(self) -> int:
        """Tokens without padding."""
        return sum(map(len, self.ids))

    @property
    def n_labels(self) -> int:
        """Tokens with a label."""
        return sum(int((labels != IGNORE).sum()) for labels in self.labels)

    def first(self, n: int) -> LabelledRows:
        """The first ``n`` sequences, or all of them."""
        types = None if self.types is None else self.types[:n]
        return replace(self, ids=self.ids[:n], labels=self.labels[:n], types=types)

    def tokens(self, number: int) -> Ids:
        """Token ids of a sequence."""
        return self.ids[number]

    def id(self, number: int) -> str:
        """What to call a sequence in an error."""
        return f"sequence {number}"

    def extremes(self) -> tuple[int, int]:
        """The smallest and the largest token id."""
        return min(int(ids.min()) for ids in self.ids), max(int(ids.max()) for ids in self.ids)

    @property
    def digest(self) -> str:
        """sha256 (hex) of all that the batches are made of."""
        hasher = hashlib.sha256(f"labelled {self.classes} {self.pad_id} {self.types is not None}".encode())
        for parts in zip(self.ids, self.labels, *([] if self.types is None else [self.types]), strict=True):
            hasher.update(f" {len(parts[0])} ".encode())
            for part in parts:
                hasher.update(np.ascontiguousarray(part).data)
        return hasher.hexdigest()

    def check(self, reader: Reader) -> None:
        """Raise ``ReqatError`` for a token id that a model does not know."""
        check_tokens(self, self, reader)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The sequences at ``indices`` as one batch, padded to the longest of them."""
        longest = max(len(self.ids[i]) for i in indices)

        def padded(rows: Sequence[Ids], fill: int) -> Tensor:
            out = torch.full((len(indices), longest), fill)
            for b, i in enumerate(indices):
                out[b, : len(rows[i])] = torch.from_numpy(rows[i])
            return out

        ids = padded(self.ids, self.pad_id)
        real = padded([np.ones_like(row) for row in self.ids], 0)
        positions = torch.arange(longest).expand(len(indices), -1).contiguous()
        types = None if self.types is None else padded(self.types, 0)
        return Batch(ids, padded(self.labels, IGNORE), positions, real, token_types=types)

    def batches(self, rows_per_batch: int, epochs: int, seed: int) -> Iterator[list[int]]:
        """Row indices batch by batch, each of sequences of similar length; the last of an epoch may be smaller."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            order, cut = torch.randperm(len(self), generator=generator).tolist(), []
            for start in range(0, len(self), _POOL * rows_per_batch):
                pool = sorted(order[start : start + _POOL * rows_per_batch], key=lambda i: len(self.ids[i]))
                cut += [pool[i : i + rows_per_batch] for i in range(0, len(pool), rows_per_batch)]
            yield from (cut[i] for i in torch.randperm(len(cut), generator=generator).tolist())


def tagged_rows(
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[tuple[Sequence[str], Sequence[int]]],
    *,
    classes: int,
    max_tokens: int,
) -> LabelledRows:
    """Rows of words with a class each: the label stands on a word's first piece; what is beyond ``max_tokens`` is cut.

    Raises ReqatError as :class:`LabelledRows`, and for a sentence with more or fewer classes than words.
    """
    for words, labels in sentences:
        if len(words) != len(labels):
            raise ReqatError(f"a sentence has {len(words)} words and {len(labels)} classes: {' '.join(words)[:60]!r}")
    if not sentences:
        raise ReqatError("no sentences to train on; the selection is empty")
    encoded = tokenizer(
        [list(words) for words, _ in sentences], is_split_into_words=True, truncation=True, max_length=max_tokens
    )
    rows = []
    for number, (_, labels) in enumerate(sentences):
        words_of = encoded.word_ids(number)
        first = [w is not None and (i == 0 or words_of[i - 1] != w) for i, w in enumerate(words_of)]
        rows.append([labels[w] if f else IGNORE for w, f in zip(words_of, first, strict=True)])
    return _rows(tokenizer, encoded, rows, classes)


def classified_rows(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[tuple[str, str | None, int]],
    *,
    classes: int,
    max_tokens: int,
) -> LabelledRows:
    """Rows of one text or a pair of texts with a class, whose label stands on the first token; what is beyond
    ``max_tokens`` is cut, of the longer one of a pair. Raises ReqatError as :class:`LabelledRows`."""
    if not texts:
        raise ReqatError("no texts to train on; the selection is empty")
    paired = texts[0][1] is not None
    if any((second is not None) != paired for _, second, _ in texts):
        raise ReqatError("some of the texts are pairs and some are not; give one kind")
    encoded = tokenizer(
        [first for first, _, _ in texts], [second for _, second, _ in texts] if paired else None,
        truncation=True, max_length=max_tokens,
    )  # fmt: skip
    rows = [[label] + [IGNORE] * (len(ids) - 1) for ids, (*_, label) in zip(encoded["input_ids"], texts, strict=True)]
    return _rows(tokenizer, encoded, rows, classes)


def _rows(
    tokenizer: PreTrainedTokenizerBase, encoded: dict[str, list[list[int]]], labels: list[list[int]], classes: int
) -> LabelledRows:
    def arrays(rows: list[list[int]]) -> tuple[Ids, ...]:
        return tuple(np.asarray(row, dtype=np.int64) for row in rows)

    types = arrays(encoded["token_type_ids"]) if "token_type_ids" in encoded else None
    return LabelledRows(arrays(encoded["input_ids"]), arrays(labels), types, classes, int(tokenizer.pad_token_id or 0))
