"""Text about decoding: thresholds are read in one way, and the default policy is the one that sampling has."""

from __future__ import annotations

import pytest

from reqat.config.decoding import SAMPLE, Threshold
from reqat.config.errors import ReqatError
from reqat.generation import Decoding


@pytest.mark.parametrize(
    ("text", "value", "is_percentile"),
    [("0.6", 0.6, False), ("0", 0.0, False), ("1e-05", 1e-5, False), ("p75", 75.0, True), ("p99.5", 99.5, True)],
)
def test_a_threshold_is_nats_or_a_percentile(text: str, value: float, is_percentile: bool) -> None:
    assert Threshold.parse(text) == Threshold(value, is_percentile)


@pytest.mark.parametrize(
    "text",
    ["", "p", "p0", "p100", "-1", "p-5", "nan", "inf", "1e999", "0.6 nats", "75p", "0.6\n", ".", None, 0.6, True],
)
def test_anything_else_is_refused_by_name(text: object) -> None:
    with pytest.raises(ReqatError) as error:
        Threshold.parse(text)
    assert f"threshold {text!r}" in str(error.value)


def test_the_default_policy_is_that_of_sampling() -> None:
    assert str(Decoding.sample()) == SAMPLE and Decoding.parse("sample") == Decoding.parse(SAMPLE)
