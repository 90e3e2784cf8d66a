r"""Grading of free text: which answer a response announces, and whether it is the right one.

Two steps. :func:`announced` finds the answer that a response commits itself to, whole: the last ``\boxed{...}`` with
all its braces, else what follows the last "answer is", "answer:" or "####", else the last expression in it.
:func:`same_answer` compares that with the reference. Plain numbers (signs, decimals, fractions, thousands separators,
percent, units behind them) are compared exactly, as fractions. Words are compared as words. Everything else is
mathematics and goes through math-verify, which compares with sympy.

A number that is part of a larger expression is not the answer: ``2*5`` is 10, ``x^2 + 1`` is not 1, "5 or 6" is not 5.
"""

from __future__ import annotations

import re
import threading
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

# Seconds that math-verify may spend on parsing and on comparing; a response can hold anything, 9^9^9^9 too.
_TIMEOUT_S = 5
# Longest expression that is given to math-verify, in characters; longer ones are compared as text alone.
_LONGEST_EXPRESSION = 400

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*")
_ANNOUNCED = re.compile(r"(?i:\banswer(?:\s+(?:is|was|equals|would\s+be)\b|\s*[*_]*\s*[:=]))|####")
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")

_MINUS = str.maketrans(dict.fromkeys("\u2212\u2010\u2011\u2012\ufe63\uff0d", "-"))
_SIGNS = str.maketrans(
    {
        "\u00d7": r" \cdot ", "\u00b7": r" \cdot ", "\u22c5": r" \cdot ", "\u00f7": "/", "\u2044": "/", "\u2215": "/",
        "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u2007": " ", "\u03c0": r"\pi ", "\u221e": r"\infty ",
        "\u00b0": " degrees", "\u2019": "'", "\u201c": '"', "\u201d": '"',
    }
)  # fmt: skip
_SUPERSCRIPTS = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b", "0123456789-")
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|operatorname|mbox)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"(?<!\\)\\(?:[,;:! ]|quad\b|qquad\b|displaystyle\b|left\b|right\b|bigl?\b|bigr\b|limits\b)|~")

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(rf"[+-]?\s*(?:{_DIGITS})(?:[eE][+-]?\d+)?")
_LATEX_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{\s*(-?[\d.,]+)\s*\}|(\d))\s*(?:\{\s*(-?[\d.,]+)\s*\}|(\d))")
_PLAIN = re.compile(
    rf"(?P<sign>[+-]?)\s*(?P<currency>[$\u20ac\u00a3\u00a5]?)\s*(?P<second>[+-]?)\s*(?:"
    rf"(?P<whole>\d+)\s+(?P<over>\d+)\s*/\s*(?P<under>\d+)"  # 1 1/2
    rf"|(?P<top>{_DIGITS})\s*/\s*(?P<bottom>{_DIGITS})"  # 3/4
    rf"|(?P<number>(?:{_DIGITS})(?:[eE][+-]?\d+)?)"
    rf")(?![\w.]*[\^!])(?P<rest>.*)",
    re.DOTALL,
)
# A word behind a number that makes another number of it, with what it multiplies by.
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
# Words that say the number before or behind them is a part of something larger.
_OPERATORS = re.compile(
    r"(?i)^\s*(?:plus|minus|times|over|divided|multiplied|squared|cubed|to\s+the|factorial|choose|mod(?:ulo)?|"
    r"and\s+a\s+(?:half|third|quarter)|hal(?:f|ves)|thirds?|quarters?|fourths?|fifths?|sixths?|eighths?|tenths?|"
    r"hundredths?|more\s+than|less\s+than)\b"
)
_NEGATED = re.compile(r"(?i)\b(?:not|n't|isn't|never|cannot|unknown|unclear)\b|n't\b")
# `5 or 6`, `5, 6`, `5 and 1/2`: several numbers where one is asked for.
_MORE = re.compile(r"^\s*(?:,\s*(?:and|or)?|and|or|to|;)\s*[-+$]?\s*(?:\d|\\d?frac)")
# What goes on as mathematics and does not end the number: an operator, a bracket, a power, a letter stuck to it.
_GOES_ON = re.compile(
    r"^\s*(?:[-+*/^=<>!(\[|:]|\\(?:cdot|times|div|pi|sqrt|frac|dfrac|pm|mod|binom|infty)\b)|^[A-Za-z_\\{]"
)
_UNITS = {
    alias: name
    for name, aliases in {
        "mm": "millimeter millimetre", "cm": "centimeter centimetre", "m": "meter metre", "km": "kilometer kilometre",
        "inch": "in", "foot": "feet ft", "yard": "yd", "mile": "mi", "g": "gram gm",
        "kg": "kilogram kilo", "mg": "milligram",
        "pound": "lb", "ounce": "oz", "ton": "tonne", "s": "second sec", "min": "minute", "h": "hour hr", "day": "",
        "week": "", "month": "", "year": "yr", "ml": "milliliter millilitre", "l": "liter litre", "gallon": "gal",
        "dollar": "usd $", "cent": "", "euro": "eur \u20ac", "gbp": "\u00a3", "yen": "\u00a5",
        "percent": "% percentage", "degree": "deg circ",
    }.items()
    for alias in (name, *aliases.split())
}  # fmt: skip
_SYMBOLS = {"m", "g", "s", "h", "l", "L", "W", "V", "A", "J", "N", "K", "C", "F"}  # units of one letter


