"""Families: splits that cannot overlap, traces that the generator's own verifier accepts."""

from __future__ import annotations

import random
import re

import pytest

from reqat.tasks import FAMILIES, get_family, problems, verify, write_trace
from reqat.tasks.family import split_of, stream

SMALL = tuple(f for f in FAMILIES if f not in ("gsm_symbolic", "facts"))
ARITHMETIC = tuple(f for f in SMALL if f != "code")


@pytest.mark.parametrize("family", SMALL)
def test_no_problem_is_in_two_splits_whatever_the_seed(family: str) -> None:
    fam = get_family(family)
    keys: dict[str, set[str]] = {}
    for split in ("train", "validation", "test"):
        found = [p for seed in (1, 2) for p in problems([family], split, 60, seed)]
        assert all(split_of(fam, p.question) == split for p in found)
        keys[split] = {fam.canonical(p.question) for p in found}
    assert (
        not keys["train"] & keys["test"]
        and not keys["train"] & keys["validation"]
        and not keys["validation"] & keys["test"]
    )


def test_equations_that_differ_in_letter_or_wording_share_a_split() -> None:
    fam = get_family("simple_equations")
    a, b = "Solve for e: 5 - 8*e = -51", "Find the value of q in the equation: 5 - 8*q = -51"
    assert fam.canonical(a) == fam.canonical(b)
    assert split_of(fam, a) == split_of(fam, b)


@pytest.mark.parametrize("family", ARITHMETIC)
def test_every_equality_in_a_trace_is_true_and_the_verifier_accepts_it(family: str) -> None:
    """Oracle: Python's own arithmetic on each ``a op b = c`` of the text, and reasoning-gym's verifier."""
    rng = random.Random(0)
    pattern = re.compile(r"(-?\d+) ([-+*/]) (-?\d+) (?:=|gives|makes|is) (-?\d+)")
    seen = 0
    for problem in problems([family], "train", 150, 5):
        text = write_trace(problem, rng)
        assert text is not None and verify(problem, text)
        for a, op, b, c in pattern.findall(text):
            seen += 1
            exact = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": int(a) / (int(b) or 1)}[op]
            assert exact == int(c), text
    assert seen > 150


@pytest.mark.parametrize("family", ARITHMETIC)
def test_a_wrong_answer_is_refused(family: str) -> None:
    problem = problems([family], "test", 1, 3)[0]
    assert verify(problem, f"The answer is {problem.answer}.")
    assert not verify(problem, f"The answer is {int(problem.answer) + 1}.")
    assert not verify(problem, "I do not know.")
    assert not verify(problem, "The answer is")


def test_the_last_stated_answer_counts() -> None:
    problem = problems(["chain_sum"], "test", 1, 3)[0]
    assert verify(problem, f"The answer is 123456. No, the answer is {problem.answer}.")


def test_wording_varies_and_is_a_function_of_the_seed() -> None:
    problem = problems(["chain_sum"], "train", 1, 0)[0]
    texts = {write_trace(problem, random.Random(s)) for s in range(20)}
    assert len(texts) > 10
    assert write_trace(problem, random.Random(7)) == write_trace(problem, random.Random(7))


def test_gsm_symbolic_drops_traces_that_do_not_reach_the_answer() -> None:
    problem = problems(["gsm_symbolic"], "train", 1, 0)[0]
    text = write_trace(problem, random.Random(0))
    assert text is not None and verify(problem, text)
    broken = {**problem.entry, "metadata": {**problem.entry["metadata"], "answer_cot": "So that makes 999999 in all."}}
    from dataclasses import replace

    assert write_trace(replace(problem, entry=broken), random.Random(0)) is None


def test_streams_of_different_seeds_differ_and_of_one_seed_agree() -> None:
    def first(seed: int) -> list[str]:
        it = stream("chain_sum", "train", seed)
        return [next(it).id for _ in range(20)]

    assert first(1) == first(1)
    assert not set(first(1)) & set(first(2))


def test_errors_name_the_value_and_the_remedy() -> None:
    with pytest.raises(ValueError, match="chain_sum"):
        get_family("chain_sums")
    with pytest.raises(ValueError, match="unknown split 'tset'"):
        next(stream("chain_sum", "tset", 0))
    with pytest.raises(ValueError, match="min_termz"):
        problems({"chain_sum": {"min_termz": 3}}, "train", 1, 0)
    with pytest.raises(ValueError, match="n >= 1"):
        problems(["chain_sum"], "train", 0, 0)
    with pytest.raises(ValueError, match="has only"):
        problems({"simple_equations": {"max_value": 1}}, "test", 500, 0)
