"""Piecewise-linear tables: native kernel against numpy, on every instruction set, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reqat_kernels.native import table as native


@pytest.fixture(params=("portable", "avx2", "avx512"))  # of which there is code
def isa(request: pytest.FixtureRequest, limit_isa: Callable[[str], None]) -> str:
    limit_isa(request.param)
    return str(request.param)


def parts(entries: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    breakpoints = torch.randn(entries - 1, generator=g).sort()[0]
    return breakpoints, torch.randn(entries, generator=g), torch.randn(entries, generator=g)


def by_numpy(x: Tensor, breakpoints: Tensor, slopes: Tensor, intercepts: Tensor) -> Tensor:
    at = np.searchsorted(breakpoints.numpy(), x.numpy(), side="right").clip(max=len(slopes) - 1)
    return torch.from_numpy(slopes.numpy()[at] * x.numpy() + intercepts.numpy()[at])


@pytest.mark.parametrize("entries", [1, 2, 15, 16, 17, 32, 33, 256])
def test_the_kernel_computes_numpys_bits(isa: str, entries: int, same_bits: Callable[[Tensor, Tensor], None]) -> None:
    table = parts(entries)
    x = torch.randn(40_003, generator=torch.Generator().manual_seed(1)) * 2
    x = torch.cat([x, table[0], torch.nextafter(table[0], torch.tensor(-9.0)), torch.tensor([0.0, -0.0, 1e37, -1e-45])])
    same_bits(native.piecewise_linear(x, *table), by_numpy(x, *table))


def test_ends_of_the_line(isa: str) -> None:
    breakpoints, slopes, intercepts = parts(16)
    slopes[0], slopes[-1] = 0.0, 2.0
    y = native.piecewise_linear(torch.tensor([torch.inf, -torch.inf, torch.nan, -9.0]), breakpoints, slopes, intercepts)
    assert y[0] == torch.inf and y[1].isnan() and y[2].isnan() and y[3] == intercepts[0]


def test_breakpoints_that_coincide_leave_out_the_segment_between(isa: str) -> None:
    table = (torch.tensor([1.0, 1.0]), torch.tensor([0.0, 7.0, 2.0]), torch.tensor([0.0, 7.0, 3.0]))
    assert native.piecewise_linear(torch.tensor([0.5, 1.0, 2.0]), *table).tolist() == [0.0, 5.0, 7.0]


def test_shape_dtype_and_memory_layout_are_the_inputs() -> None:
    table, x = parts(16), torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    expected = by_numpy(x.T.contiguous(), *table)
    torch.testing.assert_close(native.piecewise_linear(x.T, *table), expected, rtol=0, atol=0)
    half = native.piecewise_linear(x.bfloat16(), *table)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, by_numpy(x.bfloat16().float(), *table).bfloat16(), rtol=0, atol=0)
    assert native.piecewise_linear(torch.empty(0, 3), *table).shape == (0, 3)


def test_pytorch_computes_the_same_with_and_without_gradients(
    monkeypatch: pytest.MonkeyPatch, same_bits: Callable[[Tensor, Tensor], None]
) -> None:
    table, x = parts(16), torch.randn(1000, generator=torch.Generator().manual_seed(3))
    expected = native.piecewise_linear(x, *table)
    x.requires_grad_()
    y = native.piecewise_linear(x, *table)
    same_bits(y.detach(), expected)
    y.sum().backward()
    slope = table[1][torch.bucketize(x.detach(), table[0], right=True)]
    assert x.grad is not None and torch.equal(x.grad, slope)
    monkeypatch.setattr(native, "_library", lambda: None)
    same_bits(native.piecewise_linear(x.detach(), *table), expected)


def test_values_are_written_where_they_are_asked_for() -> None:
    table, x = parts(16), torch.linspace(-3, 3, 50)
    expected = native.piecewise_linear(x, *table)
    out = torch.empty(50)
    assert native.piecewise_linear(x, *table, out=out) is out and torch.equal(out, expected)
    assert native.piecewise_linear(x, *table, out=x) is x and torch.equal(x, expected)
    for wrong in (torch.empty(49), torch.empty(50).double(), torch.empty(100)[::2]):
        with pytest.raises(ValueError, match="out"):
            native.piecewise_linear(x, *table, out=wrong)


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"x": None}, TypeError),
        ({"x": torch.ones(3).int()}, ValueError),
        ({"breakpoints": torch.ones(14)}, ValueError),
        ({"breakpoints": torch.ones(15).double()}, ValueError),
        ({"intercepts": torch.ones(17)}, ValueError),
        ({"slopes": torch.ones(32)[::2]}, ValueError),
        ({"slopes": torch.ones(16, device="meta")}, ValueError),
        ({"breakpoints": torch.ones(256), "slopes": torch.ones(257), "intercepts": torch.ones(257)}, ValueError),
        ({"breakpoints": torch.ones(0), "slopes": torch.ones(0), "intercepts": torch.ones(0)}, ValueError),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, Any], error: type[Exception]) -> None:
    names = ("x", "breakpoints", "slopes", "intercepts")
    arguments = dict(zip(names, (torch.ones(3), *parts(16)), strict=True)) | changed
    with pytest.raises(error):
        native.piecewise_linear(*arguments.values())
    if error is ValueError:
        with pytest.raises(error):
            torch.ops.reqat.piecewise_linear(*arguments.values())


@pytest.mark.parametrize("name", ["expf", "erff"])
def test_libms_vector_functions_are_the_named_ones(isa: str, name: str) -> None:
    x = torch.linspace(-9, 0, 64)
    out = torch.empty_like(x)
    if not native.libmvec(name, x, out):
        pytest.skip(f"no vectorized {name} here")
    torch.testing.assert_close(out, {"expf": torch.exp, "erff": torch.erf}[name](x), rtol=2e-6, atol=1e-12)


def test_a_function_that_libm_does_not_have_is_none() -> None:
    assert not native.libmvec("no_such_function", torch.ones(16), torch.ones(16))
    with pytest.raises(ValueError, match="16"):
        native.libmvec("expf", torch.ones(17), torch.ones(17))
