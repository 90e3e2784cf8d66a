"""Scales: every stored value, rounding boundary and exponent rule, against ml_dtypes, torch and exact numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import gfloat
import ml_dtypes
import numpy as np
import pytest
import torch
from gfloat.formats import format_info_ocp_e4m3, format_info_ocp_e5m2
from torch import Tensor

from reqat.formats import ELEMENTS, get_format, global_scale_for, quantize
from reqat.formats.scales import SCALE_TYPES, e8m0_from_amax, e8m0_to_float, global_scale_from_amax, round_to_float

FLOAT8 = {
    "E4M3": (torch.float8_e4m3fn, ml_dtypes.float8_e4m3fn, format_info_ocp_e4m3, 0x7F),
    "E5M2": (torch.float8_e5m2, ml_dtypes.float8_e5m2, format_info_ocp_e5m2, 0x7C),
}
INFINITY = torch.tensor(torch.inf)


def finite_values(name: str) -> Tensor:
    """Every finite non-negative value of a scale type, as float32, ascending."""
    if name == "FP16":
        return torch.arange(31744, dtype=torch.int16).view(torch.float16).float()
    return torch.arange(FLOAT8[name][3], dtype=torch.uint8).view(FLOAT8[name][0]).float()


def boundaries(values: Tensor) -> Tensor:
    """Values and midpoints of neighbours, each with the float32 below and above."""
    points = torch.cat((values, (values[1:] + values[:-1]) / 2))
    points = torch.cat((points, torch.nextafter(points, INFINITY), torch.nextafter(points, -INFINITY)))
    return points[points >= 0]


@pytest.mark.parametrize("name", ["E4M3", "E5M2"])
def test_the_256_bytes_of_a_float8_mean_what_ml_dtypes_says(name: str):
    torch_type, numpy_type, _, _ = FLOAT8[name]
    ours = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch_type).float().numpy()
    theirs = np.arange(256, dtype=np.uint8).view(numpy_type).astype(np.float32)
    assert np.array_equal(ours, theirs, equal_nan=True)


def test_the_255_exponents_of_e8m0():
    bytes_ = torch.arange(255, dtype=torch.int32).to(torch.uint8)
    expected = bytes_.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert np.array_equal(e8m0_to_float(bytes_).numpy(), expected)
    assert e8m0_to_float(bytes_)[0] == 2.0**-127


@pytest.mark.parametrize("name", ["E4M3", "E5M2", "FP16"])
def test_rounding_to_a_stored_float_is_torchs_and_ml_dtypes_cast(name: str, bf16_values: Tensor):
    kind = SCALE_TYPES[name]
    t = torch.cat((boundaries(finite_values(name)), bf16_values[bf16_values >= 0]))
    ours = round_to_float(t, kind)
    assert torch.equal(ours, t.clamp(max=kind.max).to(kind.dtype).float())
    assert torch.equal(ours.to(kind.dtype).float(), ours), "not representable in the stored type"
    numpy_type = {"FP16": np.float16, **{key: value[1] for key, value in FLOAT8.items()}}[name]
    assert np.array_equal(ours.numpy(), t.clamp(max=kind.max).numpy().astype(numpy_type).astype(np.float32))


@pytest.mark.parametrize("name", ["E4M3", "E5M2"])
@pytest.mark.parametrize("rounding", ["even", "away"])
def test_rounding_to_a_stored_float_is_gfloats(name: str, rounding: str):
    t = boundaries(finite_values(name))
    mode = gfloat.RoundMode.TiesToEven if rounding == "even" else gfloat.RoundMode.TiesToAway
    expected = gfloat.round_ndarray(FLOAT8[name][2], t.double().numpy(), mode, sat=True)
    # gfloat saturates E5M2 to its infinity's neighbour only when told so; ours never stores infinity.
    assert np.array_equal(round_to_float(t, SCALE_TYPES[name], rounding).double().numpy(), expected)


def exact_exponent(rule: str, amax: float, element: str) -> int:
    """The rule for a normal amax in exact arithmetic (frexp: amax = m * 2^e, m in [0.5, 1)); at least -127."""
    m, e = math.frexp(amax)
    if rule == "rceil":  # smallest k with emax * 2^k >= amax
        emax_m, emax_e = math.frexp(ELEMENTS[element].emax)
        return max(-127, e - emax_e + (m > emax_m))
    carry = rule == "even" and 2 * m >= {"E2M1": 1.75, "E1M2": 1.875}[element]
    return max(-127, e - 1 + carry - {"E2M1": 2, "E1M2": 1}[element])


@pytest.mark.parametrize("element", ["E2M1", "E1M2"])
@pytest.mark.parametrize("rule", ["floor", "rceil", "even"])
def test_exponent_rules_are_exact_at_every_threshold_of_every_binade(rule: str, element: str):
    mantissas = torch.tensor([1.0, 1.25, 1.5, 1.75, 1.875, 1.99], dtype=torch.float64)
    # For ceil from 2^-123: below, amax / emax is a subnormal number, see the next test.
    points = (
        (2.0 ** torch.arange(-123 if rule == "rceil" else -125, 128).double()[:, None] * mantissas).flatten().float()
    )
    points = torch.cat((points, torch.nextafter(points, INFINITY), torch.nextafter(points, -INFINITY)))
    points = torch.cat((points, torch.tensor([torch.finfo(torch.float32).max])))
    ours = e8m0_from_amax(points, ELEMENTS[element], rule) - 127
    assert ours.tolist() == [exact_exponent(rule, amax, element) for amax in points.tolist()]


@pytest.mark.parametrize("element", ["E2M1", "E1M2"])
def test_below_the_normal_numbers(element: str):
    """floor and even clamp to 2^-127; ceil looks at amax / emax as float32 rounds it, 2^-127 or 2^-126."""
    patterns = [0, 1, 2, 3, 0x3FFFFF, 0x400000, 0x400001, 0x7FFFFF]
    amax = torch.tensor(patterns, dtype=torch.int32).view(torch.float32)
    for rule in ("floor", "even"):
        assert (e8m0_from_amax(amax, ELEMENTS[element], rule) == 0).all()
    emax = ELEMENTS[element].emax
    amax = torch.cat((amax, 2.0**-127 * emax * torch.tensor([0.5, 0.99, 1.0, 1.01, 1.99, 2.0])))
    quotient = (amax.double() / emax).float()
    expected = torch.where(quotient <= 2.0**-127, 0, 1)
    assert torch.equal(e8m0_from_amax(amax, ELEMENTS[element], "rceil"), expected.int())


def test_ceil_uses_the_quotient_rounded_to_float32_and_loses_nothing_by_it():
    """amax / 6 rounds to a power of two from above for no float32 amax, so the rule equals the exact one (above)."""
    just_over = torch.nextafter(6 * 2.0 ** torch.arange(-100, 125).float(), INFINITY)
    powers = 2.0 ** torch.arange(-100, 125).float()
    assert torch.equal(e8m0_to_float(e8m0_from_amax(just_over, ELEMENTS["E2M1"], "rceil")), 2 * powers)


def test_each_e4m3_scale_is_stored_and_read_back():
    """With g = 1 a block with maximum 6 s must store exactly s: all positive finite bytes, subnormal ones too."""
    codes = torch.arange(1, 127, dtype=torch.uint8)
    x = codes.view(torch.float8_e4m3fn).float()[:, None] * torch.tensor([-6, 1.5] + [0] * 14)
    q = quantize(x, "NVFP4", global_scale=1.0)
    assert torch.equal(q.scales.view(torch.uint8)[:, 0], codes)
    assert (q.codes[:, :2] == torch.tensor([15, 3])).all()
    assert torch.equal(q.dequantize(), x)


@pytest.mark.parametrize("rule", ["rceil", "floor", "even"])
def test_each_e8m0_scale_is_stored_and_read_back(rule: str):
    bytes_ = torch.arange(1, 252, dtype=torch.int32).to(torch.uint8)
    x = e8m0_to_float(bytes_)[:, None] * torch.tensor([6, -0.5] + [0] * 30)
    q = quantize(x, "MXFP4", scale_rule=rule)
    assert torch.equal(q.scales[:, 0], bytes_)
    assert torch.equal(q.dequantize(), x)


@pytest.mark.parametrize("name", ["E5M2", "E4M3"])
def test_each_float8_scale_of_amxfp4_is_stored_and_read_back(name: str):
    codes = torch.arange(1, FLOAT8[name][3], dtype=torch.uint8)
    s = codes.view(FLOAT8[name][0]).float()
    x = torch.zeros(len(codes), 32)
    x[:, 0], x[:, 1], x[:, 2] = 6 * s, -6 * 448.0, -1.5 * 448.0
    q = quantize(x, "AMXFP4", scale=name)
    assert torch.equal(q.scales.view(torch.uint8)[:, 0, 0], codes)
    assert (q.scales.float()[:, 0, 1] == 448).all()
    assert torch.equal(q.dequantize(), x)


def test_global_scale_maps_the_maximum_to_the_top():
    x = torch.tensor([[3.0, -12.0], [0.0, 6.0]])
    for name, options, product in (
        ("NVFP4", {}, 2688),
        ("NVFP4", {"element": "E1M2"}, 1568),
        ("NVFP4-4/6", {}, 1536),
    ):
        assert float(global_scale_for(x, get_format(name, **options))) == pytest.approx(product / 12, rel=2**-23)
    rows = global_scale_for(x, get_format("NVFP4", global_scale="row"))
    assert rows.tolist() == [[224.0], [448.0]]
    columns = global_scale_for(x, get_format("NVFP4", global_scale="row"), axis=0)
    assert columns.tolist() == [[896.0, 224.0]]


def test_global_scale_at_the_ends_of_float32():
    amax = torch.tensor([0.0, 1e-45, 1e-38, 7e-36, 3.4028234663852886e38])
    for rule in ("divide", "reciprocal"):
        g = global_scale_from_amax(amax, 448, 6, rule)
        assert g[0] == 1 and (g[1:4] == torch.finfo(torch.float32).max).all()
        assert torch.isfinite(448 / g).all() and (g > 0).all()


def test_row_scales_have_the_shape_of_the_other_axes(same_bits: Callable[[Tensor, Tensor], None]):
    x = torch.randn(2, 3, 5, 32)
    q = quantize(x, "NVFP4", global_scale="row")
    assert q.global_scale is not None and q.global_scale.shape == (2, 3, 5, 1)
    same_bits(q.global_scale, global_scale_for(x, q.format))
    q = quantize(x.movedim(-1, 1), "NVFP4", global_scale="row", axis=1)
    assert q.global_scale is not None and q.global_scale.shape == (2, 1, 3, 5)
