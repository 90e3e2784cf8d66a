"""Files of benchmarks: what a problem becomes, which answer counts, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from reqat.config.errors import MissingFileError, ReqatError
from reqat.tasks.answers import announced, grade
from reqat.tasks.benchmarks import BOXED, read_benchmark
from reqat.tasks.problem_files import Given, malformed
from reqat.tasks.problem_files import grade as grade_row

ROWS = [
    {"problem": " What is $1+1$? ", "answer": 2, "url": "none"},
    {"question": "How many?", "answer": "2 + 2 = 4\n#### 4", "unique_id": "test/1.json"},
    {"ID": "2024-I-1", "Problem": "x", "Answer": "204"},
]


def write(file: Path, *rows: Any) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_row_becomes_a_problem_that_asks_for_a_box(tmp_path: Path) -> None:
    file = write(tmp_path / "aime24.jsonl", *ROWS)
    found = read_benchmark(file)
    assert [p.id for p in found] == ["line-1", "test/1.json", "2024-I-1"]
    assert [p.answer for p in found] == ["2", "4", "204"]
    assert {p.family for p in found} == {"aime24"} and all(p.boxed for p in found)
    assert found[0].prompt == f"What is $1+1$?{BOXED}" and "\\boxed{}" in BOXED
    assert read_benchmark(file, 2) == found[:2]
    assert read_benchmark(file, sha256=hashlib.sha256(file.read_bytes()).hexdigest()) == found


@pytest.mark.parametrize(
    ("response", "box"),
    [
        (r"so \boxed{204}.", "204"),
        (r"\boxed{1} no, \boxed{204}", "204"),
        (r"<think>\boxed{1}</think> \boxed{204}", "204"),
        (r"<think>\boxed{204}</think> The answer is 204.", None),
        ("The answer is 204.", None),
        ("204", None),
        (r"\boxed{204", None),
        ("", None),
    ],
)
def test_a_response_without_a_closed_box_is_wrong(response: str, box: str | None) -> None:
    row = Given("a", "aime", "x", "204", boxed=True)
    assert announced(response, boxed=True) == box
    assert grade(response, "204", boxed=True) is grade_row(row, response) is (box is not None)
    assert malformed(row, response) is (box is None)


def test_without_asking_for_a_box_an_announced_answer_counts() -> None:
    row = Given("a", "mine", "x", "204")
    assert grade_row(row, "The answer is 204.") and not malformed(row, "The answer is 204.")
    assert malformed(row, "")


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([ROWS[0], {"problem": "x"}], "line 2: no 'answer'"),
        ([{"answer": 2}], "line 1: no 'problem' or 'question'"),
        ([{**ROWS[0], "id": 7}, {**ROWS[0], "id": 7}], "line 2: id '7'"),
        ([5], "line 1.*object"),
        ([], "no problem"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, rows: list[Any], named: str) -> None:
    with pytest.raises(ReqatError, match=named):
        read_benchmark(write(tmp_path / "a.jsonl", *rows))


def test_a_file_that_is_missing_too_short_or_another_one_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "aime24.jsonl", *ROWS)
    with pytest.raises(MissingFileError, match="aime25.jsonl"):
        read_benchmark(tmp_path / "aime25.jsonl")
    with pytest.raises(ReqatError, match="holds 3 problems, and 4"):
        read_benchmark(file, 4)
    with pytest.raises(ReqatError, match="aime24.jsonl changed"):
        read_benchmark(file, sha256="0" * 64)
