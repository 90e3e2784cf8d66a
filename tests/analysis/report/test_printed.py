"""What the paper prints of the claims: its differences, their noise, and the directions that are worth testing."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from analysis.report import paper, printed
from analysis.report.claims import CLAIMS

BY_NAME = {c.name: c for c in CLAIMS}
NVFP4, MXFP4 = "NVFP4-W4A4KV4", "MXFP4-W4A16"


def test_differences_from_the_numbers() -> None:
    assert printed.differences(BY_NAME["ReQAT-TQS reaches BF16 FT"], NVFP4) == pytest.approx([-3.91, 0.11, -1.09, 0.84])
    assert printed.differences(BY_NAME["same traces above different"], MXFP4) == pytest.approx([1.05, 3.76, 2.81, 4.69])
    assert printed.differences(BY_NAME["ReQAT-T above QAT"], "NVFP4-W4A4") == ()
    # One side has no budget: it stands against each of the other's.
    assert printed.differences(BY_NAME["BF16 FT above the base"], "BF16") == pytest.approx(
        [value - 56.83 for value in (63.70, 64.17, 65.46, 64.79)]
    )
    # Means over metrics, and what is lost beyond another task.
    assert printed.differences(BY_NAME["SEM weight 0.1 above 0.5"], NVFP4) == pytest.approx([74.11 - 74.01], abs=0.02)
    beyond = BY_NAME["PTQ costs reasoning more than knowledge"]
    assert printed.differences(beyond, NVFP4) == pytest.approx([-6.7 + 2.84], abs=0.05)


@pytest.mark.parametrize("claim", [c for c in CLAIMS if c.printed is not None], ids=lambda c: c.name)
def test_every_printed_side_is_in_the_papers_numbers(claim: printed.Claim) -> None:
    where = claim.a.precision if claim.a.precision in ("BF16", NVFP4) else NVFP4
    found = printed.differences(claim, where)
    assert found and not any(math.isnan(value) for value in found)
    # The name says the direction that the numbers have, in all or all but one of them.
    word = re.search(r"\b(above|below)\b", claim.name)
    if claim.kind == "direction" and word and claim.name != "ReQAT-TQS above ReQAT-TQ":
        sign = 1 if word[0] == "above" else -1
        assert sum(value * sign > 0 for value in found) >= len(found) - 1


def test_noise_is_that_of_drawing_the_papers_responses_again() -> None:
    """Every response a draw of its own, as many as the paper graded; the mean over its budgets, drawn often."""
    rng = np.random.default_rng(3)

    def drawn(percent: float, n: int) -> np.ndarray:
        return 100 * rng.binomial(n, percent / 100, 40_000) / n

    # Four budgets on both sides; one side without a budget, drawn once; means over three benchmarks.
    a, b = ([59.79, 63.44, 65.94, 65.21], [60.32, 60.42, 63.13, 63.12])
    both = np.mean([drawn(x, 960) - drawn(y, 960) for x, y in zip(a, b, strict=True)], axis=0)
    assert printed.noise(BY_NAME["ReQAT-TQ above ReQAT-T"], NVFP4) == pytest.approx(1.96 * both.std(), rel=0.02)
    base = drawn(56.83, 960)
    ft = np.mean([drawn(x, 960) - base for x in (63.70, 64.17, 65.46, 64.79)], axis=0)
    assert printed.noise(BY_NAME["BF16 FT above the base"], "BF16") == pytest.approx(1.96 * ft.std(), rel=0.02)
    sizes = {"GSM8K": 1319 * 8, "MATH-500": 500 * 8, "AIME-120": 960}
    sem = {"0.1": (89.95, 90.53, 41.85), "0.5": (89.69, 90.45, 41.88)}
    means = [np.mean([drawn(x, n) for x, n in zip(sem[w], sizes.values(), strict=True)], axis=0) for w in sem]
    assert printed.noise(BY_NAME["SEM weight 0.1 above 0.5"], NVFP4) == pytest.approx(
        1.96 * (means[0] - means[1]).std(), rel=0.02
    )


def test_a_direction_below_the_papers_noise_is_none_unless_the_protocol_fixed_it() -> None:
    assert printed.direction(BY_NAME["ReQAT-TQS above QAT"], NVFP4) == 1
    assert printed.direction(BY_NAME["QAD below QAT"], NVFP4) == -1  # 8 points; at MXFP4-W4A16
    small = BY_NAME["E1M2 and scale above ReQAT-T"]  # 0.31 points on 120 problems
    assert printed.within_noise(small, NVFP4) and printed.direction(small, NVFP4) == 0
    primary = BY_NAME["ReQAT-TQ above ReQAT-T"]  # 1.8 +- 2.2
    assert printed.within_noise(primary, NVFP4) and printed.direction(primary, NVFP4) == 1
    assert printed.within_noise(primary, MXFP4) and printed.direction(primary, MXFP4) == 0  # there it is context
    # Of LiveCodeBench the paper does not say how many problems: no noise, and the direction stays.
    programs = BY_NAME["on programs: ReQAT-TQS above QAT"]
    assert math.isnan(printed.noise(programs, NVFP4)) and printed.direction(programs, NVFP4) == 1
    assert printed.direction(BY_NAME["Q-FIT above E1M2 alone"], NVFP4) == 1  # stated, not printed
    assert printed.direction(BY_NAME["QAD after FT against ReQAT-T"], NVFP4) == 0
    assert paper.sampling_variance(50.0, "AIME-120") == pytest.approx(2500 / 960)
    assert paper.sampling_variance(50.0, "LiveCodeBench") is None


def test_a_number_stands_at_the_precision_and_model_that_it_is_of() -> None:
    traces = BY_NAME["same traces above different"]
    assert printed.source(traces, NVFP4, "testbed", (NVFP4, NVFP4)) == MXFP4
    assert printed.source(traces, MXFP4, "testbed", (MXFP4, MXFP4)) is None
    assert printed.source(traces, MXFP4, "R1-Qwen-14B", (MXFP4, MXFP4)) is None
    assert printed.source(traces, MXFP4, "R1-Llama-8B", (MXFP4, MXFP4)) == "R1-Qwen-14B"
    parity = BY_NAME["ReQAT-TQS reaches BF16 FT"]
    assert printed.source(parity, NVFP4, "testbed", (NVFP4, "BF16")) is None
    integers = BY_NAME["FlatQuant below QAT"]
    assert printed.source(integers, NVFP4, "testbed", (NVFP4, NVFP4)) == "INT4-row-W4A4KV4"
    assert printed.source(BY_NAME["Q-FIT above E1M2 alone"], NVFP4, "testbed", (NVFP4, NVFP4)) is None
