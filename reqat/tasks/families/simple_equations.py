"""Linear equations in one unknown: move the constant, then divide."""

from __future__ import annotations

import random
import re

from reqat.tasks.family import Family, Problem

_OPEN = ("", "", "Let us solve for {v}. ", "We want {v} alone. ")
_MOVE = ("Move {b} to the right:", "Take {b} away from both sides:", "First, move {b} over:")
_DIVIDE = ("Divide by {a}:", "Now divide both sides by {a}:", "Then divide by {a}:")
_CLOSE = ("The answer is {x}.", "So the answer is {x}.", "Therefore, the answer is {x}.", "Hence, the answer is {x}.")


class SimpleEquations(Family):
    """Two terms with values up to twelve by default."""

    name = "simple_equations"
    defaults = {"min_terms": 2, "max_terms": 2, "max_value": 12}

    def canonical(self, question: str) -> str:
        """The equation with its unknown renamed: the letter and the wording do not make another problem."""
        return re.sub(r"[a-z]", "x", question.split(":")[-1]).replace(" ", "")

    def prompt(self, problem: Problem) -> str:
        """``Solve for h: 8*h + 2 = 18``"""
        meta = problem.entry["metadata"]
        return f"Solve for {meta['variable']}: {meta['equation']}\n"

    def trace(self, problem: Problem, rng: random.Random) -> str:
        """``Move 2 to the right: 8*h = 18 - 2 = 16. Divide by 8: h = 16 / 8 = 2.``"""
        meta = problem.entry["metadata"]
        v = meta["variable"]
        a, b, c = _linear(meta["equation"], v)
        parts = [rng.choice(_OPEN).format(v=v)]
        left = v if a == 1 else f"{a}*{v}"
        rest = c - b
        if b:
            sign = "-" if b > 0 else "+"
            parts.append(f"{rng.choice(_MOVE).format(b=b)} {left} = {c} {sign} {abs(b)} = {rest}. ")
        x = rest // a
        if a != 1:
            parts.append(f"{rng.choice(_DIVIDE).format(a=a)} {v} = {rest} / {a} = {x}. ")
        parts.append(rng.choice(_CLOSE).format(x=x))
        return "".join(parts)


def _linear(equation: str, v: str) -> tuple[int, int, int]:
    """Coefficients of ``a*v + b = c``; the generator keeps every term in ``v`` or constant and on the left."""
    left, _, right = equation.partition("=")
    a = b = 0
    for sign, body in re.findall(r"([+-]?)\s*([^\s+-]+)", left):
        factor = -1 if sign == "-" else 1
        if v in body:
            digits = body.replace("*", "").replace(v, "")
            a += factor * int(digits or 1)
        else:
            b += factor * int(body)
    return a, b, int(right)


FAMILY = SimpleEquations()
