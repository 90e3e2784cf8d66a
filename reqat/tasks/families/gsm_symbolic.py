"""GSM8K-like word problems from templates, with the generator's own chains of thought.

For models that can read: SmolLM2 and larger. A few of the generator's chains do not reach its own answer (rounding of
money); those are left out, because a trace counts only where the verifier accepts it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Any

from reqat.tasks.answers import announced, same_answer
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
        """The whole announced answer, or the response's last expression (:mod:`reqat.tasks.answers`)."""
        return announced(response)

    def score(self, answer: str | None, entry: Mapping[str, Any]) -> float:
        """1 if the answer is the generator's, by the one grader of free text; else 0."""
        return float(answer is not None and same_answer(answer, str(entry["answer"])))


FAMILY = GsmSymbolic()
