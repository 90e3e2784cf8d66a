r"""Files of benchmarks: published problems with reference answers, as a data set of the hub has them.

A line is an object with ``problem``, ``question`` or ``prompt``, with ``answer``, and optionally ``id``; other columns
are passed over, so that a copy of a data set can be used as it is. A problem is asked zero-shot, for an answer in
``\boxed{}`` (ReQAT, section 8; the wording is DeepSeek-R1's), and what is in the box is graded: a response without one
is wrong. Our own evaluations and our tasks of lm-eval read, ask and grade by what is here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from reqat.config.errors import MissingFileError, ReqatError
from reqat.config.files import sha256 as sha256_of
from reqat.tasks.problem_files import Given, json_objects

BOXED = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
_QUESTION = ("problem", "question", "prompt")
Row = tuple[str, str, Any, str]
"""Where a row stands, a default id, the row, and which version of which data it is of."""


def read_benchmark(path: Path, n: int | None = None, *, sha256: str | None = None) -> list[Given]:
    """The first ``n`` problems (default: all) of a benchmark's file, of the family that the file's name says.

    Raises ReqatError for a file that is missing (`MissingFileError`), is not the one of this ``sha256``, holds a row
    without question or answer (named by its line), an id twice, or fewer than ``n`` problems.
    """
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file of problems; put it there, one JSON object a line.")
    found = sha256_of(path)
    if sha256 is not None and found != sha256:
        raise ReqatError(
            f"{path} changed since the plan was made (sha256 {found[:12]}, then {sha256[:12]}); restore it, or plan "
            "anew: its evaluations then have other ids."
        )
    rows = []
    for where, id, row, _ in with_ids(rows_of(path), path):
        rows.append(given(row, where, id, path.stem))
        if len(rows) == n:
            break
    if n is not None and len(rows) < n:
        raise ReqatError(f"{path} holds {len(rows)} problems, and {n} are asked for; lower evaluation.n.")
    return rows


def rows_of(path: Path) -> Iterator[Row]:
    """The rows of a file, whose version is its digest."""
    version = f"{path.name} sha256:{sha256_of(path)}"
    yield from ((*row, version) for row in json_objects(path))


def with_ids(rows: Iterable[Row], what: object) -> Iterator[Row]:
    """Rows under ids of their own: ``unique_id`` or ``id``, else the default; column names in small letters.

    Raises ReqatError for a row that is no object, an id that was there before, and where there is no row; ``what`` they
    are rows of.
    """
    seen: dict[str, str] = {}
    for where, default, row, source in rows:
        if not isinstance(row, dict):
            raise ReqatError(f"{where}: a row is an object with a question and an answer, not {row!r:.60}")
        row = {str(key).lower(): value for key, value in row.items()}
        id = str(next((row[key] for key in ("unique_id", "id") if row.get(key) not in (None, "")), default))
        if id in seen:
            raise ReqatError(f"{where}: id {id!r} was there before ({seen[id]}); give each problem an id of its own")
        seen[id] = where
        yield where, id, row, source
    if not seen:
        raise ReqatError(f"{what}: it holds no problem; write at least one line with a question and an answer")


def given(row: Mapping[str, Any], where: str, id: str, family: str) -> Given:
    """A row as a problem. Raises ReqatError where it has no question or no answer."""
    return Given(id, family, question(row, where) + BOXED, answer(row, where), boxed=True)


def question(row: Mapping[str, Any], where: str) -> str:
    """The question of a row. Raises ReqatError where there is none."""
    text = next((row[key] for key in _QUESTION if row.get(key) is not None), None)
    if not isinstance(text, str) or not text.strip():
        raise lacks(row, where, " or ".join(repr(key) for key in _QUESTION[:2]), text)
    return text.strip()


def answer(row: Mapping[str, Any], where: str) -> str:
    """The reference answer of a row; of GSM8K's, which are solutions, what stands behind ``####``. Raises ReqatError
    where there is none."""
    found = row.get("answer")
    if isinstance(found, bool) or not isinstance(found, str | int | float):
        raise lacks(row, where, "'answer'", found)
    text = str(found).rpartition("####")[2].strip()
    if not text:
        raise lacks(row, where, "'answer'", found)
    return text


def lacks(row: Mapping[str, Any], where: str, column: str, value: object) -> ReqatError:
    """The error of a row without a column that it needs."""
    found = "" if value is None else f" ({value!r:.60} is none)"
    return ReqatError(f"{where}: no {column}{found}; its columns are {', '.join(row) or 'none'}")
