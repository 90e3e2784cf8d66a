"""The text of single tokens, which is not always what a tokenizer's vocabulary says.

Byte-level tokenizers spell each byte as a printable letter (a space is ``Ġ``), SentencePiece a space as ``▁``; both are
turned back, so that the page shows what the model wrote. A token may hold a part of a letter only: such bytes are
shown as ``\\xe2``, since half a letter has no other text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reqat.config.errors import ReqatError
from reqat.config.files import read_json

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# A plain vocabulary may hold a word with the letter; a byte-level one holds thousands.
_SPELLED_SHARE = 0.01


class Vocabulary:
    """Token ids and their texts.

    A list in ``meta.json`` is the whole vocabulary: no other id is known. Models may have more logits than their
    tokenizer has tokens, so with a tokenizer's folder a larger id is *allowed* among the most probable tokens.
    """

    def __init__(self, spelled: Mapping[int, str], where: str, *, padded: bool) -> None:
        self.where, self._padded = where, padded
        size = max(spelled, default=-1) + 1
        if size == 0:
            raise ReqatError(f"the {where} is empty; collect the traces again")
        self._known = np.zeros(size, bool)
        self._known[list(spelled)] = True
        self._texts = {id: text for id, text in spelled.items()}
        marked = {mark: sum(text.startswith(mark) for text in spelled.values()) for mark in ("Ġ", "▁")}
        self._bytes = marked["Ġ"] > _SPELLED_SHARE * len(spelled)
        self._pieces = marked["▁"] > _SPELLED_SHARE * len(spelled)

    def __str__(self) -> str:
        """How messages name it."""
        return f"{self.where} of {int(self._known.sum())} tokens"

    @property
    def size(self) -> int:
        """One more than the largest known id."""
        return len(self._known)

    def knows(self, ids: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Which of ``ids`` are tokens."""
        inside = (ids >= 0) & (ids < self.size)
        return inside & self._known[np.where(inside, ids, 0)]

    def allows(self, ids: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Which of ``ids`` may be among the most probable tokens."""
        return ids >= 0 if self._padded else self.knows(ids)

    def text(self, id: int) -> str:
        """What token ``id`` writes."""
        spelled = self._texts.get(id)
        if spelled is None:
            return f"<{id}>"
        if self._bytes:
            table = _byte_of_letter()
            if all(letter in table for letter in spelled):
                return bytes(table[letter] for letter in spelled).decode("utf-8", errors="backslashreplace")
        if self._pieces:
            byte = _BYTE.fullmatch(spelled)
            if byte:
                return bytes([int(byte[1], 16)]).decode("utf-8", errors="backslashreplace")
            return spelled.replace("▁", " ")
        return spelled

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any], folder: Path) -> Vocabulary:
        """From ``vocabulary`` (a list of token strings) or ``tokenizer`` (a folder, looked for from ``folder``, then
        from the working directory).

        Raises ``ReqatError`` where there is neither, or no tokenizer.json.
        """
        given = meta.get("vocabulary") or meta.get("tokenizer")
        if isinstance(given, list):
            if not all(isinstance(text, str) for text in given):
                raise ReqatError(f"{folder / 'meta.json'}: the vocabulary holds what is no string; collect again")
            return cls(dict(enumerate(given)), "vocabulary", padded=False)
        if not isinstance(given, str):
            raise ReqatError(
                f"{folder / 'meta.json'} names neither a vocabulary (a list of token strings) nor a tokenizer (its "
                "folder), so token ids have no text; add one of them"
            )
        tried = [base / given / "tokenizer.json" for base in (folder, Path())]
        path = next((path for path in tried if path.is_file()), None)
        if path is None:
            raise ReqatError(
                f"{folder / 'meta.json'}: no tokenizer.json in {given!r} (looked in {tried[0].parent} and "
                f"{tried[1].parent}); correct the path, or put the vocabulary into meta.json"
            )
        described = read_json(path, "tokenizer that can be read", "copy the tokenizer again")
        try:
            model = described["model"]["vocab"]
            spelled = (
                {id: text for text, id in model.items()}
                if isinstance(model, dict)
                else {id: text for id, (text, *_) in enumerate(model)}
            )
            spelled |= {added["id"]: added["content"] for added in described.get("added_tokens") or ()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ReqatError(
                f"{path} is no tokenizer that can be read ({type(error).__name__}: {error}); copy the tokenizer again"
            ) from error
        if not all(type(id) is int and isinstance(text, str) for id, text in spelled.items()):
            raise ReqatError(
                f"{path} has ids that are no numbers, or tokens that are no texts; copy the tokenizer again"
            )
        return cls(spelled, f"tokenizer {given}", padded=True)


@cache
def _byte_of_letter() -> dict[str, int]:
    """The letter that stands for each byte in a byte-level vocabulary: itself where it prints, else one from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
