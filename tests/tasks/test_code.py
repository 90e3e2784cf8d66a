"""The list language: programs are judged by what they make of hidden lists, and no answer hangs or runs away."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reqat.config.errors import ReqatError
from reqat.tasks import malformed, problems, verify, write_trace
from reqat.tasks.families import code

# Oracle: each operation as a Python expression of xs and k.
ORACLE = {
    "reverse": lambda xs, k: list(reversed(xs)),
    "sort": lambda xs, k: sorted(xs),
    "sum": lambda xs, k: [sum(xs)],
    "len": lambda xs, k: [len(xs)],
    "max": lambda xs, k: sorted(xs)[-1:],
    "min": lambda xs, k: sorted(xs)[:1],
    "map +": lambda xs, k: [k + x for x in xs],
    "map -": lambda xs, k: [x - k for x in xs],
    "map *": lambda xs, k: [k * x for x in xs],
    "keep >": lambda xs, k: list(filter(k.__lt__, xs)),
    "keep <": lambda xs, k: list(filter(k.__gt__, xs)),
    "take": lambda xs, k: [x for i, x in enumerate(xs) if i < k],
    "drop": lambda xs, k: [x for i, x in enumerate(xs) if i >= k],
    "keep even": lambda xs, k: [x for x in xs if not x & 1],
    "keep odd": lambda xs, k: [x for x in xs if x & 1],
}
lists = st.lists(st.integers(-50, 50), max_size=8)
steps = st.sampled_from(sorted(ORACLE)).flatmap(
    lambda name: st.tuples(st.just(name), st.integers(0, 9) if name in code._COUNTED else st.none())
)


@given(st.lists(steps, min_size=1, max_size=4), lists)
def test_a_program_does_what_its_operations_say(program: list, xs: list[int]) -> None:
    text = " | ".join(name if k is None else f"{name} {k}" for name, k in program)
    parsed = code.parse(text)
    assert " | ".join(map(str, parsed)) == text
    assert code.parse(text.replace(" ", "") if " even" not in text and " odd" not in text else text) is not None
    for name, k in program:
        expected = ORACLE[name](xs, k)
        xs = code.run(code.parse(name if k is None else f"{name} {k}"), xs)
        assert xs == expected


@pytest.mark.parametrize(
    "text",
    ["", "|", "sort |", "| sort", "sort sort", "map 3", "map + x", "map / 2", "take -1", "keep", "keep > ", "take ٣"]
    + [
        "sort | sort | sort | sort | sort",
        "map + " + "9" * 5000,
        "take " + "0" * 5000 + "1",
        "sort;",
        "import os",
        "sort\x00",
        "1 " * 70,
    ],
)
def test_what_is_no_program_is_a_failed_answer(text: str) -> None:
    with pytest.raises(code.CodeError):
        code.parse(text)
    problem = problems(["code"], "test", 1, 0)[0]
    assert not verify(problem, f"The answer is {text}.")


def test_values_beyond_the_bounds_fail() -> None:
    program = code.parse(" | ".join(["map * 999"] * 3))
    with pytest.raises(code.CodeError, match="map"):
        code.run(program, [9])
    assert code.run(code.parse("take 5 | map * 1000000"), [1, -1]) == [10**6, -(10**6)]


def test_an_equivalent_program_counts_and_one_that_fits_the_examples_alone_does_not() -> None:
    entry = {"answer": "map + 2", "metadata": {"shown": [[1]] * 3, "hidden": [[1, 2], [5]]}}
    assert code.FAMILY.score("map + 1 | map + 1", entry) == 1
    assert code.FAMILY.score(" map+2", entry) == 1
    assert code.FAMILY.score("map * 3", entry) == 0  # the same of [1]
    assert code.FAMILY.score(None, entry) == 0


def test_what_does_not_parse_is_malformed_and_what_is_wrong_is_not() -> None:
    (problem,) = problems({"code": {}}, "test", 1, 0)
    for text in ("The answer is sort.", "So the answer is take 3 | sum", f"The answer is {problem.answer}."):
        assert not malformed(problem, text)
    for text in (
        "",
        "sort",
        "The answer is .",
        "The answer is sort sort.",
        "The answer is map + x.",
        "The answer is 3",
    ):
        assert malformed(problem, text) and not verify(problem, text)


@pytest.mark.parametrize("most", [1, 4])
def test_problems_show_what_every_step_does(most: int) -> None:
    rng = random.Random(0)
    for problem in problems({"code": {"max_operations": most}}, "train", 200, 3):
        program, meta = code.parse(problem.answer), problem.entry["metadata"]
        assert 1 <= len(program) == meta["operations"] <= most and len(meta["hidden"]) == code.HIDDEN
        for xs in meta["shown"]:
            assert f"{code.written(xs)} to {code.written(code.run(program, xs))}" in problem.question
            assert code.run(program, xs)
        for i, step in enumerate(program):
            assert any(step(code.run(program[:i], xs)) != code.run(program[:i], xs) for xs in meta["shown"])
        text = write_trace(problem, rng)
        assert text is not None and verify(problem, text) and code.written(code.run(program, meta["shown"][0])) in text


@pytest.mark.parametrize(
    "options", [{"max_operations": 5}, {"min_operations": 0}, {"min_operations": 3, "max_operations": 2}, {"depth": 1}]
)
def test_options_of_the_generator_are_checked(options: dict) -> None:
    with pytest.raises(ReqatError, match=next(iter(options))):
        problems({"code": options}, "test", 1, 0)
