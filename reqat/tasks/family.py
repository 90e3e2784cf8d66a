"""What a task family is, and the functions that hold for every family."""

from __future__ import annotations

import hashlib
import importlib
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from reqat.config.catalogue import TASK_FAMILIES
from reqat.config.errors import ReqatError, unknown

SPLITS = ("train", "validation", "test")
# Shares of the hash space: 85% train, 5% validation, 10% test.
_BUCKETS = 100
_TEST_BELOW = 10
_VALIDATION_BELOW = 15
# reasoning-gym seeds item i with seed + i, so neighbouring seeds would share items; a stride wider than any run keeps
# streams apart.
_SEED_STRIDE = 100_000_007
# A finite family may not hold as many distinct problems as are asked for; give up after this many draws without a new
# one.
_MAX_STALE_DRAWS = 20_000


@dataclass(frozen=True)
class Problem:
    """One problem: ``question`` as the generator worded it, ``answer`` as its verifier expects it, ``entry`` the
    generator's own record.
    """

    id: str
    family: str
    question: str
    answer: str
    entry: Mapping[str, Any] = field(repr=False, compare=False, hash=False)

    @property
    def prompt(self) -> str:
        """The text a model is given; ends with a newline, after which the response begins."""
        return get_family(self.family).prompt(self)


class Family(ABC):
    """A generator with a verifier and a writer of traces. Subclasses live one a file of `reqat.tasks.families`, named
    as in reasoning-gym where the generator is from there; the file defines ``FAMILY``."""

    name: str
    defaults: Mapping[str, Any] = {}
    closed: bool = False
    """Whether its problems are a closed table, which training goes through again and again."""
    chance: float = 0.0
    """Share of problems that guessing among the options gets right."""

    @abstractmethod
    def prompt(self, problem: Problem) -> str:
        """The prompt text of ``problem``, ending with a newline."""

    @abstractmethod
    def trace(self, problem: Problem, rng: random.Random) -> str:
        """A correct chain of thought that ends with the answer; ``rng`` picks the wording."""

    def canonical(self, question: str) -> str:
        """The key that decides the split: two wordings of one problem must share it."""
        return " ".join(question.split())

    def options(self, problem: Problem) -> tuple[str, ...]:
        """Responses among which a model chooses by likelihood, one of them right; none (the default): it generates."""
        return ()

    def extract(self, response: str) -> str | None:
        """The final answer in a response, or None where there is none."""
        _, mark, tail = response.rpartition("answer is")
        return tail.strip().rstrip(".").strip() if mark else None

    def readable(self, answer: str) -> bool:
        """Whether an answer has the form that the verifier reads, right or wrong."""
        return True

    def settings(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """What the generator gets: the family's own settings, and ``options`` in place of those that they name."""
        return {**self.defaults, **options}

    def dataset(self, seed: int, size: int, options: Mapping[str, Any]) -> Any:
        """The problems of the family by index: by default the data set of reasoning-gym of its name.

        Raises ``ReqatError`` naming the option where reasoning-gym refuses one.
        """
        import reasoning_gym

        settings = self.settings(options)
        try:
            return reasoning_gym.create_dataset(self.name, seed=seed, size=size, **settings)
        except (TypeError, AssertionError, ValueError) as e:
            raise ReqatError(f"task family {self.name!r} refuses the options {settings}: {e}") from e

    def score(self, answer: str | None, entry: Mapping[str, Any]) -> float:
        """The verifier's score of an extracted answer, 0 to 1."""
        return float(self._scorer().score_answer(answer, entry))

    def _scorer(self) -> Any:
        return _scorer(self.name)


@cache
def _scorer(name: str) -> Any:
    return get_family(name).dataset(seed=0, size=1, options={})


FAMILIES = TASK_FAMILIES


@cache
def get_family(name: str) -> Family:
    """The family called ``name``.

    Raises ``ReqatError`` naming the closest family where there is none of that name.
    """
    if name not in FAMILIES:
        raise unknown("task family", name, FAMILIES)
    return importlib.import_module(f"reqat.tasks.families.{name}").FAMILY


def split_of(family: Family, question: str) -> str:
    """The split a question belongs to, from a hash of its canonical form alone."""
    key = f"{family.name}|{family.canonical(question)}".encode()
    bucket = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") % _BUCKETS
    if bucket < _TEST_BELOW:
        return "test"
    return "validation" if bucket < _VALIDATION_BELOW else "train"


def stream(family: str, split: str, seed: int, options: Mapping[str, Any] | None = None) -> Iterator[Problem]:
    """Distinct problems of one family and split, without end where the family allows it.

    Raises ``ReqatError`` for an unknown family, split or generator option.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    fam = get_family(family)
    data = fam.dataset(seed=seed * _SEED_STRIDE, size=_SEED_STRIDE, options=options or {})
    seen: set[str] = set()
    stale = 0
    for index in range(_SEED_STRIDE):
        if stale > _MAX_STALE_DRAWS:
            return
        stale += 1
        entry = data[index]
        question = entry["question"]
        if split_of(fam, question) != split:
            continue
        digest = hashlib.blake2b(f"{family}|{question}".encode(), digest_size=8).hexdigest()
        if digest in seen:
            continue
        seen.add(digest)
        stale = 0
        yield Problem(f"{family}-{digest}", family, question, str(entry["answer"]), entry)


def problems(families: Sequence[str] | Mapping[str, Mapping[str, Any]], split: str, n: int, seed: int) -> list[Problem]:
    """``n`` distinct problems in equal shares of the families, interleaved; the first families get the remainder.

    Raises ``ReqatError`` where a family holds fewer distinct problems than its share, naming how many it has.
    """
    options = families if isinstance(families, Mapping) else {f: {} for f in families}
    if n < 1 or not options:
        raise ReqatError(f"problems() wants n >= 1 and at least one family, got n={n}, families={list(options)}")
    streams = [(name, stream(name, split, seed, opts)) for name, opts in options.items()]
    out: list[Problem] = []
    while len(out) < n:
        for name, it in streams[: n - len(out)]:
            problem = next(it, None)
            if problem is None:
                have = sum(p.family == name for p in out)
                raise ReqatError(
                    f"task family {name!r} has only {have} distinct problems in the {split} split under these options; "
                    f"ask for fewer than {n}"
                )
            out.append(problem)
    return out


def verify(problem: Problem, response: str) -> bool:
    """Whether a response's final answer satisfies the family's own verifier (score 1)."""
    family = get_family(problem.family)
    answer = family.extract(response)
    return answer is not None and family.score(answer, problem.entry) >= 1.0


def malformed(problem: Problem, response: str) -> bool:
    """Whether a response has no answer that its family can read."""
    family = get_family(problem.family)
    answer = family.extract(response)
    return answer is None or not family.readable(answer)


def options_of(problem: Problem) -> tuple[str, ...]:
    """The family's :meth:`Family.options` of a problem."""
    return get_family(problem.family).options(problem)


def write_trace(problem: Problem, rng: random.Random) -> str | None:
    """A verified chain of thought for ``problem``, or None where the family's trace and verifier disagree
    (gsm_symbolic has such).
    """
    text = get_family(problem.family).trace(problem, rng)
    return text if verify(problem, text) else None