def grade(response: str, answer: str, *, boxed: bool = False) -> bool:
    """Whether the answer that ``response`` announces (``boxed``: in a box) is ``answer``. False where it announces
    none."""
    said = announced(response, boxed=boxed)
    return said is not None and same_answer(said, answer)


def announced(response: str, *, boxed: bool = False) -> str | None:
    r"""The whole answer that a response commits itself to, as it is written there; None for a response without one.

    The content of the last ``\boxed{...}`` that is closed; else the sentence behind the last "answer is", "answer:"
    or "####"; else the last expression with a number in it; else the last line. Where a reasoning block is closed by
    ``</think>``, only what follows it counts, if anything does. With ``boxed``, None for a response without a box.
    """
    _, closed, after = response.rpartition("</think>")
    text = after if closed and after.strip() else response
    box = _last_box(text)
    if box is not None or boxed:
        return box
    found = [match for match in _ANNOUNCED.finditer(text) if text[match.end() :].strip(" \t\n:*_.=")]
    if found:
        return _sentence(text[found[-1].end() :])
    if _ANNOUNCED.search(text):
        return None  # announced, and cut off
    run = _last_expression(text)
    if run is not None:
        return run
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else None


def same_answer(said: str, answer: str) -> bool:
    """Whether ``said`` is ``answer``: exactly for numbers, through math-verify for mathematics, word by word else."""
    said, answer = _inner(_cleaned(said)), _inner(_cleaned(answer))
    if not said or not answer:
        return False
    if _words(said) == _words(answer):
        return True
    wanted = _quantity(answer, strict=True)
    if wanted is not None:
        found = _quantity(said, strict=False)
        if found is not None:
            return _equal(found, wanted)
    elif not _is_mathematics(answer):
        return _choice(said) == _words(answer)
    return _equal_mathematics(_expression(said), _expression(answer))


def _last_box(text: str) -> str | None:
    """The content of the last closed box, boxes within it opened; a box that is cut off is none."""
    closing = _closing(text)
    last = None
    for match in _BOX.finditer(text):
        start = match.end()
        if text[start : start + 1] == "{":
            if start in closing:
                last = text[start + 1 : closing[start]]
        elif token := re.match(r"\\[a-zA-Z]+|\S", text[start : start + 40]):  # \boxed 5
            last = token[0]
    return last


