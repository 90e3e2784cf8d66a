"""Sums and differences of several numbers, worked from left to right with a running total."""

from __future__ import annotations

import random
import re

from reqat.tasks.family import Family, Problem

_OPEN = ("", "", "Let us go step by step. ", "Work from left to right. ", "We add up one term at a time. ")
_FIRST = ("First,", "Start with", "To begin,", "We have")
_NEXT = ("Then", "Next,", "Now", "After that,", "So")
_EQUALS = ("=", "=", "gives", "makes", "is")
_REMARK = ("", "", "", " The running total is {r}.", " That leaves {r}.", " We are at {r} now.")
_CLOSE = (
    "The answer is {r}.",
    "So the answer is {r}.",
    "Therefore, the answer is {r}.",
    "All in all, the answer is {r}.",
)


class ChainSum(Family):
    """Chains of five to nine one-digit terms by default: easy steps, many of them, so that small errors add up."""

    name = "chain_sum"
    defaults = {"min_terms": 5, "max_terms": 9, "min_digits": 1, "max_digits": 1}

    def prompt(self, problem: Problem) -> str:
        """The bare expression; the generator's constant preamble is dropped, since a tiny model learns nothing from
        it.
        """
        return f"{problem.entry['metadata']['expression']} =\n"

    def trace(self, problem: Problem, rng: random.Random) -> str:
        """One line a term: ``Then 17 - 73 = -56.``"""
        terms = re.findall(r"([+-])?\s*(\d+)", problem.entry["metadata"]["expression"])
        total = int(terms[0][1])
        parts = [rng.choice(_OPEN)]
        for i, (op, digits) in enumerate(terms[1:]):
            value = int(digits)
            result = total + value if op == "+" else total - value
            lead = rng.choice(_FIRST if i == 0 else _NEXT)
            parts.append(
                f"{lead} {total} {op} {value} {rng.choice(_EQUALS)} {result}.{rng.choice(_REMARK).format(r=result)} "
            )
            total = result
        parts.append(rng.choice(_CLOSE).format(r=total))
        return "".join(parts)


FAMILY = ChainSum()
