"""Reading files: what is in them, or one error that names the file and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from reqat.config.errors import MissingFileError, ReqatError
from reqat.config.files import read_json, read_json_list, read_yaml


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"null", b"7", b'"text"', b"[]", b'{"a": 1, "a": 1}', b"\xff{}", b"[" * 100_000, b"[" + b"9" * 5000],
    ids=lambda text: repr(text[:12]),
)
def test_what_is_no_json_object_names_the_file_and_the_remedy(text: bytes, tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    file.write_bytes(text)
    with pytest.raises(ReqatError, match="file.json.*make it again"):
        read_json(file, "thing", "make it again")
    if text != b"[]":
        with pytest.raises(ReqatError, match="file.json.*make it again"):
            read_json_list(file, "thing", "make it again")


def test_json_with_a_byte_order_mark_and_lists(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    file.write_bytes(b'\xef\xbb\xbf{"a": [1]}')
    assert read_json(file, "thing", "remedy") == {"a": [1]}
    file.write_bytes(b'\xef\xbb\xbf[{"a": 1}]')
    assert read_json_list(file, "things", "remedy") == [{"a": 1}]


def test_an_absent_file_is_a_missing_file_and_an_error_of_ours(tmp_path: Path) -> None:
    for read in (lambda path: read_json(path, "thing", "make it"), read_yaml):
        with pytest.raises(MissingFileError, match="absent: no such") as caught:
            read(tmp_path / "absent")
        assert isinstance(caught.value, FileNotFoundError) and isinstance(caught.value, ReqatError)