def _closing(text: str) -> dict[int, int]:
    """Where each brace of ``text`` is closed; ``\\{`` and ``\\}`` are characters and not braces."""
    closing: dict[int, int] = {}
    opened: list[int] = []
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            closing[opened.pop()] = match.start()
    return closing


def _sentence(tail: str) -> str:
    """What an announcement says, to the end of its sentence or line (no end: a period in ``$...$`` or in a number)."""
    tail = tail.lstrip(" \t\n:=*_").lstrip()
    math = re.match(r"\$\$.+?\$\$|\\\[.+?\\\]|\\\(.+?\\\)|\$[^$\n]+\$", tail, re.DOTALL)
    start = math.end() if math else 0
    end = _SENTENCE_END.search(tail, start)
    return tail[: end.start()] if end else tail


def _last_expression(text: str) -> str | None:
    """The last run of mathematics that has a digit in it; of an equation what is right of its last sign of equality."""
    text = _cleaned(text)
    piece = r"[\d.,$%\u20ac\u00a3^*/+\-=()\[\]{}|!<>]|\\[a-zA-Z]+\s?"
    run = re.compile(rf"(?:(?:{piece}|(?<![A-Za-z])[A-Za-z](?![A-Za-z]))\s*)+")
    for match in reversed(list(run.finditer(text))):
        found = match[0].strip().strip(",.;:!?").strip()
        if re.search(r"\d", found):
            found = found.rsplit("=", 1)[-1].strip() or found
            return found if re.search(r"\d", found) else match[0].strip()
    return None


