"""Elements against ml_dtypes and gfloat over every bfloat16, and beside every tie."""

from __future__ import annotations

import gfloat
import ml_dtypes
import numpy as np
import pytest
import torch
from gfloat.formats import format_info_ocp_e2m1
from gfloat.types import Domain
from torch import Tensor

from reqat.formats import ELEMENTS, Element

E1M2_INFO = gfloat.FormatInfo(
    name="e1m2",
    k=4,
    precision=3,
    bias=0,
    is_signed=True,
    domain=Domain.Finite,
    has_nz=True,
    num_high_nans=0,
    has_subnormals=True,
    is_twos_complement=False,
)
INFO = {"E2M1": format_info_ocp_e2m1, "E1M2": E1M2_INFO}
ROUNDING = {"even": gfloat.RoundMode.TiesToEven, "away": gfloat.RoundMode.TiesToAway}


def rounded(element: Element, y: Tensor, rounding: str = "even", clip: bool = True) -> Tensor:
    return element.round_(y.clone(), torch.empty_like(y), rounding=rounding, clip=clip)


def encoded(element: Element, y: Tensor, rounding: str = "even") -> Tensor:
    return element.encode(rounded(element, y, rounding), torch.signbit(y))


def around_ties(element: Element) -> Tensor:
    """Every midpoint of neighbouring magnitudes with the float32 just below and above it, magnitudes, both signs."""
    magnitudes = torch.tensor(element.magnitudes)
    midpoints = (magnitudes[1:] + magnitudes[:-1]) / 2
    points = torch.cat((magnitudes, midpoints, torch.tensor([element.emax + 1, element.clip_above])))
    below = torch.nextafter(points, torch.tensor(-torch.inf))
    above = torch.nextafter(points, torch.tensor(torch.inf))
    points = torch.cat((points, below, above))
    return torch.cat((points, -points))


