"""Word problems: how many legs have 3 cats, 2 spiders and 5 ducks? A lookup and a product for each animal, then a
running sum.
"""

from __future__ import annotations

import random

from reqat.tasks.family import Family, Problem

_OPEN = ("", "", "Let us count the legs. ", "One kind at a time. ", "We take each animal in turn. ")
_EACH = ("A {a} has {l} legs,", "Each {a} has {l} legs,", "There are {l} legs on a {a},")
_SO = (" so {n} * {l} = {p}.", " so that makes {n} * {l} = {p}.", " and {n} * {l} = {p}.")
_SUM = ("Together {t} + {p} = {r}.", "Now {t} + {p} = {r}.", "Add them: {t} + {p} = {r}.", "So far {t} + {p} = {r}.")
_CLOSE = (
    "The answer is {r}.",
    "So the answer is {r}.",
    "In total, the answer is {r}.",
    "Therefore, the answer is {r}.",
)


class LegCounting(Family):
    """Two to four kinds of animals, up to nine of each, by default."""

    name = "leg_counting"
    defaults = {"min_animals": 2, "max_animals": 4, "max_instances": 9}

    def prompt(self, problem: Problem) -> str:
        """The list of animals as a question; the generator's constant preamble is dropped."""
        animals = ", ".join(f"{n} {a}s" for a, n in problem.entry["metadata"]["animals"].items())
        return f"How many legs have {animals}?\n"

    def trace(self, problem: Problem, rng: random.Random) -> str:
        """Product and running sum an animal: ``A cat has 4 legs, so 3 * 4 = 12.``"""
        from reasoning_gym.arithmetic.leg_counting import ANIMALS

        parts = [rng.choice(_OPEN)]
        total = 0
        for i, (animal, count) in enumerate(problem.entry["metadata"]["animals"].items()):
            legs = ANIMALS[animal]
            product = legs * count
            words = {"a": animal, "l": legs, "n": count, "p": product}
            parts.append(rng.choice(_EACH).format(**words) + rng.choice(_SO).format(**words) + " ")
            if i:
                parts.append(rng.choice(_SUM).format(t=total, p=product, r=total + product) + " ")
            total += product
        parts.append(rng.choice(_CLOSE).format(r=total))
        return "".join(parts)


FAMILY = LegCounting()
