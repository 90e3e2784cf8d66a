"""Programs of a small closed language on lists of integers, found from examples and judged on hidden inputs.

A program is a pipeline of one to four operations, ``sort | map * 2 | take 3``. A problem shows what it makes of three
lists; the answer is a program, after a few words on what each step does to the first list. Any program that agrees on
eight hidden lists counts, whatever it looks like, as in LiveCodeBench (ReQAT Table 7). The language has no loops and no
names, is read by a tokenizer and a parser of its own, and every length and value is bounded, so that no answer can
hang or run away: what goes beyond is a failed answer.

| operation | makes of a list |
|---|---|
| ``map + k``, ``map - k``, ``map * k`` | the same on every number |
| ``keep even``, ``keep odd``, ``keep > k``, ``keep < k`` | those numbers alone, in their order |
| ``take k``, ``drop k`` | its first k numbers; all but these |
| ``reverse``, ``sort`` | the other order; ascending order |
| ``sum``, ``len`` | a list of one number |
| ``max``, ``min`` | a list of one number; of the empty list, the empty list |
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from reqat.config.errors import ReqatError
from reqat.tasks.family import Family, Problem

EXAMPLES, HIDDEN = 3, 8
MOST_TOKENS, MOST_ELEMENTS, LARGEST = 64, 64, 10**6
MOST_OPERATIONS = 4
_TOKEN = re.compile(r"\s*(\d+|[a-z]+|[-+*<>|])")
_TRIES = 200

_LISTS: dict[str, Callable[[list[int]], list[int]]] = {
    "reverse": lambda xs: xs[::-1],
    "sort": sorted,
    "sum": lambda xs: [sum(xs)],
    "len": lambda xs: [len(xs)],
    "max": lambda xs: [max(xs)] if xs else [],
    "min": lambda xs: [min(xs)] if xs else [],
}
_COUNTED: dict[str, Callable[[list[int], int], list[int]]] = {
    "map +": lambda xs, k: [x + k for x in xs],
    "map -": lambda xs, k: [x - k for x in xs],
    "map *": lambda xs, k: [x * k for x in xs],
    "keep >": lambda xs, k: [x for x in xs if x > k],
    "keep <": lambda xs, k: [x for x in xs if x < k],
    "take": lambda xs, k: xs[:k],
    "drop": lambda xs, k: xs[k:],
}
_KEPT: dict[str, Callable[[list[int]], list[int]]] = {
    "keep even": lambda xs: [x for x in xs if x % 2 == 0],
    "keep odd": lambda xs: [x for x in xs if x % 2],
}
_SAID = {
    "reverse": ("turn the list around", "read it backwards"),
    "sort": ("put the numbers in order", "sort the numbers"),
    "sum": ("add all numbers up", "take the sum"),
    "len": ("count the numbers", "take the length"),
    "max": ("take the largest number", "find the largest"),
    "min": ("take the smallest number", "find the smallest"),
    "map +": ("add {k} to each number", "raise every number by {k}"),
    "map -": ("take {k} from each number", "lower every number by {k}"),
    "map *": ("multiply each number by {k}", "make every number {k} times as large"),
    "keep >": ("keep what is above {k}", "only numbers above {k} stay"),
    "keep <": ("keep what is below {k}", "only numbers below {k} stay"),
    "take": ("keep the first {k}", "take {k} from the front"),
    "drop": ("leave the first {k} out", "drop {k} from the front"),
    "keep even": ("keep the even numbers", "only even numbers stay"),
    "keep odd": ("keep the odd numbers", "only odd numbers stay"),
}
_LEAD = ("First,", "Then", "Next,", "Now")


class CodeError(ValueError):
    """A text that is no program, or one whose values leave the bounds."""


@dataclass(frozen=True)
class Operation:
    """One step of a pipeline: its name (``map +``, ``keep even``, ``sort``) and its number, where it has one."""

    name: str
    k: int | None = None

    def __str__(self) -> str:
        """As it is written in a program."""
        return self.name if self.k is None else f"{self.name} {self.k}"

    def __call__(self, xs: list[int]) -> list[int]:
        """What it makes of a list. Raises `CodeError` where a number or the length leaves the bounds."""
        plain = _LISTS.get(self.name) or _KEPT.get(self.name)
        out = plain(xs) if plain else _COUNTED[self.name](xs, self.k or 0)
        if len(out) > MOST_ELEMENTS or any(abs(x) > LARGEST for x in out):
            raise CodeError(f"{self}: a list of more than {MOST_ELEMENTS} numbers, or a number beyond {LARGEST}")
        return out


Program = tuple[Operation, ...]


def tokens(text: str) -> list[str]:
    """The tokens of a program's text. Raises `CodeError` at a character that the language has not, and for more than
    64 tokens."""
    found, position = [], 0
    text = text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise CodeError(f"{text[position : position + 10]!r} is no token of the language")
        found.append(match[1])
        position = match.end()
        if len(found) > MOST_TOKENS:
            raise CodeError(f"a program has at most {MOST_TOKENS} tokens")
    return found


def parse(text: str) -> Program:
    """The program that a text says. Raises `CodeError` naming what is wrong."""
    steps: list[list[str]] = [[]]
    for token in tokens(text):
        if token == "|":
            steps.append([])
        else:
            steps[-1].append(token)
    if len(steps) > MOST_OPERATIONS:
        raise CodeError(f"{len(steps)} operations; a program has at most {MOST_OPERATIONS}")
    return tuple(_operation(step) for step in steps)


def _operation(step: list[str]) -> Operation:
    said = " ".join(step)
    if said in _LISTS or said in _KEPT:
        return Operation(said)
    name, number = " ".join(step[:-1]), step[-1] if step else ""
    # A number of more digits than the bound, leading zeros too, is refused before Python reads it.
    if name in _COUNTED and number.isascii() and number.isdigit() and len(number) <= len(str(LARGEST)):
        return Operation(name, int(number))
    raise CodeError(f"{said[:40]!r} is no operation")


def run(program: Program, xs: list[int]) -> list[int]:
    """What a program makes of a list. Raises `CodeError` where it leaves the bounds."""
    for operation in program:
        xs = operation(xs)
    return xs


def written(xs: list[int]) -> str:
    """A list as problems and traces show it: ``[3 1 4]``."""
    return "[" + " ".join(map(str, xs)) + "]"


class _Programs:
    """Problems by index: a program, its examples and its hidden inputs, drawn from the seed and the index alone."""

    def __init__(self, seed: int, fewest: int, most: int) -> None:
        self.seed, self.fewest, self.most = seed, fewest, most

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = random.Random(f"code|{self.seed}|{index}")
        for _ in range(_TRIES):
            program = tuple(_draw(rng) for _ in range(rng.randint(self.fewest, self.most)))
            shown = [_list(rng) for _ in range(EXAMPLES)]
            made = [run(program, xs) for xs in shown]
            # A step that does nothing to any example cannot be found from them, nor one behind an empty list.
            if all(made) and all(_does_something(program, i, shown) for i in range(len(program))):
                break
        examples = ", ".join(f"{written(x)} to {written(y)}" for x, y in zip(shown, made, strict=True))
        return {
            "question": f"Which program makes {examples}?",
            "answer": " | ".join(map(str, program)),
            "metadata": {
                "shown": shown,
                "hidden": [_list(rng) for _ in range(HIDDEN)],
                "operations": len(program),
            },
        }


def _list(rng: random.Random) -> list[int]:
    return [rng.randint(0, 9) for _ in range(rng.randint(3, 5))]


def _draw(rng: random.Random) -> Operation:
    name = rng.choice(tuple(_SAID))
    low, high = {"map *": (2, 3), "keep >": (1, 7), "keep <": (2, 8), "take": (1, 3), "drop": (1, 2)}.get(name, (1, 9))
    return Operation(name, rng.randint(low, high) if name in _COUNTED else None)


def _does_something(program: Program, step: int, shown: list[list[int]]) -> bool:
    before = [run(program[:step], xs) for xs in shown]
    return any(program[step](xs) != xs for xs in before)


class Code(Family):
    """Pipelines of one to four operations by default."""

    name = "code"
    defaults = {"min_operations": 1, "max_operations": MOST_OPERATIONS}

    def dataset(self, seed: int, size: int, options: Mapping[str, Any]) -> Any:
        """Problems by index. Raises ``ReqatError`` naming an option that there is none of, or its value."""
        settings = self.settings(options)
        fewest, most = settings.pop("min_operations"), settings.pop("max_operations")
        whole = type(fewest) is int and type(most) is int
        if settings or not whole or not 1 <= fewest <= most <= MOST_OPERATIONS:
            raise ReqatError(
                f"task family 'code' refuses the options {dict(options)}: it has `min_operations` and "
                f"`max_operations`, numbers from 1 to {MOST_OPERATIONS}"
            )
        return _Programs(seed, fewest, most)

    def prompt(self, problem: Problem) -> str:
        """The question: three lists and what the program makes of them."""
        return f"{problem.question}\n"

    def trace(self, problem: Problem, rng: random.Random) -> str:
        """What each step does to the first list, then the program: ``First, sort the numbers: [1 3 4]. ...``"""
        xs, parts = problem.entry["metadata"]["shown"][0], []
        for i, operation in enumerate(parse(problem.answer)):
            xs = operation(xs)
            lead = _LEAD[0] if i == 0 else rng.choice(_LEAD[1:])
            said = rng.choice(_SAID[operation.name]).format(k=operation.k)
            parts.append(f"{lead} {said}: {written(xs)}. ")
        return "".join(parts) + f"The answer is {problem.answer}."

    def readable(self, answer: str) -> bool:
        """Whether it parses as a program."""
        try:
            parse(answer)
        except CodeError:
            return False
        return True

    def score(self, answer: str | None, entry: Mapping[str, Any]) -> float:
        """1 if the answer is a program that makes of every hidden list what the right one does, else 0."""
        try:
            program, right = parse(answer or ""), parse(entry["answer"])
            return float(all(run(program, xs) == run(right, xs) for xs in entry["metadata"]["hidden"]))
        except CodeError:
            return 0.0


FAMILY = Code()
