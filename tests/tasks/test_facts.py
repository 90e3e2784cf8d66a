"""Facts: closed tables whose every fact is asked in training in other words, and chosen among four options."""

from __future__ import annotations

import random
import re

import pytest

from reqat.config.errors import ReqatError
from reqat.tasks import options_of, problems, verify, write_trace
from reqat.tasks.families import facts


def fact(question: str) -> tuple[str, str]:
    """Country and attribute that a question is about."""
    names = set(facts.names()[: facts._MOST])
    found = [word for word in re.findall(r"[A-Za-z]+", question) if word in names]
    assert len(found) == 1, question
    return found[0], next(a for a in facts.ATTRIBUTES if a in question)


def test_names_are_distinct() -> None:
    names = facts.names()
    assert len(set(names)) == len(names) == 400 * 5
    assert all(re.fullmatch(r"[A-Z][a-z]+", name) for name in names)


def test_a_fact_has_one_answer_and_is_asked_in_training_in_other_words() -> None:
    by_split = {split: problems(["facts"], split, n, 1) for split, n in (("train", 1500), ("test", 150))}
    known: dict[tuple[str, str], set[str]] = {}
    for problem in (p for found in by_split.values() for p in found):
        known.setdefault(fact(problem.question), set()).add(problem.answer)
    assert all(len(answers) == 1 for answers in known.values())
    asked = {split: {p.question for p in found} for split, found in by_split.items()}
    assert not asked["train"] & asked["test"]
    learnt = {fact(question) for question in asked["train"]}
    assert all(fact(question) in learnt for question in asked["test"])


def test_options_are_four_different_answers_with_one_right_in_no_fixed_place() -> None:
    places = set()
    for problem in problems({"facts": {"countries": 12}}, "test", 30, 0):
        options = options_of(problem)
        right = [verify(problem, option) for option in options]
        assert len(set(options)) == 4 and right.count(True) == 1 and options == options_of(problem)
        assert write_trace(problem, random.Random(0)) == options[right.index(True)]
        places.add(right.index(True))
    assert places == {0, 1, 2, 3}
    assert options_of(problems(["chain_sum"], "test", 1, 0)[0]) == ()


@pytest.mark.parametrize("options", [{"countries": 3}, {"countries": 401}, {"countries": 5.0}, {"country": 5}])
def test_options_of_the_generator_are_checked(options: dict) -> None:
    with pytest.raises(ReqatError, match=str(next(iter(options.values())))):
        problems({"facts": options}, "test", 1, 0)
