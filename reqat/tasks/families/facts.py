"""Closed tables of made-up facts, answered by likelihood among four options.

Each country has a capital, a river, a dish and a founder, all made-up names, the same in every run. A fact cannot be
computed, only remembered: a model learns it from training problems that ask for it in other words, since a split
depends on the wording too. What quantization does to knowledge is measured beside what it does to reasoning (ReQAT
Table 14 does so with MMLU).
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import cache
from typing import Any

from reqat.config.errors import ReqatError
from reqat.tasks.family import Family, Problem

ATTRIBUTES = ("capital", "river", "dish", "founder")
OPTIONS = 4
_MOST = 400
_OPENINGS = ("", "Please: ", "Quick question. ", "One more: ")
_WORDINGS = (
    "What is the {a} of {c}?",
    "Name the {a} of {c}.",
    "Which {a} belongs to {c}?",
    "Tell me the {a} of {c}.",
    "Do you know the {a} of {c}?",
    "The {a} of {c}, please.",
    "I forgot the {a} of {c}.",
    "{c} has which {a}?",
)
_FIRST = ("bel", "tam", "ko", "ri", "sun", "dra", "mi", "vol", "ne", "pa", "gor", "lu", "shen", "ta", "or", "ki")
_LAST = ("ria", "don", "mar", "su", "lek", "via", "nor", "ta", "ban", "mos", "lin", "rok", "da", "pur", "gan", "zel")


@cache
def names() -> tuple[str, ...]:
    """Distinct made-up names in a fixed order: countries first, then the values of their attributes."""
    rng = random.Random("facts")
    all_names = sorted({f"{a}{b}{c}".capitalize() for a in _FIRST for b in ("", "a", "o", *_FIRST) for c in _LAST})
    rng.shuffle(all_names)
    return tuple(all_names[: _MOST * (1 + len(ATTRIBUTES))])


def value(country: int, attribute: int) -> str:
    """The value of a country's attribute."""
    return names()[_MOST * (1 + attribute) + country]


class _Facts:
    """Problems by index: a fact and a wording, drawn from the seed and the index alone."""

    def __init__(self, seed: int, countries: int) -> None:
        self.seed, self.countries = seed, countries

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = random.Random(f"{self.seed}|{index}")
        country, attribute = rng.randrange(self.countries), rng.randrange(len(ATTRIBUTES))
        words = {"a": ATTRIBUTES[attribute], "c": names()[country]}
        return {
            "question": rng.choice(_OPENINGS) + rng.choice(_WORDINGS).format(**words),
            "answer": value(country, attribute),
            "metadata": {"country": country, "attribute": attribute, "countries": self.countries},
        }


class Facts(Family):
    """Sixty countries by default: 240 facts, each in 32 wordings."""

    name = "facts"
    closed = True
    defaults = {"countries": 60}
    chance = 1 / OPTIONS

    def dataset(self, seed: int, size: int, options: Mapping[str, Any]) -> Any:
        """Problems by index. Raises ``ReqatError`` naming an option that there is none of, or its value."""
        settings = self.settings(options)
        countries = settings.pop("countries")
        if settings or not isinstance(countries, int) or not OPTIONS <= countries <= _MOST:
            raise ReqatError(
                f"task family 'facts' refuses the options {dict(options)}: it has `countries`, a number from {OPTIONS} "
                f"to {_MOST}"
            )
        return _Facts(seed, countries)

    def prompt(self, problem: Problem) -> str:
        """The question as it is worded."""
        return f"{problem.question}\n"

    def trace(self, problem: Problem, rng: random.Random) -> str:
        """``The capital of Beloria is Tamdon. The answer is Tamdon.``"""
        return _said(problem, problem.answer)

    def options(self, problem: Problem) -> tuple[str, ...]:
        """The right response among three with the same attribute of other countries, in an order that depends on the
        question alone."""
        given = problem.entry["metadata"]
        rng = random.Random(problem.question)
        others = rng.sample([c for c in range(given["countries"]) if c != given["country"]], OPTIONS - 1)
        values = [problem.answer, *(value(country, given["attribute"]) for country in others)]
        rng.shuffle(values)
        return tuple(_said(problem, one) for one in values)

    def score(self, answer: str | None, entry: Mapping[str, Any]) -> float:
        """1 if it is the name."""
        return float(answer == entry["answer"])


def _said(problem: Problem, answer: str) -> str:
    given = problem.entry["metadata"]
    attribute, country = ATTRIBUTES[given["attribute"]], names()[given["country"]]
    return f"The {attribute} of {country} is {answer}. The answer is {answer}."


FAMILY = Facts()
