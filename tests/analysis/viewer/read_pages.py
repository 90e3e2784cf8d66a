"""Reads a page of the trace viewer back, with nothing of the code that wrote it, and changes folders of traces."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from analysis.viewer import encode


class Scripts(HTMLParser):
    """Text of the script elements, as a browser cuts them out of the page."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._in: str | None = None
        self.feed(page.decode())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag == "script":
            self._in = dict(attributes).get("id") or "script"
            self.found[self._in] = ""

    def handle_data(self, data: str) -> None:
        if self._in:
            self.found[self._in] += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._in = None


def index_of(page: bytes) -> dict[str, Any]:
    return dict(json.loads(Scripts(page).found["index"]))


def from_base_85(text: str) -> bytes:
    """Each five letters are the digits of four bytes, the first the highest; the last group may be shorter."""
    out = b""
    for at in range(0, len(text), 5):
        group = text[at : at + 5]
        value = 0
        for letter in group.ljust(5, encode.ALPHABET[-1]):
            value = 85 * value + encode.ALPHABET.index(letter)
        out += value.to_bytes(4, "big")[: len(group) - 1]
    return out


def unzigzag(values: np.ndarray) -> np.ndarray:
    return np.where(values % 2, -(values + 1) // 2, values // 2)


class Reader:
    """Unpacks a trace as the layout in analysis/viewer/encode.py says, with nothing of its code."""

    def __init__(self, packed: str) -> None:
        self.data, self.at = zlib.decompress(from_base_85(packed)), 0

    def numbers(self, n: int, width: int) -> np.ndarray:
        raw = np.frombuffer(self.data, np.uint8, n * width, self.at).reshape(width, n)
        self.at += n * width
        return sum((plane.astype(np.int64) << (8 * i) for i, plane in enumerate(raw)), np.zeros(n, np.int64))

    def floats(self, n: int) -> np.ndarray:
        self.at += 4 * n
        return np.frombuffer(self.data, "<f4", n, self.at - 4 * n)


def pieces_of(index: dict[str, Any]) -> dict[int, str]:
    """The text of each id."""
    found = json.loads(zlib.decompress(from_base_85(index["pieces"])))
    return dict(zip(np.cumsum(found["steps"]).tolist(), found["texts"], strict=True))


def responses_of(index: dict[str, Any]) -> list[str | None]:
    return list(json.loads(zlib.decompress(from_base_85(index["responses"]))))


def rows_of(folder: Path, trace: int) -> list[dict[str, Any]]:
    return [row for row in pq.read_table(folder / "tokens.parquet").to_pylist() if row["trace"] == trace]


def rewrite(folder: Path, name: str, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Change the rows of a parquet file in place."""
    table = pq.read_table(folder / name)
    rows = table.to_pylist()
    rows = change(rows) or rows
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), folder / name)


def set_token(rows: list[dict[str, Any]], column: str, value: Any, trace: int = 3, position: int = 5) -> None:
    row = next(row for row in rows if (row["trace"], row["position"]) == (trace, position))
    row[column] = value