def _cleaned(text: str) -> str:
    """One spelling for signs, spaces, powers and fractions; LaTeX's spacing and text commands are dropped."""
    text = "".join(unicodedata.normalize("NFKC", c) if "\uff01" <= c <= "\uff5e" else c for c in text)
    text = text.translate(_MINUS)
    text = re.sub(r"(?<![\w\s])[\u2013\u2014](?=[\d.])|(?:(?<=\s)|^)[\u2013\u2014](?=[\d.])", "-", text)
    text = re.sub(
        "[\u00bc-\u00be\u2150-\u215e]",
        lambda match: " " + unicodedata.normalize("NFKC", match[0]).replace("\u2044", "/"),
        text,
    )
    text = re.sub(
        "[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]+", lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text
    )
    text = re.sub(r"\u221a\s*(\d+(?:\.\d+)?|\([^()]*\))", lambda m: rf"\sqrt{{{m[1].strip('()')}}}", text)
    text = text.translate(_SIGNS)
    text = text.replace(r"\%", "%").replace(r"\$", "$").replace("{,}", ",")
    text = re.sub(r"(?<=\d)\\[,;! ](?=\d{3}(?!\d))", ",", text)  # 1\,000
    text = _SPACING.sub(lambda m: "" if m[0] in (r"\left", r"\right", r"\!") else " ", text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?", " degrees", text)
    for _ in range(3):
        text = _WRAPPED.sub(r" \1 ", text)
    return text.strip()


def _inner(text: str) -> str:
    """``text`` without delimiters, emphasis and closing punctuation around it."""
    while True:
        before = text
        text = text.strip().strip('`"').strip()
        for left, right in (
            ("$$", "$$"),
            ("$", "$"),
            (r"\(", r"\)"),
            (r"\[", r"\]"),
            ("**", "**"),
            ("__", "__"),
            ("*", "*"),
        ):
            whole = text.startswith(left) and text.endswith(right) and len(text) > len(left) + len(right) - 1
            if whole and left not in text[len(left) : -len(right)]:
                text = text[len(left) : -len(right)]
        text = re.sub(r"(?<![\\!])[.,;:!?]+$", "", text.strip()) if not re.search(r"\d!$", text.strip()) else text
        text = text.strip().removeprefix("=").strip()
        if text.startswith("{") and _closing(text).get(0) == len(text) - 1:
            text = text[1:-1]
        if text == before:
            return text


def _words(text: str) -> str:
    return " ".join(text.replace("{", " ").replace("}", " ").casefold().split())


def _choice(said: str) -> str:
    """An answer in words: ``(B)``, ``B) Paris``, ``option B`` are B."""
    letter = re.match(
        r"^(?:(?:option|choice|answer)\s+)?\(?([A-Za-z])(?:\)|[.:)]\s.*|\)\s.*)?$", said.strip(), re.I | re.S
    )
    return letter[1].casefold() if letter else _words(said)


def _is_mathematics(text: str) -> bool:
    return bool(re.search(r"\d|\\[a-zA-Z]|[\^=+*/<>]", text))


@dataclass(frozen=True)
class _Quantity:
    """A number with what stands behind it: a known unit (None: none, or one that is no known unit)."""

    value: Fraction
    unit: str | None


def _equal(said: _Quantity, wanted: _Quantity) -> bool:
    """Equal values; a percent sign on one side alone may be part of the value or only its unit."""
    percent = [q.unit == "percent" for q in (said, wanted)]
    if percent[0] != percent[1]:
        plain, hundredths = (wanted, said) if percent[0] else (said, wanted)
        return plain.unit is None and plain.value in (hundredths.value, hundredths.value / 100)
    if said.unit and wanted.unit and said.unit != wanted.unit:
        return False
    return said.value == wanted.value


def _quantity(text: str, *, strict: bool) -> _Quantity | None:
    """The number that ``text`` gives, exactly; None where it gives none, several, or a larger expression.

    With ``strict``, for a reference, only a number and its unit; else prose may stand around it ("that there are 12
    legs, because ...").
    """
    text = _without_name(_LATEX_FRACTION.sub(_plain_fraction, text))
    if not strict:
        lead = re.match(r"^(?:[A-Za-z']{2,}[,:]?\s+|(?:a|A|I|i)\s+)+(?=[-+$\u20ac\u00a3\d.(\\])", text)
        if lead:
            if _NEGATED.search(lead[0]) or re.search(
                r"(?i)\b(?:sqrt|sin|cos|tan|log|ln|exp|pi|mod|minus|negative)\s+$", lead[0]
            ):
                return None
            text = text[lead.end() :]
    match = _PLAIN.match(text.strip())
    if match is None or (match["sign"] and match["second"]):
        return None
    value = _value(match)
    if value is None:
        return None
    if "-" in (match["sign"], match["second"]):
        value = -value
    rest = match["rest"]
    comma = re.match(r"^,(\d+)\s*$", rest)  # a decimal comma: what separates thousands was read above
    if comma and match["number"] and match["number"].isdigit():
        sign = -1 if "-" in (match["sign"], match["second"]) else 1
        return _Quantity(sign * Fraction(f"{match['number']}.{comma[1]}"), None)
    unit = _UNITS.get(match["currency"]) if match["currency"] else None
    closed = rest.replace("}", " ").replace("$", " ") if not strict else rest
    if _MORE.match(rest) or _OPERATORS.match(rest) or _GOES_ON.match(closed) and not _is_aside(closed, strict):
        return None
    word = re.match(r"^\s*[-]?\s*([%A-Za-z]+)(.*)", closed, re.DOTALL)
    if word:
        name = word[1]
        if name.casefold() in _SCALES:
            value *= _SCALES[name.casefold()]
        elif len(name) == 1 and name != "%" and name not in _SYMBOLS:
            return None  # a variable: 5 x
        else:
            unit = unit or _unit(name)
        power = re.match(r"^\s*\^\s*\{?(\d)\}?", word[2])
        if power and unit is not None:
            unit += f"^{power[1]}"
        if strict and re.search(r"\d", word[2].replace(power[0], "", 1) if power else word[2]):
            return None
    elif strict and closed.strip():
        return None
    return _Quantity(value, unit)


def _value(match: re.Match[str]) -> Fraction | None:
    def exact(digits: str) -> Fraction:
        return Fraction(digits.replace(",", "").replace(" ", ""))

    if match["number"]:
        mantissa, _, exponent = match["number"].lower().partition("e")
        if len(exponent) > 4 or len(mantissa) > 10_000:
            return None
        return exact(mantissa) * Fraction(10) ** int(exponent or 0)
    top, bottom = (match["over"], match["under"]) if match["whole"] else (match["top"], match["bottom"])
    if not exact(bottom):
        return None
    return (exact(match["whole"]) if match["whole"] else 0) + exact(top) / exact(bottom)


def _plain_fraction(match: re.Match[str]) -> str:
    r"""``\frac{1}{2}`` as `` 1/2``: a whole number before it makes it a mixed one."""
    top, bottom = match[1] or match[2], match[3] or match[4]
    return f"-{top[1:]}/{bottom}" if top.startswith("-") else f" {top}/{bottom}"


def _without_name(text: str) -> str:
    """``x = 5`` and ``f(2) = 5`` as ``5``; an equation of anything else stays."""
    name = re.match(r"^\s*\\?[A-Za-z]\w*(?:_\{?\w+\}?)?(?:\s*\([\w\s,]*\))?\s*(?:=|\\approx|\u2248)\s*(?=[^=])", text)
    rest = text[name.end() :] if name else text
    parts = re.split(r"(?<![<>!=])=(?!=)", rest)  # 2 + 3 = 5
    return parts[-1].strip() if len(parts) > 1 and "," not in rest else rest.strip()


def _is_aside(rest: str, strict: bool) -> bool:
    """Whether a bracket behind a number opens a remark in words: ``5 (five apples)``, ``12 - because ...``."""
    return not strict and bool(re.match(r"^\s+(?:\([A-Za-z]{2,}|[-\u2013\u2014:]\s+[A-Za-z]{2,})", rest))


def _unit(word: str) -> str | None:
    lower = word if word in _SYMBOLS else word.casefold()
    for candidate in (lower, lower.casefold(), lower.removesuffix("s"), lower.removesuffix("es")):
        if candidate in _UNITS:
            return _UNITS[candidate]
    return None


def _expression(text: str) -> str:
    r"""What of ``text`` is mathematics, as LaTeX (``sqrt(2)`` as ``\sqrt{2}``): the first ``$...$``, or all of it."""
    math = re.search(r"\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", text, re.DOTALL)
    if math:
        text = next(group for group in math.groups() if group is not None)
    text = re.sub(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![\\A-Za-z])(pi|sin|cos|tan|log|ln|exp|infty)(?![A-Za-z])", r"\\\1 ", text)
    text = re.sub(r"\^\s*\(([^()]*)\)", r"^{\1}", text)
    text = re.sub(r"\^(-?\d{2,})", r"^{\1}", text).replace("**", "^")
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)


def _equal_mathematics(said: str, answer: str) -> bool:
    """Whether math-verify takes ``said`` for ``answer``; False for what it cannot read or not in time."""
    if max(len(said), len(answer)) > _LONGEST_EXPRESSION or _explodes(said):
        return False
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException

    # Its timeouts are alarms, which only the main thread can set; `_explodes` keeps what is known to hang from others.
    limit = _TIMEOUT_S if threading.current_thread() is threading.main_thread() else None
    try:
        gold, found = (parse(f"${text}$", parsing_timeout=limit) for text in (answer, said))  # type: ignore[arg-type]
        return bool(gold and found and verify(gold, found, timeout_seconds=limit))  # type: ignore[arg-type]
    except (TimeoutException, ValueError, TypeError, ArithmeticError, RecursionError):
        return False


def _explodes(text: str) -> bool:
    """A power or factorial whose value nobody can hold: sympy would try."""
    large = re.search(r"\^\s*\{?\s*-?\d{4,}|\d{4,}\s*!|!\s*!", text)
    return bool(large) or text.count("^") > 6 or bool(re.search(r"\^\s*\{?[^{}^]*\^\s*\{?[^{}^]*\^", text))
