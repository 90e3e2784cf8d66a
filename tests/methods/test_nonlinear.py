"""Tables of nonlinear functions: networks, dynamic programming, hardware's arithmetic; numpy and brute force decide."""

from __future__ import annotations

import itertools
import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reqat.config.errors import ReqatError
from reqat.methods.nonlinear import FUNCTIONS, METHODS, VERSIONS, Network, Table, merged, nli, nn_lut, through
from reqat.methods.nonlinear._function import RELATIVE_FLOOR, Function
from reqat.methods.nonlinear._versions import INT32, REACH

STEPS = 150


@cache
def small_nli(name: str) -> Table:
    return nli.fit(FUNCTIONS[name], 16, candidates=48, samples=400)


def network(hidden: int, seed: int, dead: int = 0, twice: int = 0) -> Network:
    """Of random neurons, some without a weight, some that switch at one place."""
    g = torch.Generator().manual_seed(seed)
    n, b, m = (torch.randn(hidden, generator=g, dtype=torch.float64) for _ in range(3))
    n[:dead] = 0.0
    for i in range(dead, dead + twice):
        n[i + 1], b[i + 1] = -2 * n[i], -2 * b[i]
    return Network(n, b, m)


def values(f: Network, x: np.ndarray) -> np.ndarray:
    """The network's formula, in numpy."""
    n, b, m = (part.double().numpy() for part in (f.inner, f.bias, f.outer))
    return np.maximum(np.multiply.outer(x, n) + b, 0.0) @ m


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(0, 2**20), st.integers(0, 2), st.integers(0, 2))
def test_a_table_is_its_network(hidden: int, seed: int, dead: int, twice: int) -> None:
    dead, twice = min(dead, hidden), min(twice, (hidden - min(dead, hidden)) // 2)
    f = network(hidden, seed, dead, twice)
    table = f.table()
    switches = -(f.bias / f.inner)[f.inner != 0].numpy()
    x = np.concatenate([np.linspace(-50, 50, 2001), switches])
    np.testing.assert_allclose(table(torch.from_numpy(x)).numpy(), values(f, x), rtol=1e-9, atol=1e-9)
    assert table.entries == 1 + len(np.unique(switches))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_trained_network_and_its_float32_table_agree(name: str) -> None:
    function = FUNCTIONS[name]
    f = nn_lut.trained(function, 15, steps=STEPS)
    assert f.table().entries <= 16
    x = function.uniform(5001).float()
    table = VERSIONS["fp32"](f.table(), function)
    size = max(1.0, float((f.inner.abs() * x.abs().max() + f.bias.abs()).mul(f.outer.abs()).sum()))
    torch.testing.assert_close(
        table(x).double(), torch.from_numpy(values(f, x.double().numpy())), rtol=0, atol=1e-6 * size
    )


def test_training_lowers_the_error_and_depends_on_its_seed_alone() -> None:
    function = FUNCTIONS["gelu"]
    before = nn_lut.initial(function, 15, torch.Generator().manual_seed(3)).table()
    torch.manual_seed(1)
    a = nn_lut.fit(function, 16, seed=3, steps=STEPS)
    torch.manual_seed(2)
    b = nn_lut.fit(function, 16, seed=3, steps=STEPS)
    assert torch.equal(a.slopes, b.slopes)
    assert function.errors(a)["mean_abs"] < 0.5 * function.errors(before)["mean_abs"]


def test_gradients_are_autograds() -> None:
    g = torch.Generator().manual_seed(5)
    n, b, m = (torch.randn(7, generator=g).requires_grad_() for _ in range(3))
    x, y = torch.randn(50, generator=g), torch.randn(50, generator=g)
    (Network(n, b, m)(x) - y).abs().mean().backward()
    for own, weight in zip(nn_lut.gradients(*(w.detach() for w in (n, b, m)), x, y), (n, b, m), strict=True):
        torch.testing.assert_close(own, weight.grad)


@pytest.mark.parametrize("name", ["exp", "reciprocal", "rsqrt"])
def test_neurons_begin_where_the_paper_has_them(name: str) -> None:
    f = nn_lut.initial(FUNCTIONS[name], 15, torch.Generator().manual_seed(0))
    assert bool((f.bias > 0).all()) and bool((f.inner > 0).all()) == (name == "exp")
    assert bool((f.inner < 0).all()) == (name != "exp")


def test_training_needs_samples_that_are_numbers() -> None:
    function, g = FUNCTIONS["gelu"], torch.Generator()
    start = nn_lut.initial(function, 3, g)
    for samples in (torch.empty(0), torch.tensor([1.0, torch.nan])):
        with pytest.raises(ReqatError, match="gelu"):
            nn_lut.train(function, start, samples, g, steps=1)
    with pytest.raises(ReqatError, match="0 steps"):
        nn_lut.train(function, start, torch.ones(3), g, steps=0)


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("method", ["linear", "nli"])
def test_tables_of_values_go_through_them_and_on_with_the_tails(name: str, method: str) -> None:
    function = FUNCTIONS[name]
    table = small_nli(name) if method == "nli" else METHODS[method](function, 16)
    assert table.entries == 16
    x = table.breakpoints
    np.testing.assert_allclose(table(x), function(x), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(table(x - 1e-9 * x.abs()), function(x), rtol=1e-4, atol=1e-7)  # no jumps
    for tail, slope, end in zip(function.tails, (table.slopes[0], table.slopes[-1]), (x[0], x[-1]), strict=True):
        if tail is not None:
            assert slope == tail and float(end) in (function.low, function.high)


def test_the_linear_table_is_numpys_interpolation() -> None:
    function = FUNCTIONS["silu"]
    table = METHODS["linear"](function, 12)
    knots = np.linspace(function.low, function.high, 11)
    x = np.linspace(function.low, function.high, 777)
    expected = np.interp(x, knots, knots / (1 + np.exp(-knots)))
    np.testing.assert_allclose(table(torch.from_numpy(x)), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("breakpoints", "slopes", "intercepts"),
    [
        ([1.0, 1.0], [1.0, 2.0, 3.0], [0.0, 0.0, 0.0]),
        ([2.0, 1.0], [1.0, 2.0, 3.0], [0.0, 0.0, 0.0]),
        ([1.0], [1.0, math.nan], [0.0, 0.0]),
        ([math.inf], [1.0, 2.0], [0.0, 0.0]),
        ([1.0], [1.0, 2.0, 3.0], [0.0, 0.0, 0.0]),
        ([], [], []),
    ],
)
def test_what_is_no_table_is_refused(breakpoints: list[float], slopes: list[float], intercepts: list[float]) -> None:
    with pytest.raises(ReqatError):
        Table(*(torch.tensor(part) for part in (breakpoints, slopes, intercepts)))


def test_segments_of_no_width_are_left_out() -> None:
    table = merged(torch.tensor([0.0, 1.0, 1.0, 1.0, 2.0]), torch.arange(6.0), torch.arange(6.0))
    assert table.breakpoints.tolist() == [0, 1, 2] and table.slopes.tolist() == [0, 1, 4, 5]


def test_segments_that_count() -> None:
    x = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert through(x, x**2, (None, None)).effective(0.0, 3.0) == 3
    assert through(x, x, (None, None)).effective(0.0, 3.0) == 0  # all segments are one line
    close = torch.tensor([0.0, 1.0, 1.00001, 3.0])
    assert through(close, close**2, (None, None)).effective(0.0, 3.0) == 2  # two breakpoints in one place
    assert through(x, x**2, (None, None)).effective(0.0, 1.5) == 2  # a segment beyond the range


# --- dynamic programming ----------------------------------------------------------------------------------------------

SMALL = Function("small", lambda x: torch.sin(2 * x) + 0.1 * x**2, -2.0, 3.0, (None, None), "normal")


def error_of(knots: Tensor, at: Tensor, parts: tuple[int, ...]) -> float:
    """Summed relative error of the interpolation through these breakpoints, by numpy."""
    ends = zip(knots[:-1].tolist(), knots[1:].tolist(), parts, strict=True)
    x = np.concatenate([np.linspace(a, b, n, endpoint=False) for a, b, n in ends] + [knots[-1:].numpy()])
    y = SMALL(at).numpy()
    off = np.abs(np.interp(at, x, SMALL(torch.from_numpy(x))) - y)
    return float((off / np.maximum(np.abs(y), RELATIVE_FLOOR)).sum())


@pytest.mark.parametrize("parts", [(1,), (1, 1, 1), (1, 1, 1, 1), (1, 3, 2), (4, 1)])
def test_no_choice_of_breakpoints_is_better(parts: tuple[int, ...]) -> None:
    candidates, at = SMALL.uniform(10), SMALL.uniform(200)
    chosen = nli.best_breakpoints(SMALL, candidates, at, parts)
    assert chosen[0] == 0 and chosen[-1] == 9 and len(chosen) == len(parts) + 1
    every = [
        error_of(candidates[[0, *inner, 9]], at, parts) for inner in itertools.combinations(range(1, 9), len(parts) - 1)
    ]
    assert error_of(candidates[chosen], at, parts) == pytest.approx(min(every), rel=1e-9)


def test_the_released_layout_has_its_35_numbers() -> None:
    table = nli.fit(FUNCTIONS["exp"], parts=nli.RELEASED, candidates=40, samples=200)
    assert table.entries == 1 + 8 * 4 + 1 + 1  # 35 values at the ends of 34 segments, and the tail on the left
    widths = table.breakpoints.diff()[1:33].reshape(8, 4)
    torch.testing.assert_close(widths, widths[:, :1].expand(8, 4))


def test_more_candidates_are_asked_for_where_breakpoints_outnumber_them() -> None:
    with pytest.raises(ReqatError, match="candidate"):
        nli.fit(FUNCTIONS["exp"], 16, candidates=8)


@pytest.mark.parametrize("method", ["linear", "nli", "nn_lut"])
@pytest.mark.parametrize("entries", [0, 1, True, 2.5])
def test_too_few_entries_are_refused(method: str, entries: int) -> None:
    with pytest.raises(ReqatError, match="gelu"):
        METHODS[method](FUNCTIONS["gelu"], entries)


# --- arithmetic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_fp16_rounds_as_numpy_does(name: str) -> None:
    function = FUNCTIONS[name]
    table = small_nli(name)
    x = function.uniform(3001).numpy().astype(np.float16)
    d, s, t = (part.numpy().astype(np.float16) for part in (table.breakpoints, table.slopes, table.intercepts))
    at = np.searchsorted(d, x, side="right")
    expected = s[at] * x + t[at]  # numpy rounds each operation on FP16
    got = VERSIONS["fp16"](table, function)(torch.from_numpy(x.astype(np.float32)))
    np.testing.assert_array_equal(got.numpy().astype(np.float16), expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_integers_are_of_32_bits_and_sums_of_64(name: str) -> None:
    version = INT32(small_nli(name), FUNCTIONS[name])
    d, p, c = (integers.tolist() for integers in (version.breakpoints, version.slopes, version.intercepts))
    assert all(-(2**31) <= integer < 2**31 for integer in (*d, *p, *c))
    shift, limit = version.e + version.f - version.h, int(REACH * 2**version.e)
    assert limit < 2**31 and limit * max(map(abs, p)) + (max(map(abs, c)) << shift) < 2**63
    q = np.linspace(-limit, limit, 501).round().astype(int).tolist()
    # Python's integers are of any size.
    segments = np.searchsorted(d, q, side="right")
    expected = [(p[k] * i + (c[k] << shift)) / 2 ** (version.e + version.f) for k, i in zip(segments, q, strict=True)]
    x = torch.tensor(q, dtype=torch.float64) * 2.0**-version.e
    np.testing.assert_array_equal(version(x).numpy(), expected)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("method", ["nli", "network"])
def test_integers_are_as_near_the_function_as_the_table_is(name: str, method: str) -> None:
    function = FUNCTIONS[name]
    table = small_nli(name) if method == "nli" else network(15, 3).table()
    version = INT32(table, function)
    x = torch.cat([function.uniform(5001), function.half(5001)])
    assert float((version(x) - table(x)).abs().max()) <= version.bound
    if method == "nli":
        plain, integers = (function.errors(VERSIONS[v](table, function)) for v in ("fp32", "int32"))
        assert all(integers[measure] <= 1.02 * plain[measure] for measure in plain)


def test_inputs_beyond_what_hardware_holds_saturate() -> None:
    function = FUNCTIONS["gelu"]
    table = METHODS["linear"](function, 16)
    for version in ("fp16", "int32"):
        y = VERSIONS[version](table, function)(torch.tensor([1e30, -1e30, 70.0]))
        assert bool(y.isfinite().all()) and y[1] == pytest.approx(0.0, abs=1e-3)
        assert y[0] == (65504.0 if version == "fp16" else pytest.approx(REACH, rel=1e-6))


def test_a_table_that_fp16_cannot_hold_is_refused() -> None:
    table = through(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 1e6, 3.0]), (None, None))
    with pytest.raises(ReqatError, match="FP16"):
        VERSIONS["fp16"](table, FUNCTIONS["gelu"])


@pytest.mark.parametrize("version", VERSIONS)
def test_versions_keep_shape_and_dtype(version: str) -> None:
    function = FUNCTIONS["silu"]
    evaluate = VERSIONS[version](METHODS["linear"](function, 16), function)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.linspace(-3, 3, 12, dtype=dtype).reshape(3, 4)
        assert evaluate(x).dtype == dtype and evaluate(x).shape == (3, 4)


def test_an_extrapolated_exponential_turns_negative() -> None:
    """What makes a table's range matter: below it a line with a slope crosses zero."""
    x = torch.linspace(-8.0, 0.0, 9, dtype=torch.float64)
    going_on = through(x, x.exp(), (None, None))
    assert float(going_on(torch.tensor(-20.0))) < 0 and float(small_nli("exp")(torch.tensor(-999.0))) >= 0
