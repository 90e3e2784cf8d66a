from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reqat.evaluation import Decoding


@given(st.floats(1e-3, 100), st.floats(1e-6, 1))
def test_text_round_trip(temperature: float, top_p: float) -> None:
    policy = Decoding.sample(temperature, top_p)
    assert Decoding.parse(str(policy)) == policy


def test_spelling() -> None:
    assert str(Decoding()) == "sample(temperature=0.6, top_p=0.95)"
    assert Decoding.parse("sample") == Decoding.parse(" sample( top_p=0.95 , temperature=0.6 ) ") == Decoding()
    assert Decoding.parse("sample(top_p=1)") == Decoding.sample(0.6, 1.0)
    assert str(Decoding.parse("greedy")) == "greedy"
    assert Decoding("greedy", 0.3, 0.5) == Decoding.greedy()


def test_effective_seeds() -> None:
    assert Decoding().effective_seeds([4, 5]) == (4, 5)
    assert Decoding.greedy().effective_seeds([4, 5]) == (4,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gredy", "gredy"),
        ("sample(temperature=0)", "temperature=0"),
        ("sample(temperature=nan)", "temperature=nan"),
        ("sample(top_p=0)", "top_p=0"),
        ("sample(top_p=1.5)", "top_p=1.5"),
        ("sample(top_k=4)", "top_k"),
        ("sample(top_p=0.9, top_p=0.8)", "repeated option 'top_p'"),
        ("sample(top_p=high)", "'high'"),
        ("greedy(temperature=0.6)", "temperature"),
        ("sample(0.6", "sample\\(0.6"),
        ("", "''"),
    ],
)
def test_errors_name_the_value(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decoding.parse(text)
