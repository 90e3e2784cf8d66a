"""What first went wrong in the text of a response: the steps of its arithmetic against those of a verified solution.

Everything here reads text alone; :mod:`analysis.entropy.wrong_responses` applies it to trace folders.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

ERRORS = ("wrong digit", "wrong operator", "dropped step", "loop", "no answer", "other")
_NUMBER = r"-?\d+(?:\.\d+)?"
_STEP = re.compile(
    rf"(?<![\w.])(?P<left>{_NUMBER}) ?(?P<op>[-+*/\u00d7\u00f7]) ?(?P<right>{_NUMBER}) ?"
    rf"(?:=|equals|gives|makes|is) ?(?P<result>{_NUMBER})"
    r"|(?:\b(?:A|Each) (?P<who>[a-z][a-z ]*?) has (?P<many>\d+) legs)"
    r"|(?:\bThere are (?P<legs>\d+) legs on an? (?P<whose>[a-z][a-z ]*?),)"
)
_BEFORE = re.compile(r"[-+*/\u00d7\u00f7]\s*$")
_ANSWER = re.compile(rf"answer is:? *\$?(?P<a>{_NUMBER})|\\boxed\{{(?P<b>[^{{}}]*)\}}")
# How far ahead a step may be for the ones between to count as dropped.
_DROPPED_AT_MOST = 3
# A loop is a tail that repeats itself three times, with a period up to this many characters.
_PERIOD_CHARS = 400


@dataclass(frozen=True)
class Step:
    """One step of a chain of thought, ``left op right = result``, or a number looked up (``op`` is ``has``); ``start``
    and ``at`` are positions in the text, of the step and of its four pieces.
    """

    pieces: tuple[str, str, str, str]
    start: int
    at: tuple[int, int, int, int]

    @property
    def holds(self) -> bool:
        """Whether the arithmetic is right, to the decimals that are shown."""
        left, op, right, result = self.pieces
        if op == "has":
            return True
        a, b, shown = Fraction(left), Fraction(right), Fraction(result)
        if op in "/\u00f7":
            if b == 0:
                return False
            exact = a / b
        else:
            exact = a + b if op == "+" else a - b if op == "-" else a * b
        decimals = len(result.partition(".")[2])
        return abs(exact - shown) <= (Fraction(1, 2 * 10**decimals) if decimals else 0)


def steps(text: str) -> list[Step]:
    """The steps in ``text``: every ``a op b = c`` (also ``gives``, ``makes``, ``is``) and every count of legs.

    Longer sums (``1 + 2 + 3 = 6``) are no steps: what they hold is not checked.
    """
    found = []
    for match in _STEP.finditer(text):
        if match["op"] is None:
            who, many = ("who", "many") if match["who"] else ("whose", "legs")
            at = (match.start(who), match.start(), match.start(), match.start(many))
            found.append(Step((match[who], "has", "", match[many]), match.start(), at))
        elif not _BEFORE.search(text, max(0, match.start() - 4), match.start()):
            pieces = (match["left"], match["op"], match["right"], match["result"])
            at = (match.start("left"), match.start("op"), match.start("right"), match.start("result"))
            found.append(Step(pieces, match.start(), at))
    return found


def solution_steps(family: str, prompt: str) -> list[Step] | None:
    """The steps of the verified solution, rebuilt from the prompt by the family's own writer of traces.

    None for families whose solution does not follow from the prompt's text.
    """
    import random

    from reqat.tasks import Problem, get_family

    metadata: dict[str, Any]
    if family == "chain_sum":
        metadata = {"expression": prompt.strip().removesuffix("=").strip()}
    elif family == "leg_counting":
        counts = re.findall(r"(\d+) ([a-z][a-z ]*?)s(?=[,?])", prompt)
        metadata = {"animals": {animal: int(n) for n, animal in counts}}
    elif family == "simple_equations":
        variable, _, equation = prompt.strip().removeprefix("Solve for ").partition(":")
        metadata = {"variable": variable.strip(), "equation": equation.strip()}
    else:
        return None
    problem = Problem("", family, prompt, "", {"metadata": metadata})
    try:
        return steps(get_family(family).trace(problem, random.Random(0)))
    except (IndexError, KeyError, ValueError):
        return None  # not the wording that this version of the family writes


@dataclass(frozen=True)
class Derailment:
    """The first thing that went wrong in a response: one of `ERRORS`, and where in the text it is."""

    kind: str
    at: int


def first_error(
    response: str, expected: Sequence[Step] | None, *, answer: str = "", finished: bool = True
) -> Derailment:
    """What first went wrong in a response that does not reach the answer.

    Args:
        response: its text.
        expected: the steps of a verified solution; without them only the arithmetic of each step is checked.
        answer: the expected answer, to tell a wrong last line from a right one.
        finished: whether the response has its end marker; a loop is looked for in those that have none.

    A step that is done again is a ``loop``, and so is a text that repeats itself to its end; steps left out before the
    one at hand, or at the end, are a ``dropped step``; a wrong sign counts as a ``wrong operator``; any other
    deviation of a number is a ``wrong digit``. The first wrong token decides: a step with both another operator and
    another number is a ``wrong operator``.
    """
    found = steps(response)
    done = 0
    for i, step in enumerate(found):
        if expected is not None and done < len(expected) and step.pieces == expected[done].pieces:
            done += 1
            continue
        if expected is None:
            if not step.holds:
                return Derailment("wrong digit", step.at[3])
            if i >= 2 and step.pieces == found[i - 1].pieces == found[i - 2].pieces:
                return Derailment("loop", found[i - 1].start)
            continue
        if any(step.pieces == earlier.pieces for earlier in found[:i]):
            return Derailment("loop", step.start)
        if done == len(expected):
            again = bool(expected) and step.pieces[1:3] == expected[-1].pieces[1:3]
            return Derailment("loop" if again else "other", step.start)
        return _deviation(step, found[i + 1] if i + 1 < len(found) else None, expected, done)
    end = found[-1].at[3] + len(found[-1].pieces[3]) if found else 0
    if not finished:
        start = _loop_start(response)
        if start is not None:
            return Derailment("loop", start)
    last = None
    for last in _ANSWER.finditer(response):  # noqa: B007  (the last one is wanted)
        pass
    if expected is not None and done < len(expected) and (finished or last is not None):
        return Derailment("dropped step", min(end, len(response)))
    if last is None:
        return Derailment("no answer", len(response))
    name = "a" if last["a"] is not None else "b"
    if answer and last[name].strip() != answer.strip():
        return _number_error(last[name], last.start(name), answer.strip())
    return Derailment("other", last.start(name))


def _deviation(step: Step, following: Step | None, expected: Sequence[Step], done: int) -> Derailment:
    """How a step differs from the one that should stand there."""
    left, op, right, result = step.pieces
    want = expected[done]
    if (op, right) != want.pieces[1:3] and op != "has" and done:
        again = (op, right) == expected[done - 1].pieces[1:3] and left == want.pieces[0]
        if again and following is not None and following.pieces[1:3] == want.pieces[1:3]:
            return Derailment("loop", step.at[1] if op != want.pieces[1] else step.at[2])
    if (op, right) != want.pieces[1:3] or op == "has":
        for ahead in range(done + 1, min(done + 1 + _DROPPED_AT_MOST, len(expected))):
            later = expected[ahead]
            same = left == later.pieces[0] if op == "has" else left in (want.pieces[0], later.pieces[0])
            if (op, right) != later.pieces[1:3] or not same:
                continue
            # One wrong digit can make a step look like a later one: the step after it tells which it was.
            after = expected[ahead + 1].pieces[1:3] if ahead + 1 < len(expected) else None
            if following is None or after is None or following.pieces[1:3] == after:
                first = 0 if op == "has" else 1 if op != want.pieces[1] else 2
                return Derailment("dropped step", step.at[first])
    if op != want.pieces[1] and "has" in (op, want.pieces[1]):
        return Derailment("dropped step", step.start)
    if left != want.pieces[0]:
        return _number_error(left, step.at[0], want.pieces[0])
    if op != want.pieces[1]:
        return Derailment("wrong operator", step.at[1])
    if right != want.pieces[2]:
        return _number_error(right, step.at[2], want.pieces[2])
    return _number_error(result, step.at[3], want.pieces[3])


def _number_error(found: str, at: int, wanted: str) -> Derailment:
    """A wrong number: of sign, or from its first wrong digit on."""
    same = 0
    while same < min(len(found), len(wanted)) and found[same] == wanted[same]:
        same += 1
    if found.startswith("-") != wanted.startswith("-"):
        return Derailment("wrong operator", at)
    return Derailment("wrong digit", at + min(same, max(len(found) - 1, 0)))


def _loop_start(text: str) -> int | None:
    """Where a text that ends in three or more repetitions begins to repeat itself; None if it does not."""
    for period in range(2, min(_PERIOD_CHARS, len(text) // 3) + 1):
        tail = text[-period:]
        if tail.strip() and tail == text[-2 * period : -period] == text[-3 * period : -2 * period]:
            start = len(text) - period
            while start > 0 and text[start - 1] == text[start - 1 + period]:
                start -= 1
            return start + period
    return None
