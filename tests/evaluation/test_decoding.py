from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reqat.config.policy import ReSETRule
from reqat.generation import Decoding


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


@given(st.floats(1e-3, 10), st.floats(0, 20), st.floats(1e-3, 10), st.integers(1, 99), st.floats(1e-6, 1))
def test_text_round_trip_of_reset(t_low: float, tau0: float, t_high: float, window: int, top_p: float) -> None:
    for step in ("paragraph", "line", "sentence"):
        policy = Decoding.reset(t_low, tau0, top_p=top_p, t_high=t_high, window=window, step=step)
        assert Decoding.parse(str(policy)) == policy and not policy.is_greedy


def test_spelling_of_reset() -> None:
    full = "reset(t_low=0.1, tau0=0.5505, t_high=1.0, top_p=0.95, window=32, step=paragraph)"
    assert str(Decoding.parse("reset(t_low=0.1, tau0=0.5505)")) == full
    assert Decoding.parse(full) == Decoding.reset(0.1, 0.5505) == Decoding("reset", 0.7, rule=ReSETRule(0.1, 0.5505))
    assert Decoding.parse(full).temperature == 1.0


def test_a_rule_belongs_to_reset_alone() -> None:
    for make in (lambda: Decoding("sample", rule=ReSETRule(0.1, 0.5)), lambda: Decoding("reset")):
        with pytest.raises(ValueError, match="'reset'.*ReSETRule"):
            make()


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
        ("reset(t_low=0.1)", "tau0.*fit-reset"),
        ("reset", "lacks t_low and tau0"),
        ("reset(t_low=0, tau0=0.5)", "t_low=0"),
        ("reset(t_low=0.1, tau0=-1)", "tau0=-1"),
        ("reset(t_low=0.1, tau0=0.5, window=0)", "window=0"),
        ("reset(t_low=0.1, tau0=0.5, window=1.5)", "'1.5'"),
        ("reset(t_low=0.1, tau0=0.5, step=word)", "'word'.*paragraph, line, sentence"),
        ("reset(t_low=0.1, tau0=0.5, temperature=0.6)", "option 'temperature'"),
        ("sample(t_low=0.1)", "option 't_low'"),
        ("", "''"),
    ],
)
def test_errors_name_the_value(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decoding.parse(text)
