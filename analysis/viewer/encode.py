"""A trace in few bytes: small whole numbers, like bytes beside each other, deflated.

Numbers are stored as finely as the page shows them. Entropies have a step that grows with their root: 0.0004 nats at
0.01, 0.004 at 1. Probabilities have the step of ``sin(angle) ** 2``, finest at both ends: 0.15% at 50%, 0.01% at 0.2%
and at 99.8%. Of the most probable tokens only those of at least ``floor`` are kept, and always the first: at a token
that both models are sure of, the other four would be most of the bytes and say nothing.

Little has to be spelled out. The most probable token is nearly always the one that follows, and what one precision
holds likely so does the other: each entry is first looked for in a list, the token that follows and then what the
reference keeps; and where the reference has the same entry, only the difference is stored. The probability of the token
that follows is that of its entry, and a number of its own only where it has none.

Numbers of two bytes are stored as all their low bytes, then all their high bytes: the high ones hardly vary, so
deflating finds them, with a code of its own for each plane. Layout of a trace of N tokens (integers little-endian):

    token ids [N x width]; then for each label: entropy [N x 2], kept [N x 1], place of each kept entry in the list
    [sum of kept x 1] (0: the token that follows; 1 and on: the reference's kept; 255: not in it), probability float32
    of the tokens that no entry is, ids of the entries of place 255 [x width], probability of each entry [x 2]

Of labels but the first, entropies and the probabilities of entries that the reference has too are differences from the
reference's, 0, -1, 1, -2, 2, ... as 0, 1, 2, 3, 4, ...
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

ENTROPY_STEPS = 2047
PROB_STEPS = 1023
MOST_NATS = 16.0  # more than the logarithm of any vocabulary
NOT_IN_LIST = 255
FLOOR = 1e-3
# A shorter plane does not pay for a code of its own.
_OWN_CODE_BYTES = 200
# Letters for base 85 that mean nothing to HTML, JSON or JavaScript.
ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%()*+-;=?@^_{|}~,./:"[:85]
_FROM_B85 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;<=>?@^_`{|}~"
_LETTERS = str.maketrans(_FROM_B85, ALPHABET)


def width_of(largest_id: int) -> int:
    """Bytes that hold every id up to ``largest_id``."""
    return 2 if largest_id < 1 << 16 else 3


def planes(values: NDArray[Any], width: int) -> list[bytes]:
    """Non-negative integers as ``width`` planes of bytes, lowest first."""
    bytes_N4 = values.astype("<u4").view(np.uint8).reshape(-1, 4)
    return [bytes_N4[:, plane].tobytes() for plane in range(width)]


def entropy_steps(nats: NDArray[np.float32]) -> NDArray[np.int64]:
    """Entropies as whole numbers; ``MOST_NATS * (step / ENTROPY_STEPS) ** 2`` is back."""
    return np.rint(np.sqrt(nats.clip(0, MOST_NATS) / MOST_NATS) * ENTROPY_STEPS).astype(np.int64)


def prob_steps(prob: NDArray[np.float32]) -> NDArray[np.int64]:
    """Probabilities as whole numbers; ``sin(step / PROB_STEPS * pi / 2) ** 2`` is back."""
    angle = np.arcsin(np.sqrt(prob.clip(0, 1).astype(np.float64)))
    return np.rint(angle * (2 / np.pi) * PROB_STEPS).astype(np.int64)


def unsigned(difference: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, -1, 1, -2, 2, ... as 0, 1, 2, 3, 4, ...; small numbers stay small."""
    return np.where(difference < 0, -2 * difference - 1, 2 * difference)


def encode(
    tokens: Tokens, labels: Sequence[str], width: int, floor: float = FLOOR
) -> tuple[list[bytes], NDArray[np.int32]]:
    """The planes of a trace, and the ids that the page needs a text for (distinct, ascending)."""
    n = len(tokens.token)
    parts, used = planes(tokens.token, width), [tokens.token]
    reference: dict[str, NDArray[np.int64]] = {}  # its entries by row and id, ascending
    for label in labels:
        said = tokens.by_label[label]
        row_M = np.repeat(np.arange(n), said.count)
        first_N = np.cumsum(said.count) - said.count
        keep_M = said.top_prob >= floor
        keep_M[first_N] = True
        # A byte counts them and their places, and 255 means "not in the list".
        keep_M &= np.arange(len(row_M)) - first_N[row_M] < NOT_IN_LIST - 1
        row_M, top_M = row_M[keep_M], said.top[keep_M]
        kept_N = np.bincount(row_M, minlength=n)
        key_M = row_M.astype(np.int64) << 32 | top_M
        entropy_N, prob_M = entropy_steps(said.entropy), prob_steps(said.top_prob[keep_M])
        stored_N, stored_M = entropy_N, prob_M
        place_M = np.full(len(row_M), NOT_IN_LIST)
        if not reference:
            order = np.argsort(key_M, kind="stable")
            within_M = np.arange(len(row_M)) - (np.cumsum(kept_N) - kept_N)[row_M]
            reference = {"key": key_M[order], "place": 1 + within_M[order], "prob": prob_M[order], "nats": entropy_N}
        elif n:
            at_M = np.searchsorted(reference["key"], key_M).clip(max=len(reference["key"]) - 1)
            same_M = reference["key"][at_M] == key_M
            place_M[same_M] = reference["place"][at_M[same_M]]
            stored_N = unsigned(entropy_N - reference["nats"])
            stored_M = np.where(same_M, unsigned(prob_M - reference["prob"][at_M]), prob_M)
        taken_M = top_M == tokens.token[row_M]
        place_M[taken_M] = 0
        has_entry_N = np.zeros(n, bool)
        has_entry_N[row_M[taken_M]] = True
        parts += [
            *planes(stored_N, 2),
            kept_N.astype(np.uint8).tobytes(),
            place_M.astype(np.uint8).tobytes(),
            said.prob[~has_entry_N].astype("<f4").tobytes(),
            *planes(top_M[place_M == NOT_IN_LIST], width),
            *planes(stored_M, 2),
        ]
        used.append(top_M)
    return parts, np.unique(np.concatenate(used))


def pack(parts: Sequence[bytes]) -> str:
    """Deflated, a block for each part, in base 85 (five letters for four bytes) that means nothing to HTML."""
    deflate = zlib.compressobj(9)
    data = b""
    for part in parts:
        data += deflate.compress(part)
        if len(part) > _OWN_CODE_BYTES:
            data += deflate.flush(zlib.Z_BLOCK)
    data += deflate.flush()
    return base64.b85encode(data).decode("ascii").translate(_LETTERS)


def unpack(text: str) -> bytes:
    """What :func:`pack` was given."""
    return zlib.decompress(base64.b85decode(text.translate(str.maketrans(ALPHABET, _FROM_B85))))


def as_json(value: Any) -> str:
    """JSON that may stand inside a script element: no ``<``, so no end tag and no comment can begin in it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
