"""A trace store that was damaged is refused with file, line and remedy, or gives the traces that were written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reqat.config.errors import MissingFileError, ReqatError
from reqat.data import Trace, TraceStore, write_store

# Separators that str.splitlines() breaks at and JSON does not.
SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"


def traces() -> list[Trace]:
    texts = [f"a{SEPARATORS}b", "", "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"), "x\ny\r\nz"]
    return [Trace(f"t{i}", f"p{i}", "f", text, text, (1, 2 + i), (3, 4)) for i, text in enumerate(texts)]


def lines_as(folder: Path, lines: list[str]) -> None:
    """Write a store with these lines, and the manifest that belongs to them."""
    data = "".join(line + "\n" for line in lines).encode()
    (folder / "train.jsonl").write_bytes(data)
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (folder / "manifest.json").write_text(json.dumps({"files": {"train": entry}}))


def test_separators_within_a_text_end_no_line(tmp_path: Path) -> None:
    write_store(tmp_path / "ours", {"train": traces()})
    assert list(TraceStore.read(tmp_path / "ours").traces) == traces()
    rows = [json.loads(line) for line in (tmp_path / "ours" / "train.jsonl").read_text().split("\n")[:-1]]
    lines_as(tmp_path, [json.dumps(row, ensure_ascii=False) for row in rows])  # as other programs write JSON lines
    assert list(TraceStore.read(tmp_path).traces) == traces()


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    write_store(tmp_path, {"train": traces()})
    for name in ("train.jsonl", "manifest.json"):
        whole = (tmp_path / name).read_bytes()
        for at in range(len(whole)):
            (tmp_path / name).write_bytes(whole[:at] + bytes([whole[at] ^ 0x04]) + whole[at + 1 :])
            try:
                assert list(TraceStore.read(tmp_path).traces) == traces()
            except ReqatError as error:
                assert str(tmp_path) in str(error)
        (tmp_path / name).write_bytes(whole)


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a missing key": lambda row: row.pop("family"),
    "an unknown key": lambda row: row.update(colour="red"),
    "a family that is a number": lambda row: row.update(family=3),
    "ids that are null": lambda row: row.update(response_ids=None),
    "ids that are a text": lambda row: row.update(prompt_ids="12"),
    "an id that is a float": lambda row: row.update(prompt_ids=[1.0]),
    "an id that is true": lambda row: row.update(prompt_ids=[True]),
    "an id that is negative": lambda row: row.update(response_ids=[3, -1]),
    "an id that is huge": lambda row: row.update(response_ids=[2**70]),
    "nested ids": lambda row: row.update(response_ids=[[3]]),
    "no response": lambda row: row.update(response_ids=[]),
    "a name that is taken": lambda row: row.update(id="t0"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_line_that_is_no_trace_is_named(what: str, tmp_path: Path) -> None:
    write_store(tmp_path / "ours", {"train": traces()})
    rows = [json.loads(line) for line in (tmp_path / "ours" / "train.jsonl").read_text().split("\n")[:-1]]
    CHANGES[what](rows[1])
    lines_as(tmp_path, [json.dumps(row) for row in rows])
    with pytest.raises(ReqatError, match=r"train\.jsonl(, line 2)?: .*make the traces again"):
        TraceStore.read(tmp_path)


@pytest.mark.parametrize("line", ["", "{", "[]", "7", '{"id": 1, "id": 2}', "[" * 50_000])
def test_a_line_that_is_no_object_is_named(line: str, tmp_path: Path) -> None:
    lines_as(tmp_path, [line])
    with pytest.raises(ReqatError, match=r"train\.jsonl, line 1: .*make the traces again"):
        TraceStore.read(tmp_path)


@pytest.mark.parametrize(
    "manifest",
    ["", "[]", "{}", '{"files": []}', '{"files": {"train": 3}}', '{"files": {"train": {"sha256": "0"}}}'],
)
def test_a_damaged_manifest_is_named(manifest: str, tmp_path: Path) -> None:
    write_store(tmp_path, {"train": traces()})
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(ReqatError, match=r"manifest\.json"):
        TraceStore.read(tmp_path)


def test_counts_of_the_manifest_are_held_against_the_traces(tmp_path: Path) -> None:
    write_store(tmp_path, {"train": traces()})
    whole = json.loads((tmp_path / "manifest.json").read_text())
    for key in ("traces", "tokens"):
        changed = json.loads(json.dumps(whole))
        changed["files"]["train"][key] += 1
        (tmp_path / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(ReqatError, match=rf"train\.jsonl has .*{key}"):
            TraceStore.read(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(MissingFileError, match=r"manifest\.json.*reqat stage"):
        TraceStore.read(tmp_path)