def test_magnitudes_are_those_of_the_specification():
    assert ELEMENTS["E2M1"].magnitudes == (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    assert ELEMENTS["E1M2"].magnitudes == (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5)
    assert ELEMENTS["INT4"].magnitudes == tuple(range(8))
    assert [ELEMENTS[name].emax for name in ("E2M1", "E1M2", "INT4")] == [6, 3.5, 7]


def test_e2m1_codes_and_values_equal_ml_dtypes_on_every_bfloat16(bf16_values: Tensor):
    expected = bf16_values.numpy().astype(ml_dtypes.float4_e2m1fn)
    assert np.array_equal(rounded(ELEMENTS["E2M1"], bf16_values).numpy(), expected.astype(np.float32))
    # Codes bit for bit: -0 and negative numbers that round to zero have code 8 there as well.
    assert np.array_equal(encoded(ELEMENTS["E2M1"], bf16_values).numpy(), expected.view(np.uint8))


@pytest.mark.parametrize("rounding", ["even", "away"])
@pytest.mark.parametrize("name", ["E2M1", "E1M2"])
def test_values_equal_gfloat_on_every_bfloat16(name: str, rounding: str, bf16_values: Tensor):
    expected = gfloat.round_ndarray(INFO[name], bf16_values.double().numpy(), ROUNDING[rounding], sat=True)
    assert np.array_equal(rounded(ELEMENTS[name], bf16_values, rounding).double().numpy(), expected)


@pytest.mark.parametrize("rounding", ["even", "away"])
@pytest.mark.parametrize("name", ["E2M1", "E1M2"])
def test_values_equal_gfloat_beside_every_tie(name: str, rounding: str):
    y = around_ties(ELEMENTS[name])
    expected = gfloat.round_ndarray(INFO[name], y.double().numpy(), ROUNDING[rounding], sat=True)
    assert np.array_equal(rounded(ELEMENTS[name], y, rounding).double().numpy(), expected)


def test_int4_is_round_half_even_within_seven(bf16_values: Tensor):
    y = torch.cat((bf16_values, around_ties(ELEMENTS["INT4"])))
    assert torch.equal(rounded(ELEMENTS["INT4"], y), y.round().clamp(-7, 7))
    half_away = torch.trunc(y.double().clamp(-7, 7) + torch.copysign(torch.tensor(0.5, dtype=torch.float64), y))
    assert torch.equal(rounded(ELEMENTS["INT4"], y, "away").double(), half_away)


@pytest.mark.parametrize("name", ["INT2", "INT3", "INT8", "TERNARY"])
def test_integers_round_half_even_within_their_range(name: str, bf16_values: Tensor):
    element, most = ELEMENTS[name], {"INT2": 1, "INT3": 3, "INT8": 127, "TERNARY": 1}[name]
    y = torch.cat((bf16_values, around_ties(element)))
    assert torch.equal(rounded(element, y), y.round().clamp(-most, most))
    half_away = torch.trunc(y.double().clamp(-most, most) + torch.copysign(torch.tensor(0.5, dtype=torch.float64), y))
    assert torch.equal(rounded(element, y, "away").double(), half_away)


@pytest.mark.parametrize("name", ["MID2", "MID4"])
def test_mid_elements_are_the_nearest_half_integers(name: str, bf16_values: Tensor):
    element, most = ELEMENTS[name], {"MID2": 1.5, "MID4": 7.5}[name]
    y = torch.cat((bf16_values, around_ties(element)))
    levels = torch.arange(-most, most + 1, dtype=torch.float64)
    distance = (y.double().clamp(-most, most)[:, None] - levels).abs()
    assert set(rounded(element, y).unique().tolist()) == set(levels.tolist())
    for rounding in ("even", "away"):
        found = rounded(element, y, rounding).double()
        assert torch.equal((y.double().clamp(-most, most) - found).abs(), distance.amin(-1))
    ties = torch.arange(-most + 0.5, most)
    assert not (encoded(element, ties) % 2).any()
    assert torch.equal(rounded(element, ties, "away").abs(), ties.abs() + 0.5)


@pytest.mark.parametrize(("name", "theirs"), [("INT2", ml_dtypes.int2), ("INT4", ml_dtypes.int4)])
def test_codes_of_integers_are_those_of_ml_dtypes(name: str, theirs: type):
    element = ELEMENTS[name]
    codes = np.arange(2**element.bits, dtype=np.uint8)
    numbers = codes.view(theirs).astype(np.float32)
    assert np.array_equal(element.decode(torch.from_numpy(codes)).numpy(), numbers)
    y = torch.arange(-element.emax, element.emax + 1)
    assert np.array_equal(encoded(element, y).numpy(), y.numpy().astype(theirs).view(np.uint8) & (2**element.bits - 1))


def test_e4m3_codes_and_values_equal_ml_dtypes_on_every_bfloat16(bf16_values: Tensor):
    y = torch.cat((bf16_values, around_ties(ELEMENTS["E4M3"])))
    expected = y.clamp(-448, 448).numpy().astype(ml_dtypes.float8_e4m3fn)  # ml_dtypes overflows to NaN
    assert np.array_equal(rounded(ELEMENTS["E4M3"], y).numpy(), expected.astype(np.float32))
    assert np.array_equal(encoded(ELEMENTS["E4M3"], y).numpy(), expected.view(np.uint8))


def test_ties_of_the_specification():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert rounded(ELEMENTS["E2M1"], ties).tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert rounded(ELEMENTS["E2M1"], -ties).tolist() == [0, -1, -1, -2, -2, -4, -4]
    assert rounded(ELEMENTS["E2M1"], ties, "away").tolist() == [0.5, 1, 1.5, 2, 3, 4, 6]


@pytest.mark.parametrize("name", ELEMENTS)
@pytest.mark.parametrize("rounding", ["even", "away"])
def test_without_clip_nothing_changes_up_to_the_stated_bound(name: str, rounding: str, bf16_values: Tensor):
    element = ELEMENTS[name]
    y = torch.cat((bf16_values, around_ties(element), torch.tensor([element.clip_above])))
    y = y[y.abs() <= element.clip_above]
    assert torch.equal(rounded(element, y, rounding, clip=False), rounded(element, y, rounding))


@pytest.mark.parametrize("name", [name for name in ELEMENTS if not ELEMENTS[name].offset])
@pytest.mark.parametrize("rounding", ["even", "away"])
def test_no_negative_zero_comes_out(name: str, rounding: str):
    y = torch.tensor([-0.0, -1e-45, -1e-30, -0.4 * ELEMENTS[name].magnitudes[1]])
    assert not torch.signbit(rounded(ELEMENTS[name], y, rounding)).any()
    assert not torch.signbit(ELEMENTS[name].decode(encoded(ELEMENTS[name], y, rounding))).any()


@pytest.mark.parametrize("name", ELEMENTS)
def test_each_code(name: str):
    element = ELEMENTS[name]
    half = 2 ** (element.bits - 1)
    codes = torch.arange(2 * half, dtype=torch.int32).to(torch.uint8)
    values = element.decode(codes)
    if not element.signed:
        assert values.tolist() == [*range(2 * half)]
        assert torch.equal(element.encode(values, torch.signbit(values)), codes)
    elif element.integer:
        assert values.tolist() == [code + element.offset for code in (*range(half), *range(-half, 0))]
        if not element.offset:
            codes, values = codes[codes != half], values[codes != half]  # the lowest is never produced
        assert torch.equal(element.encode(values, torch.signbit(values)), codes)
    else:
        finite = ~values.isnan()
        assert values[:half][finite[:half]].tolist() == list(element.magnitudes)
        assert values[half:][finite[half:]].tolist() == [-m for m in element.magnitudes]
        assert codes[~finite].tolist() == ([127, 255] if name == "E4M3" else [])
        assert torch.equal(element.encode(values, codes >= half)[finite], codes[finite])


@pytest.mark.parametrize("name", ELEMENTS)
def test_infinite_quotients_saturate(name: str):
    y = torch.tensor([torch.inf, -torch.inf, 1e38, -1e38, 1e7, 2.0**22, 2.0**24 + 2])
    for rounding in ("even", "away"):
        assert torch.equal(rounded(ELEMENTS[name], y, rounding), torch.sign(y) * ELEMENTS[name].emax)
