"""Files of problems as people and other tools write them: read, or refused naming the line and the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reqat.config.errors import ReqatError
from reqat.tasks import problem_files
from reqat.tasks.problem_files import KEYS, Given, grade, read_problems

ROW = {"id": "a", "prompt": "2 + 2 =", "answer": "4"}


def lines(*rows: dict[str, Any]) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (b"\xef\xbb\xbf" + lines(ROW), [Given("a", "p", "2 + 2 =", "4")]),
        (lines({**ROW, "seed": None, "answer": None}), [Given("a", "p", "2 + 2 =")]),
        (
            lines({**ROW, "id": None}, {**ROW, "id": None}),
            [Given("line-1", "p", "2 + 2 =", "4"), Given("line-2", "p", "2 + 2 =", "4")],
        ),
        (b"\n\r\n" + lines(ROW) + b"\r\n\n", [Given("a", "p", "2 + 2 =", "4")]),
        (lines({"prompt": "x", "answer": 4, "id": 7}), [Given("7", "p", "x", "4")]),
        (lines({"prompt": "x", "answer": 0.5}), [Given("line-1", "p", "x", "0.5")]),
        (
            json.dumps([ROW, {**ROW, "seed": 1}], indent=1).encode(),
            [Given("a", "p", "2 + 2 =", "4"), Given("a", "p", "2 + 2 =", "4", seed=1)],
        ),
        (b"\xef\xbb\xbf [" + lines(ROW) + b"]", [Given("a", "p", "2 + 2 =", "4")]),
        ('{"prompt": "caf\u00e9 \u2028 x"}'.encode(), [Given("line-1", "p", "caf\u00e9 \u2028 x")]),
        (
            lines({"prompt": "x", "response_ids": [0, 5], "finished": False}),
            [Given("line-1", "p", "x", response_ids=(0, 5), finished=False)],
        ),
    ],
)
def test_what_other_tools_write_is_read(tmp_path: Path, data: bytes, wanted: list[Given]) -> None:
    (tmp_path / "p.jsonl").write_bytes(data)
    assert read_problems(tmp_path / "p.jsonl") == wanted


@pytest.mark.parametrize(
    ("second", "named"),
    [
        ({**ROW, "respnse": "4"}, ["respnse", "response"]),
        ({**ROW, "seed": "x"}, ["seed", "'x'"]),
        ({**ROW, "seed": 1.7}, ["seed", "1.7"]),
        ({**ROW, "seed": True}, ["seed", "True"]),
        ({**ROW, "seed": [1]}, ["seed", "a list"]),
        ({**ROW, "seed": -1}, ["seed", "-1"]),
        ({**ROW, "seed": 2**70}, ["seed", str(2**70)]),
        ({**ROW, "finished": "false"}, ["finished", "'false'"]),
        ({**ROW, "finished": 0}, ["finished", "0"]),
        ({**ROW, "id": 1.5}, ["id", "1.5"]),
        ({**ROW, "id": {"a": 1}}, ["id", "an object"]),
        ({**ROW, "answer": [4]}, ["answer", "a list"]),
        ({**ROW, "answer": True}, ["answer", "True"]),
        ({**ROW, "family": 3}, ["family", "3"]),
        ({**ROW, "response": ["4"]}, ["response", "a list"]),
        ({**ROW, "response_ids": "1 2"}, ["response_ids", "'1 2'"]),
        ({**ROW, "response_ids": [1.0]}, ["response_ids", "1.0"]),
        ({**ROW, "response_ids": [-1]}, ["response_ids", "-1"]),
        ({**ROW, "response_ids": [2**70]}, ["response_ids", "whole numbers"]),
        ({**ROW, "prompt": "\ud800"}, ["prompt", "surrogate"]),
        ({**ROW, "prompt": 5}, ["prompt", "5"]),
        ({**ROW, "prompt": " \n"}, ["prompt"]),
        ({**ROW, "prompt": None}, ["prompt"]),
        ({"answer": "4"}, ["prompt", "answer"]),
        ({**ROW, "id": "first"}, ["'first'", "line 1"]),
        ([ROW], ["a list"]),
        ("text", ["text"]),
        (None, ["nothing"]),
        (b'{"prompt": "x", "seed": NaN}', ["NaN"]),
        (b'{"prompt": "x", "seed": 1e999}', ["seed", "inf"]),
        (b'{"prompt": "x", "answer": -1e999}', ["answer", "inf"]),
        (b'{"prompt": "x", "prompt": "y"}', ["'prompt'", "twice"]),
        (b'{"prompt": "x"', ["JSON"]),
        (b'{"prompt": "x"} {"prompt": "y"}', ["JSON"]),
        (b'{"prompt": "\xff"}', ["UTF-8"]),
        (b'{"prompt": ' + b"[" * 100_000, ["nested"]),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", ["JSON"]),
    ],
)
def test_a_faulty_problem_is_refused_by_line_and_key(tmp_path: Path, second: Any, named: list[str]) -> None:
    data = second if isinstance(second, bytes) else json.dumps(second).encode()
    (tmp_path / "p.jsonl").write_bytes(lines({**ROW, "id": "first"}) + b"\n" + data + b"\n")
    assert len(read_problems(tmp_path / "p.jsonl", 1)) == 1  # the first one is whole
    with pytest.raises(ReqatError) as error:
        read_problems(tmp_path / "p.jsonl")
    assert all(word in str(error.value) for word in ["p.jsonl, line 2", *named]), error.value
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("data", [b"", b"\n\n", b"[]", b"\xef\xbb\xbf"])
def test_a_file_without_a_problem_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "p.jsonl").write_bytes(data)
    with pytest.raises(ReqatError, match=r"p\.jsonl.*no problem"):
        read_problems(tmp_path / "p.jsonl")


def test_no_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.jsonl"):
        with pytest.raises(ReqatError, match="no such file of problems"):
            read_problems(path)


def test_what_is_too_long_for_any_model_is_refused_without_reading_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(lines({"prompt": "x" * (problem_files.LONGEST_TEXT + 1)}))
    with pytest.raises(ReqatError, match=r"line 1.*prompt.*shorten"):
        read_problems(path)
    monkeypatch.setattr(problem_files, "LONGEST_LINE", 100)
    path.write_bytes(lines(ROW, {"prompt": "x" * 200}))
    with pytest.raises(ReqatError, match=r"line 2.*shorten"):
        read_problems(path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(st.lists(st.dictionaries(st.sampled_from([*KEYS, "Prompt", ""]), VALUES, max_size=5), max_size=3), st.data())
def test_any_file_is_read_or_refused(rows: list[dict[str, Any]], data: st.DataObject) -> None:
    import tempfile

    text = "\n".join(json.dumps(row) for row in rows).encode("utf-8")
    cut = data.draw(st.integers(0, len(text)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "p.jsonl"
        path.write_bytes(text[:cut] if data.draw(st.booleans()) else text)
        try:
            found = read_problems(path)
        except ReqatError:
            return
    assert found and all(isinstance(row.prompt, str) and row.prompt.strip() for row in found)
    assert len({(row.id, row.seed) for row in found}) == len(found)


def test_without_a_reference_nothing_is_graded() -> None:
    assert grade(Given("p", "f", "?"), "the answer is 4") is None
    assert grade(Given("p", "f", "?", "4"), "the answer is 4") is True
