"""Problem files: JSON lines, or one JSON array, of objects with a prompt.

Keys of a problem: ``prompt``, and optionally ``response`` (text) or ``response_ids`` (token ids), ``answer``, ``id``
(default: the line's number), ``family`` (default: the file's name), ``seed`` (default 0) and ``finished`` (false: the
response was cut off). A key whose value is null counts as absent. Any other key is refused: a mistyped ``respnse``
would otherwise be a problem without a response.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from reqat.config.errors import ReqatError, unknown
from reqat.config.files import explaining
from reqat.tasks.answers import announced
from reqat.tasks.answers import grade as grade_answer
from reqat.tasks.family import Problem, verify
from reqat.tasks.family import malformed as malformed_by_family

KEYS = ("prompt", "response", "response_ids", "answer", "id", "family", "seed", "finished")
# Longest text of a problem, in characters, some 500,000 tokens: more than any model here reads, and what a tokenizer
# takes a few seconds for.
LONGEST_TEXT = 2_000_000
# Longest line, in bytes: a prompt, a response and their escapes. A longer one is refused without being read to its end.
LONGEST_LINE = 32 * 2**20
_LARGEST_SEED = 2**63 - 1
_LARGEST_ID = 2**31 - 1  # of a token
T = TypeVar("T")


@dataclass(frozen=True)
class Given:
    """A problem of a file, or of a task family (``problem``, with a verifier of its own)."""

    id: str
    family: str
    prompt: str
    answer: str = ""
    response: str | None = None
    response_ids: tuple[int, ...] | None = None
    seed: int = 0
    finished: bool = True
    problem: Problem | None = field(default=None, repr=False)
    boxed: bool = False
    """Whether the prompt asks for an answer in a box: nothing else then counts as one."""

    @property
    def has_response(self) -> bool:
        """Whether a response came with it."""
        return self.response is not None or self.response_ids is not None


def grade(row: Given, response: str) -> bool | None:
    """Whether a response is right: by the family's verifier, else by the answer that it announces; None without a
    reference answer."""
    if row.problem is not None:
        return verify(row.problem, response)
    return grade_answer(response, row.answer, boxed=row.boxed) if row.answer else None


def malformed(row: Given | Problem, response: str) -> bool:
    """Whether a response has no answer that a grader can read; of a problem that asks for a box, none in a box."""
    problem = row if isinstance(row, Problem) else row.problem
    if problem is not None:
        return malformed_by_family(problem, response)
    assert isinstance(row, Given)
    return announced(response, boxed=row.boxed) is None


def of_problems(asked: Sequence[Problem]) -> list[Given]:
    """Problems of task families as problems of a file."""
    return [Given(p.id, p.family, p.prompt, p.answer, problem=p) for p in asked]


def read_problems(path: Path, n: int | None = None) -> list[Given]:
    """The first ``n`` problems (default: all) of a file, UTF-8 with or without a byte order mark.

    Raises `ReqatError` naming file, line and key for a file that is absent, holds no problem, or holds one that is
    damaged, of unknown keys, of values of another type, or that was there before (same ``id`` and ``seed``).
    """
    if not path.is_file():
        raise ReqatError(f"{path}: no such file of problems (JSON lines with at least a prompt).")
    rows: list[Given] = []
    seen: dict[tuple[str, int], str] = {}
    for where, default_id, found in json_objects(path):
        row = _problem(found, where, default_id, path.stem)
        if (row.id, row.seed) in seen:
            raise ReqatError(
                f"{where}: problem {row.id!r} with seed {row.seed} was there before ({seen[row.id, row.seed]}); give "
                "each id and seed once."
            )
        seen[row.id, row.seed] = where
        rows.append(row)
        if len(rows) == n:
            break
    if not rows:
        raise ReqatError(f"{path}: it holds no problem; write at least one line with a prompt.")
    return rows


def json_objects(path: Path) -> Iterator[tuple[str, str, Any]]:
    """The values of a file of JSON lines, or of one JSON array: where each stands, a default id, and the value.

    Raises `ReqatError` naming file and line for what is not JSON in UTF-8, has a key twice, or is too long.
    """
    with explaining(path), path.open("rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        file.seek(0)
        if start.startswith(b"["):
            data = file.read(64 * LONGEST_LINE + 1)
            if len(data) > 64 * LONGEST_LINE:
                raise ReqatError(f"{path}: an array of more than {64 * LONGEST_LINE:,} bytes; write JSON lines.")
            whole = _parse(data.removeprefix(b"\xef\xbb\xbf"), str(path))
            for number, found in enumerate(whole, 1):
                yield f"{path.name}, problem {number}", f"line-{number}", found
            return
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            where = f"{path.name}, line {number}"
            if len(line) > LONGEST_LINE:
                raise ReqatError(f"{where}: longer than {LONGEST_LINE:,} bytes; shorten its texts.")
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield where, f"line-{number}", _parse(line, where)


def _parse(data: bytes, where: str) -> Any:
    def constant(name: str) -> None:
        raise ReqatError(f"{where}: {name} is no value that JSON knows; write a number or null.")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None) if len(keys) < 100 else None
        if twice is not None:
            raise ReqatError(f"{where}: the key {twice!r} is in it twice; keep one.")
        return dict(pairs)

    try:
        return json.loads(data.decode("utf-8"), parse_constant=constant, object_pairs_hook=unique)
    except ReqatError:
        raise
    except UnicodeDecodeError as error:
        raise ReqatError(f"{where}: byte {error.start} is not UTF-8; save the file as UTF-8.") from None
    except RecursionError:
        raise ReqatError(f"{where}: nested too deeply for a problem; write an object of {', '.join(KEYS)}.") from None
    except ValueError as error:  # JSONDecodeError among them, and numbers of too many digits
        raise ReqatError(f"{where}: not a JSON object ({' '.join(str(error).split())}); correct the line.") from None


def _problem(found: Any, where: str, default_id: str, default_family: str) -> Given:
    if not isinstance(found, dict):
        raise ReqatError(f"{where}: it needs to be an object with a prompt, and is {_kind(found)}.")
    for key in found:
        if key not in KEYS:
            raise unknown("key", key, KEYS, where)
    found = {key: value for key, value in found.items() if value is not None}

    def wrong(key: str, wanted: str) -> ReqatError:
        shown = repr(found[key])
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        return ReqatError(f"{where}: {key} must be {wanted}, not {_kind(found[key])} ({shown}).")

    def text(key: str, default: T) -> str | T:
        value = found.get(key, default)
        if value is default:
            return default
        if not isinstance(value, str):
            raise wrong(key, "text")
        if len(value) > LONGEST_TEXT:
            raise ReqatError(
                f"{where}: {key} has {len(value):,} characters, more than the {LONGEST_TEXT:,} that a model could "
                "read; shorten it."
            )
        if (at := next((i for i, c in enumerate(value) if "\ud800" <= c <= "\udfff"), None)) is not None:
            raise ReqatError(
                f"{where}: {key} holds half a character ({value[at]!r} at {at}, a lone surrogate), which no tokenizer "
                "can read; write the whole character."
            )
        return value

    prompt = text("prompt", None)
    if prompt is None or not prompt.strip():
        keys = ", ".join(found) or "nothing"
        raise ReqatError(f"{where}: it needs a prompt (text that is not empty), and has {keys}.")
    for key in ("id", "answer"):  # numbers are taken as they are written
        if type(found.get(key)) in ((int, float) if key == "answer" else (int,)):
            if isinstance(found[key], float) and abs(found[key]) == float("inf"):
                raise wrong(key, "text or a finite number")
            found[key] = str(found[key])
    seed = found.get("seed", 0)
    if type(seed) is not int or not 0 <= seed <= _LARGEST_SEED:
        raise wrong("seed", f"a whole number from 0 to {_LARGEST_SEED}")
    if type(found.get("finished", True)) is not bool:
        raise wrong("finished", "true or false")
    ids = found.get("response_ids")
    if ids is not None and not (isinstance(ids, list) and all(type(i) is int and 0 <= i <= _LARGEST_ID for i in ids)):
        raise wrong("response_ids", f"a list of whole numbers from 0 to {_LARGEST_ID}")
    return Given(
        id=text("id", default_id) or default_id,
        family=text("family", default_family) or default_family,
        prompt=prompt,
        answer=text("answer", ""),
        response=text("response", None),
        response_ids=None if ids is None else tuple(ids),
        seed=seed,
        finished=found.get("finished", True),
    )


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", int: "a number", float: "a number"}
    return names.get(type(value), "nothing")
