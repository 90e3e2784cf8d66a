"""The paper's comparisons: its own differences, and what a measured one says of them."""

from __future__ import annotations

import math

import pytest

from analysis.report import verdicts
from analysis.report.cells import Results
from analysis.report.claims import CLAIMS
from analysis.report.verdicts import paper_differences


def test_paper_differences_from_the_numbers() -> None:
    by_name = {c.name: c for c in CLAIMS}
    assert paper_differences(by_name["ReQAT-TQS reaches BF16 FT"], "NVFP4-W4A4KV4") == pytest.approx(
        [-3.91, 0.11, -1.09, 0.84]
    )
    assert paper_differences(by_name["same traces above different"], "MXFP4-W4A16") == pytest.approx(
        [1.05, 3.76, 2.81, 4.69]
    )
    assert paper_differences(by_name["ReQAT-T above QAT"], "NVFP4-W4A4") == ()


@pytest.mark.parametrize(
    ("parity", "value", "lo", "hi", "adjusted", "theirs", "verdict"),
    [
        (False, 5.0, 2.0, 8.0, 0.01, (3.0, 4.0), "agrees"),
        (False, -5.0, -8.0, -2.0, 0.01, (3.0, 4.0), "disagrees"),
        (False, -5.0, -8.0, -2.0, 0.01, (-3.0,), "agrees"),
        (False, 5.0, -1.0, 11.0, 0.06, (3.0,), "inconclusive"),
        (False, 5.0, 2.0, 8.0, math.nan, (3.0,), "inconclusive"),
        (False, 5.0, 2.0, 8.0, 0.01, (0.0, 0.84, -1.57, 0.42), "no direction"),
        (False, 5.0, 2.0, 8.0, 0.01, (), "no direction"),
        (True, -1.0, -2.9, 1.0, 0.9, (0.0,), "agrees"),
        (True, -1.0, -3.1, 1.0, 0.9, (0.0,), "inconclusive"),  # a large p alone shows nothing
        (True, -6.0, -9.0, -3.1, 0.001, (0.0,), "disagrees"),
        (True, 4.0, 1.0, 7.0, 0.001, (0.0,), "agrees"),
    ],
)
def test_verdicts(
    parity: bool,
    value: float,
    lo: float,
    hi: float,
    adjusted: float,
    theirs: tuple[float, ...],
    verdict: str,
    results: Results,
) -> None:
    claim = next(c for c in CLAIMS if c.parity == parity)
    entry = results.entries[0]
    made = verdicts.Tested(claim, "m", "NVFP4-W4A4KV4", 2, True, entry, entry, value, lo, hi, 0.01, theirs, adjusted)
    assert made.verdict == verdict
