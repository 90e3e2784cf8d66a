"""GSM8K-like word problems from templates, with the generator's own chains of thought.

For models that can read: SmolLM2 and larger. A few of the generator's chains do not reach its own answer (rounding of
money); those are left out, because a trace counts only where the verifier accepts it.
"""

from __future__ import annotations

import random
import re

from reqat.tasks.family import Family, Problem

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


class GsmSymbolic(Family):
    """The generator's defaults."""

    name = "gsm_symbolic"

    def prompt(self, problem: Problem) -> str:
        """The question as generated."""
        return f"{problem.question.strip()}\n"

    def trace(self, problem: Problem, rng: random.Random) -> str:
        """The generator's chain of thought, closed by ``The answer is N.`` when its last number is the answer."""
        cot = problem.entry["metadata"]["answer_cot"].strip()
        body = re.sub(r"\n?####.*", "", cot).strip()
        numbers = _NUMBER.findall(cot)
        last = numbers[-1].replace(",", "").rstrip(".") if numbers else "none"
        return f"{body}\nThe answer is {last}."

    def extract(self, response: str) -> str | None:
        """The first number after the last ``answer is``; where nothing is announced, the response's last number."""
        _, mark, tail = response.rpartition("answer is")
        found = _NUMBER.findall(tail)
        number = (found[0] if mark else found[-1]) if found else None
        return number.replace(",", "") if number else None


FAMILY = GsmSymbolic()
