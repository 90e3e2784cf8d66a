"""A trace in few bytes: whole numbers of fixed size, like bytes beside each other, deflated.

Probabilities are kept to 1/65,535 and entropies to 1/4,096 nat (at most 16 nats: more than the logarithm of any
vocabulary), which is finer than the page shows. Of the most probable tokens only those of at least ``floor`` are kept,
and always the first: at a token that both models are sure of, the other four would be most of the bytes and say
nothing. The probability of the token that follows is in that list nearly always, so its place in it is stored, and the
value itself only where it is not.

Numbers of two bytes are stored as all their low bytes, then all their high bytes: the high ones hardly vary, so
deflating finds them. Layout of a trace of N tokens (integers little-endian):

    token ids [N x width]; then for each label: entropy [N x 2], kept [N x 1], rank [N x 1] (255: not in the list),
    then probability float32 of those of rank 255, kept ids [sum of kept x width], their probabilities [x 2]
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.viewer.folder import Tokens

ENTROPY_STEPS = 4096
PROB_STEPS = 65_535
NOT_IN_LIST = 255
FLOOR = 5e-4


def width_of(largest_id: int) -> int:
    """Bytes that hold every id up to ``largest_id``."""
    return 2 if largest_id < 1 << 16 else 3


def planes(values: NDArray[Any], width: int) -> bytes:
    """Non-negative integers as ``width`` planes of bytes, lowest first."""
    return np.ascontiguousarray(values.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :width].T).tobytes()


def encode(tokens: Tokens, labels: Sequence[str], width: int, floor: float = FLOOR) -> tuple[bytes, NDArray[np.int32]]:
    """The bytes of a trace, and the ids that the page needs a text for (distinct, ascending)."""
    n = len(tokens.token)
    parts, used = [planes(tokens.token, width)], [tokens.token]
    for label in labels:
        said = tokens.by_label[label]
        row_M = np.repeat(np.arange(n), said.count)
        first_N = np.cumsum(said.count) - said.count
        keep_M = said.top_prob >= floor
        keep_M[first_N] = True
        # A byte counts them, and 255 means "not in the list".
        keep_M &= np.arange(len(row_M)) - first_N[row_M] < NOT_IN_LIST - 1
        row_M, top_M, top_prob_M = row_M[keep_M], said.top[keep_M], said.top_prob[keep_M]
        kept_N = np.bincount(row_M, minlength=n)
        place_M = np.arange(len(row_M)) - (np.cumsum(kept_N) - kept_N)[row_M]
        rank_N = np.full(n, NOT_IN_LIST)
        taken_M = top_M == tokens.token[row_M]
        rank_N[row_M[taken_M]] = place_M[taken_M]
        parts += [
            planes(np.rint(said.entropy.clip(max=15.99) * ENTROPY_STEPS), 2),
            kept_N.astype(np.uint8).tobytes(),
            rank_N.astype(np.uint8).tobytes(),
            said.prob[rank_N == NOT_IN_LIST].astype("<f4").tobytes(),
            planes(top_M, width),
            planes(np.rint(top_prob_M.clip(0, 1) * PROB_STEPS), 2),
        ]
        used.append(top_M)
    return b"".join(parts), np.unique(np.concatenate(used))


def pack(data: bytes) -> str:
    """Deflated, as base64: letters that mean nothing to HTML."""
    return base64.b64encode(zlib.compress(data, 9)).decode("ascii")


def as_json(value: Any) -> str:
    """JSON that may stand inside a script element: no ``<``, so no end tag and no comment can begin in it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
