r"""The grader of free text: cases written by hand, and properties against math-verify.

A case is (response, reference, right?). What a person who marks papers would say decides; where math-verify says
otherwise, the case stands here on purpose, and the property tests leave its kind out.
"""

from __future__ import annotations

import threading
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reqat.tasks.answers import announced, grade, same_answer

RIGHT, WRONG = True, False

BOXES = [
    (r"\boxed{5}", "5", RIGHT),
    (r"It is \boxed{\frac{1}{2}}.", r"\frac{1}{2}", RIGHT),
    (r"It is \boxed{\frac{1}{2}}.", "0.5", RIGHT),
    (r"It is \boxed{\frac{1}{2}}.", "2", WRONG),
    (r"\boxed{\text{B}}", "B", RIGHT),
    (r"\boxed{\text{B}}", "A", WRONG),
    (r"So \boxed{x^{2}+1}", "x^{2}+1", RIGHT),
    (r"So \boxed{x^{2}+1}", "1+x^2", RIGHT),
    (r"So \boxed{x^{2}+1}", "1", WRONG),
    (r"First \boxed{5}; corrected, \boxed{\frac{7}{1}}", "5", WRONG),
    (r"First \boxed{5}; corrected, \boxed{\frac{7}{1}}", "7", RIGHT),
    (r"\boxed{3} and then \boxed{4}", "4", RIGHT),
    (r"\boxed{3} and then \boxed{4}", "3", WRONG),
    (r"\boxed{1{,}000}", "1000", RIGHT),
    (r"\boxed{1\,000}", "1000", RIGHT),
    (r"\boxed{\boxed{8}}", "8", RIGHT),
    (r"\boxed 8", "8", RIGHT),
    (r"\fbox{8}", "8", RIGHT),
    (r"$\boxed{\sqrt{\frac{1}{4}}}$", "1/2", RIGHT),
    (r"\boxed{\frac{\sqrt{3}}{2}}", r"\frac{\sqrt{3}}{2}", RIGHT),
    (r"\boxed{\frac{\sqrt{3}}{2}}", r"\sqrt{3}/2", RIGHT),
    (r"\boxed{\frac{\sqrt{3}}{2}}", "3/2", WRONG),
    (r"\boxed{5} is what I get. The answer is correct.", "5", RIGHT),
    (r"The answer is \boxed{5}.", "5", RIGHT),
    (r"\boxed{7} The rest was cut off \boxed{\frac{1}{", "7", RIGHT),
    (r"\boxed{\frac{1}{", "1", WRONG),
    (r"\boxed{}", "5", WRONG),
    (r"\boxed{\{1, 2\}}", r"\{2, 1\}", RIGHT),
    (r"\boxed{\{1, 2\}}", "1", WRONG),
    (r"\boxed{x = 5}", "5", RIGHT),
    (r"\boxed{5 \text{ cm}}", "5", RIGHT),
    (r"\boxed{\$5}", "5", RIGHT),
    (r"\boxed{50\%}", "50", RIGHT),
    (r"\boxed{90^\circ}", "90", RIGHT),
    (r"\boxed{-\frac{3}{4}}", "-0.75", RIGHT),
    (r"\boxed{\frac{-3}{4}}", "-0.75", RIGHT),
    (r"\boxed{\dfrac{3}{4}}", "0.75", RIGHT),
    (r"\boxed{\frac34}", "0.75", RIGHT),
    (r"\boxed{2\frac{1}{2}}", "2.5", RIGHT),
    (r"\boxed{\mathrm{Paris}}", "Paris", RIGHT),
    (r"\boxed{\textbf{(C)}}", "C", RIGHT),
    (r"\boxed{(C)\ 12}", "C", RIGHT),
]
NUMBERS = [
    ("The answer is 12.", "12", RIGHT),
    ("The answer is 12", "12", RIGHT),
    ("The answer is: 12", "12", RIGHT),
    ("the final answer is 12.", "12", RIGHT),
    ("The Answer is 12.", "12", RIGHT),
    ("ANSWER: 12", "12", RIGHT),
    ("**Answer:** 12", "12", RIGHT),
    ("Answer:\n12", "12", RIGHT),
    ("The answer is **12**.", "12", RIGHT),
    ("The answer is `12`.", "12", RIGHT),
    ("#### 12", "12", RIGHT),
    ("The answer is 12.0.", "12", RIGHT),
    ("The answer is 12.50", "12.5", RIGHT),
    ("The answer is 12.5", "12", WRONG),
    ("The answer is .5", "0.5", RIGHT),
    ("The answer is 0.50", "1/2", RIGHT),
    ("The answer is 1/2", "0.5", RIGHT),
    ("The answer is 2/4.", "1/2", RIGHT),
    ("The answer is 12/5", "12", WRONG),
    ("The answer is 12/5", "5", WRONG),
    ("The answer is 1 1/2", "1.5", RIGHT),
    ("The answer is 1 1/2", "1", WRONG),
    ("The answer is 1\u00bd.", "1.5", RIGHT),
    ("The answer is \u00be", "0.75", RIGHT),
    ("The answer is -5.", "-5", RIGHT),
    ("The answer is -5.", "5", WRONG),
    ("The answer is \u22125.", "-5", RIGHT),
    ("The answer is \u20135.", "-5", RIGHT),
    ("The answer is \uff0d5.", "-5", RIGHT),
    ("The answer is \u22125.", "5", WRONG),
    ("The answer is \uff11\uff12.", "12", RIGHT),
    ("The answer is +5.", "5", RIGHT),
    ("The answer is 1,234,567.", "1234567", RIGHT),
    ("The answer is 1,234.50", "1234.5", RIGHT),
    ("The answer is 1234567", "1,234,567", RIGHT),
    ("The answer is 1,234", "1", WRONG),
    ("The answer is 1,234", "234", WRONG),
    ("The answer is 3,5", "3.5", RIGHT),
    ("The answer is 3,5", "3", WRONG),
    ("The answer is 1e3.", "1000", RIGHT),
    ("The answer is 2.5e-1", "0.25", RIGHT),
    (r"The answer is $1.5 \times 10^{3}$.", "1500", RIGHT),
    ("The answer is 1.5 \u00d7 10\u00b3.", "1500", RIGHT),
    ("The answer is 10\u00b2.", "10", WRONG),
    ("The answer is 10^2.", "100", RIGHT),
    ("The answer is 10^2.", "10", WRONG),
    ("The answer is 5^2.", "2", WRONG),
    ("The answer is 007.", "7", RIGHT),
    ("The answer is 0.333", "1/3", WRONG),
    ("The answer is 99999999999999999999.", "99999999999999999998", WRONG),
    ("The answer is 99999999999999999999.", "99999999999999999999", RIGHT),
    ("The answer is 0.1", "0.10000000000000001", WRONG),
    ("The answer is 1/0", "0", WRONG),
    ("The answer is", "12", WRONG),
    ("The answer is.", "12", WRONG),
    ("", "12", WRONG),
    ("I do not know.", "12", WRONG),
]
UNITS = [
    ("The answer is 12 apples.", "12", RIGHT),
    ("The answer is $12.", "12", RIGHT),
    ("The answer is $12.50.", "12.5", RIGHT),
    ("The answer is -$12.", "-12", RIGHT),
    ("The answer is \u20ac12.", "12", RIGHT),
    ("The answer is 12 dollars.", "$12", RIGHT),
    ("The answer is 12 cm.", "12", RIGHT),
    ("The answer is 12cm.", "12", RIGHT),
    ("The answer is 12 cm.", "12 cm", RIGHT),
    ("The answer is 12", "12 cm", RIGHT),
    ("The answer is 12 centimeters", "12 cm", RIGHT),
    ("The answer is 12 m.", "12 cm", WRONG),
    ("The answer is 12 kg", "12 g", WRONG),
    ("The answer is 12 cm^2", "12", RIGHT),
    ("The answer is 12 cm\u00b2", "12 cm^2", RIGHT),
    ("The answer is 12 cm^3", "12 cm^2", WRONG),
    ("The answer is 12 hours.", "12 h", RIGHT),
    ("The answer is 90\u00b0.", "90", RIGHT),
    ("The answer is 90 degrees.", r"90^\circ", RIGHT),
    ("The answer is 50%.", "50", RIGHT),
    ("The answer is 50%.", "0.5", RIGHT),
    ("The answer is 50 percent.", "50%", RIGHT),
    ("The answer is 50%.", "5", WRONG),
    ("The answer is 0.5", "50%", RIGHT),
    ("The answer is 5 million.", "5000000", RIGHT),
    ("The answer is 5 million.", "5", WRONG),
    ("The answer is 2.5 thousand", "2500", RIGHT),
    ("The answer is 3 dozen eggs", "36", RIGHT),
    ("The answer is 12 times as many.", "12", WRONG),
    ("The answer is 12 and a half.", "12", WRONG),
]
LARGER = [
    ("The answer is 2*5.", "5", WRONG),
    ("The answer is 2*5.", "2", WRONG),
    ("The answer is 2*5.", "10", RIGHT),
    ("The answer is 2 + 3.", "5", RIGHT),
    ("The answer is 2 + 3.", "2", WRONG),
    ("The answer is 2 + 3 = 5.", "5", RIGHT),
    ("The answer is 2 + 3 = 5.", "2", WRONG),
    ("The answer is 2 plus 3.", "2", WRONG),
    ("The answer is 5 or 6.", "5", WRONG),
    ("The answer is 5 or 6.", "6", WRONG),
    ("The answer is 5, 6.", "5", WRONG),
    ("The answer is 5 and 6", "5", WRONG),
    ("The answer is between 4 and 6.", "4", WRONG),
    ("The answer is 5x.", "5", WRONG),
    ("The answer is 5 x.", "5", WRONG),
    ("The answer is 5x.", "5x", RIGHT),
    ("The answer is 5*x", "5x", RIGHT),
    (r"The answer is $5\sqrt{2}$.", "5", WRONG),
    (r"The answer is $5\pi$.", "5", WRONG),
    (r"The answer is $5\pi$.", r"5\pi", RIGHT),
    ("The answer is 5\u03c0.", r"5\pi", RIGHT),
    ("The answer is 2*sqrt(3).", r"\sqrt{12}", RIGHT),
    ("The answer is 2\u221a3.", r"2\sqrt{3}", RIGHT),
    ("The answer is 5:30.", "5", WRONG),
    ("The answer is 5:30.", "5:30", RIGHT),
    ("The answer is x > 5.", "5", WRONG),
    ("The answer is -x + 5", "5", WRONG),
    ("The answer is not 5.", "5", WRONG),
    ("So we get 12/5", "5", WRONG),
    ("So we get 12/5", "12/5", RIGHT),
    ("That makes 3 * 4 = 12", "12", RIGHT),
    ("That makes 3 * 4 = 12", "4", WRONG),
    ("That makes 3 * 4", "4", WRONG),
    ("That makes 12 legs in all.", "12", RIGHT),
    ("First 3, then 12.", "12", RIGHT),
    ("First 3, then 12.", "3", WRONG),
    ("The answer is 9^9^9^9^9.", "9", WRONG),
    ("The answer is 99999!!.", "5", WRONG),
]
PROSE = [
    ("The answer is that there are 12 legs.", "12", RIGHT),
    ("The answer is approximately 12.", "12", RIGHT),
    ("The answer is 72 clips, because 48 + 24 = 72.", "72", RIGHT),
    ("The answer is 12 (twelve legs).", "12", RIGHT),
    ("The answer is 12 - that was easy", "12", RIGHT),
    ("The answer is x = 12.", "12", RIGHT),
    ("The answer is f(2) = 12.", "12", RIGHT),
    ("The answer is 12. I hope the answer is right.", "12", WRONG),  # what is announced last is no number
    ("The answer is 11. No, the answer is 12.", "12", RIGHT),
    ("The answer is 11. No, the answer is 12.", "11", WRONG),
    ("The answer is 12. There were 3 cats.", "12", RIGHT),
    ("The answer is 12.\nThere were 3 cats.", "12", RIGHT),
    ("<think>The answer is 11.</think> It is 12", "12", RIGHT),
    ("<think>The answer is 11.</think> The answer is 12.", "11", WRONG),
    ("<think>The answer is 11.</think>", "11", RIGHT),
    ("12", "12", RIGHT),
    ("  12  ", "12", RIGHT),
    ("12\n", "12", RIGHT),
]
WORDS = [
    ("The answer is B.", "B", RIGHT),
    ("The answer is (B).", "B", RIGHT),
    ("The answer is (B) Paris.", "B", RIGHT),
    ("The answer is B) Paris.", "B", RIGHT),
    ("The answer is option B.", "B", RIGHT),
    ("The answer is b.", "B", RIGHT),
    ("The answer is C.", "B", WRONG),
    ("The answer is A or B.", "B", WRONG),
    ("Answer: Paris", "Paris", RIGHT),
    ("Answer: paris.", "Paris", RIGHT),
    ("Answer: New  York", "new york", RIGHT),
    ("Answer: Paris", "London", WRONG),
    ("yes", "Yes", RIGHT),
    ("I think so.\nyes", "yes", RIGHT),
    ("Bananas", "B", WRONG),
]
MATHEMATICS = [
    (r"\boxed{(1, 2)}", "(1,2)", RIGHT),
    (r"\boxed{(1, 2)}", "(2,1)", WRONG),
    (r"\boxed{[0, 1)}", "[0,1)", RIGHT),
    (r"\boxed{[0, 1)}", "[0,1]", WRONG),
    (r"\boxed{\pi}", r"\pi", RIGHT),
    (r"\boxed{\frac{\pi}{2}}", r"0.5\pi", RIGHT),
    (r"\boxed{(x+1)^2}", "x^2+2x+1", RIGHT),
    (r"\boxed{(x+1)^2}", "x^2+1", WRONG),
    (r"\boxed{\sin^2 x + \cos^2 x}", "1", RIGHT),
    (r"\boxed{2^{10}}", "1024", RIGHT),
    (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", RIGHT),
    (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}", WRONG),
    (r"\boxed{\infty}", r"\infty", RIGHT),
    (r"\boxed{3 + 4i}", "4i + 3", RIGHT),
    (r"\boxed{\left(\frac{1}{2}, 3\right)}", r"(\frac{1}{2}, 3)", RIGHT),
    (r"$$\boxed{a_n = 2n + 1}$$", "2n+1", RIGHT),
    (r"\boxed{\log_2 8}", "3", RIGHT),
    (r"\boxed{y = 2x + 1}", "y = 2x + 1", RIGHT),
    (r"\boxed{1, 2, 3}", "1, 2, 3", RIGHT),
    (r"\boxed{1, 2, 3}", "1", WRONG),
]
CASES = [*BOXES, *NUMBERS, *UNITS, *LARGER, *PROSE, *WORDS, *MATHEMATICS]


def test_there_are_two_hundred_cases_and_none_twice() -> None:
    assert len({case[:2] for case in CASES}) == len(CASES) >= 200


@pytest.mark.parametrize(("response", "answer", "right"), CASES)
def test_a_person_who_marks_papers_would_say_so_too(response: str, answer: str, right: bool) -> None:
    assert grade(response, answer) is right


def test_an_announcement_is_taken_whole() -> None:
    assert announced(r"so \boxed{\frac{\sqrt{2}}{\{3\}}} it is") == r"\frac{\sqrt{2}}{\{3\}}"
    assert announced("The answer is 3.5 apples. Good.") == "3.5 apples"
    assert announced("The answer is $a. b$ and more.") == "$a. b$ and more"
    assert announced("") is None and announced("The answer is ") is None


INTEGERS = st.integers(-(10**9), 10**9)
TEMPLATES = (
    "{}", "The answer is {}.", "So the final answer is: {}", r"\boxed{{{}}}", r"Thus $x = {}$, that is \boxed{{{}}}.",
    "#### {}", "The answer is $ {} $.",
)  # fmt: skip


def written(value: Fraction) -> st.SearchStrategy[str]:
    """Ways to write a number; every one of them is exact."""
    ways = [f"{value.numerator}/{value.denominator}"] if value.denominator != 1 else [f"{value.numerator}"]
    if value.denominator == 1:
        ways += [f"{value.numerator:,}", f"{value.numerator}.0"]
    if value.denominator == 1 or set(_factors(value.denominator)) <= {2, 5}:
        ways.append(f"{float(value)}" if float(value) == value and "e" not in f"{float(value)}" else ways[0])
    sign = "-" if value < 0 else ""
    ways.append(rf"{sign}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}")
    return st.sampled_from(ways)


def _factors(n: int) -> list[int]:
    found, p = [], 2
    while n > 1:
        while n % p == 0:
            found.append(p)
            n //= p
        p += 1
    return found


FRACTIONS = st.fractions(min_value=-1000, max_value=1000, max_denominator=64) | INTEGERS.map(Fraction)


@given(data=st.data(), value=FRACTIONS, other=FRACTIONS, template=st.sampled_from(TEMPLATES))
def test_a_number_is_right_however_it_is_written_and_only_then(
    data: st.DataObject, value: Fraction, other: Fraction, template: str
) -> None:
    said, reference = data.draw(written(value)), data.draw(written(value))
    assert grade(template.replace("{}", said).replace("{{", "{").replace("}}", "}"), reference)
    assert same_answer(said, data.draw(written(other))) is (value == other)


@settings(max_examples=40)
@given(value=FRACTIONS, other=FRACTIONS, equal=st.booleans(), data=st.data())
def test_numbers_are_graded_as_math_verify_grades_them(
    value: Fraction, other: Fraction, equal: bool, data: st.DataObject
) -> None:
    from math_verify import parse, verify

    said = data.draw(written(value))
    reference = data.draw(written(value if equal else other))
    theirs = bool(verify(parse(f"${reference}$"), parse(rf"Thus \boxed{{{said}}}.")))
    if abs(value - other) < Fraction(1, 10**5) and value != other and not equal:
        return  # math-verify rounds to six decimals
    assert grade(rf"Thus \boxed{{{said}}}.", reference) is theirs


TERMS = st.recursive(
    st.integers(1, 9).map(str) | st.sampled_from(["x", "y", r"\pi", r"\sqrt{2}", r"\sqrt{x}"]),
    lambda inner: (
        st.builds(lambda a, b: f"({a} + {b})", inner, inner)
        | st.builds(lambda a, b: rf"({a} \cdot {b})", inner, inner)
        | st.builds(lambda a, b: rf"\frac{{{a}}}{{{b}}}", inner, inner)
        | st.builds(lambda a: f"({a})^{{2}}", inner)
    ),
    max_leaves=4,
)


@settings(max_examples=25)
@given(said=TERMS, reference=TERMS, same=st.booleans())
def test_expressions_are_graded_as_math_verify_grades_them(said: str, reference: str, same: bool) -> None:
    from math_verify import parse, verify

    reference = said if same else reference
    response = rf"We get \boxed{{{said}}}."
    theirs = bool(verify(parse(f"${reference}$"), parse(response)))
    assert grade(response, reference) is theirs


def test_no_response_stops_the_grader_and_threads_may_grade() -> None:
    hostile = ["\\boxed{" * 3000, "$" * 5000, "{" * 5000, r"\frac" * 500, "1/" * 3000, "(" * 3000 + "1", "9" * 50_000]
    found: list[bool] = []
    for text in hostile:
        found += [grade(text, "5"), grade(f"The answer is {text}", r"\frac{x}{2}")]
    worker = threading.Thread(target=lambda: found.append(grade(r"\boxed{2\sqrt{3}}", r"\sqrt{12}")))
    worker.start()
    worker.join()
    assert found == [False] * (2 * len(hostile)) + [True]
