"""Whole tensors: the fast path against codes and the naive twin, on hard blocks, by properties, along any axis."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reqat
from reqat.formats import Format, PackedTensor, get_format, global_scale_for, quantize, quantize_dequantize

SameBits = Callable[[Tensor, Tensor], None]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FAMILIES = ["MXFP4", "NVFP4", "NVFP4-4/6", "AMXFP4", "INT4-g128", "INT4-row", "INT2-row", "INT3-tensor"]
FAMILIES += ["INT4-g32", "AINT4-g32", "AINT4-row", "MXFP4-4/3"]
# Which of two scales four-over-six takes hangs on a comparison of two float32 sums; where they tie to the last bits the
# order of summation decides, so the twin, which sums in float64, may differ there.
TIES_DECIDED_BY_SUMMATION = "adaptive"


def tensors(block: int = 128, max_blocks: int = 3) -> st.SearchStrategy[Tensor]:
    """[rows, k * block] float32: random mantissas, exponents spread by block, zeros, repeated and tied values."""

    @st.composite
    def build(draw: st.DrawFn) -> Tensor:
        rows, blocks = draw(st.integers(1, 4)), draw(st.integers(1, max_blocks))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
        x = torch.randn(rows, blocks * block, generator=generator)
        spread = draw(st.sampled_from([0.0, 1.0, 4.0, 20.0]))
        x *= torch.exp(spread * torch.randn(rows, blocks * block // 16, generator=generator)).repeat_interleave(16, 1)
        if draw(st.booleans()):  # few mantissa bits: ties
            x = x.bfloat16().float() if draw(st.booleans()) else (x * 4).round() / 4
        x *= 2.0 ** draw(st.integers(-60, 60))
        zeros = draw(st.sampled_from([0.0, 0.5, 0.99]))
        x = x.clamp(-1e38, 1e38)
        return x * (torch.rand(x.shape, generator=generator) >= zeros)

    return build()


def given_tensors(block: int = 128) -> Callable:
    def decorate(test: Callable) -> Callable:
        return settings(max_examples=15)(given(x=tensors(block))(test))

    return decorate


# --- the two paths, and the twin --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fake_equals_codes_on_hard_blocks(
    fmt: Format, hard_blocks: dict[str, Tensor], dtype: torch.dtype, same_bits: SameBits
):
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    for hard in hard_blocks.values():
        x = hard.double().clamp(-largest, largest).to(dtype)
        fake = quantize_dequantize(x, fmt)
        same_bits(fake, quantize(x, fmt).dequantize())
        assert torch.isfinite(fake).all()
        assert not (torch.signbit(fake) & (fake == 0)).any()


def test_equals_the_naive_twin_on_hard_blocks(
    fmt: Format, hard_blocks: dict[str, Tensor], naive_twin: Callable, same_bits: SameBits
):
    for hard in hard_blocks.values():
        check_twin(hard, fmt, naive_twin, same_bits)


@given_tensors()
@pytest.mark.parametrize("name", [*FAMILIES, "INT8-tensor", "TERNARY-row", "FP8-row"])
def test_fake_equals_codes_and_twin(name: str, naive_twin: Callable, same_bits: SameBits, x: Tensor):
    fmt = get_format(name)
    same_bits(quantize_dequantize(x, fmt), quantize(x, fmt).dequantize())
    check_twin(x, fmt, naive_twin, same_bits)


def check_twin(x: Tensor, fmt: Format, naive_twin: Callable, same_bits: SameBits) -> None:
    q = quantize(x, fmt)
    block = fmt.block or x.shape[-1]
    g = None
    if q.global_scale is not None:
        g = q.global_scale.expand(*x.shape[:-1], 1).repeat_interleave(x.shape[-1] // block, -1).flatten().numpy()
    expected = torch.from_numpy(naive_twin(x.reshape(-1, block).numpy(), fmt, g)).view_as(x)
    if fmt.adaptive:
        ours = quantize_dequantize(x, fmt)
        errors = [((y.double() - x.double()) ** 2).unflatten(-1, (-1, 16)).sum(-1) for y in (ours, expected)]
        blocks = (ours != expected).unflatten(-1, (-1, 16)).any(-1)
        assert torch.allclose(errors[0][blocks], errors[1][blocks], rtol=1e-5, atol=0), TIES_DECIDED_BY_SUMMATION
        return
    same_bits(quantize_dequantize(x, fmt), expected)


def test_pieces_do_not_matter(fmt: Format, same_bits: SameBits, monkeypatch: pytest.MonkeyPatch):
    """A tensor larger than one cache-sized piece, not a multiple of it, against itself in parts."""
    fmt = fmt.replace(global_scale="row") if fmt.has_global_scale else fmt
    x = torch.randn(301, 256) * torch.exp(torch.randn(301, 1))
    if fmt.per_tensor:  # parts of a tensor have other scales
        with monkeypatch.context() as patched:
            patched.setattr(sys.modules["reqat.formats.quantize"], "_PIECE", x.numel())
            rows = quantize_dequantize(x, fmt)
    else:
        rows = torch.cat([quantize_dequantize(row, fmt) for row in x.split(43)])
    same_bits(quantize_dequantize(x, fmt), rows)
    same_bits(quantize(x, fmt).dequantize(), rows)


# --- axes, shapes, padding, types -------------------------------------------------------------------------------------


def test_an_axis_is_a_transpose(fmt: Format, same_bits: SameBits):
    last = torch.randn(2, 3, 256)
    expected = quantize(last, fmt)
    end = -fmt.scale_parts  # a pair of scales, or of scale and zero point, is in a last axis of its own
    for axis in (0, 1, 2, -1, -2, -3):
        x = last.movedim(-1, axis).contiguous()
        q = quantize(x, fmt, axis=axis)
        assert q.codes.shape == x.shape and q.axis == axis % 3 and q.shape == x.shape
        same_bits(q.codes.movedim(axis, -1), expected.codes)
        assert torch.equal(q.scales.movedim(axis % 3, end).float(), expected.scales.float())
        same_bits(q.dequantize(), expected.dequantize().movedim(-1, axis).contiguous())
        same_bits(quantize_dequantize(x, fmt, axis=axis), q.dequantize())
        same_bits(q.pack().unpack().codes, q.codes)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(0, 1),
    "axis not last in memory": lambda x: x.transpose(0, 2),
    "every second row": lambda x: x[:, ::2],
    "every second element": lambda x: x[..., ::2],
    "one row": lambda x: x[0, 0],
    "expanded": lambda x: x[:1].expand(5, -1, -1),
}


def test_strides_do_not_matter(fmt: Format, same_bits: SameBits):
    for view in VIEWS.values():
        x = view(torch.randn(128, 6, 256)[..., :128])
        before = x.clone()
        expected = quantize_dequantize(x.contiguous(), fmt, pad=True)
        same_bits(quantize_dequantize(x, fmt, pad=True), expected)
        same_bits(quantize(x, fmt, pad=True).dequantize(), expected)
        same_bits(x, before)


def test_keys_of_an_attention_layer_keep_their_strides(same_bits: SameBits):
    keys = torch.randn(2, 7, 4, 32).transpose(1, 2)  # [B, H, T, D] of [B, T, H, D]
    fake = quantize_dequantize(keys, "NVFP4", element="E1M2")
    assert fake.stride() == keys.stride()
    same_bits(fake, quantize_dequantize(keys.contiguous(), "NVFP4", element="E1M2"))


@pytest.mark.parametrize("axis", [0, 1])
def test_padding_is_appending_zeros(fmt: Format, axis: int, same_bits: SameBits):
    for length in (1, 5, 16, 31, 33, 100, 129):
        x = torch.randn(length, 3) if axis == 0 else torch.randn(3, length)
        missing = -length % (fmt.block or length)
        padded = torch.nn.functional.pad(x, (0, 0, 0, missing) if axis == 0 else (0, missing))
        q = quantize(x, fmt, axis=axis, pad=True)
        assert q.codes.shape == padded.shape and q.shape == x.shape
        same_bits(q.codes, quantize(padded, fmt, axis=axis).codes)
        expected = quantize_dequantize(padded, fmt, axis=axis).narrow(axis, 0, length)
        same_bits(q.dequantize(), expected.contiguous())
        same_bits(quantize_dequantize(x, fmt, axis=axis, pad=True), expected)
        same_bits(q.pack().dequantize(), q.dequantize())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_arithmetic_is_float32_whatever_the_type(fmt: Format, dtype: torch.dtype, same_bits: SameBits):
    x = (torch.randn(8, 256) * 3).to(dtype)
    q, reference = quantize(x, fmt), quantize(x.float(), fmt)
    same_bits(q.codes, reference.codes)
    assert torch.equal(q.scales.float(), reference.scales.float())
    same_bits(q.dequantize(), reference.dequantize().to(dtype))
    same_bits(q.dequantize(torch.float32), reference.dequantize())
    assert quantize_dequantize(x, fmt).dtype == dtype


@pytest.mark.parametrize("shape", [(0, 128), (2, 0, 128), (3, 0), (0,)])
def test_empty_tensors(fmt: Format, shape: tuple[int, ...]):
    x = torch.empty(shape)
    q = quantize(x, fmt)
    assert q.dequantize().shape == quantize_dequantize(x, fmt).shape == q.pack().dequantize().shape == shape


def test_zeros_stay_zeros_without_a_nan(fmt: Format):
    for dtype in DTYPES:
        q = quantize(torch.zeros(2, 256, dtype=dtype), fmt)
        scales = q.block_scales()  # of affine formats without zero points
        assert not q.codes.any() and (scales > 0).logical_or(torch.tensor(fmt.scale == "E8M0")).all()
        least = 2.0**-25 if fmt.element_type.offset else 0.0  # an element without a zero
        for x in (q.dequantize(), quantize_dequantize(torch.zeros(2, 256, dtype=dtype), fmt)):
            assert (x == least).all()
        assert q.global_scale is None or (q.global_scale == 1).all()


def test_the_sign_of_zero_is_kept_in_the_code_alone():
    q = quantize(torch.tensor([-0.0, 0.0, -1e-9, 1e-9, -6.0] + [0.0] * 27), "MXFP4")
    assert q.codes[:5].tolist() == [8, 0, 8, 0, 15]
    assert not torch.signbit(q.dequantize()[:4]).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_up_at_the_end_of_a_type_saturates(fmt: Format, dtype: torch.dtype):
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    x = torch.linspace(-largest, largest, 256, dtype=torch.float64).to(dtype)
    assert torch.isfinite(quantize_dequantize(x, fmt)).all()
    assert torch.isfinite(quantize(x, fmt).dequantize()).all()


def test_input_is_untouched_and_no_gradient_flows(fmt: Format):
    x = torch.randn(2, 256, requires_grad=True)
    before = x.detach().clone()
    assert not quantize_dequantize(x, fmt).requires_grad and not quantize(x, fmt).dequantize().requires_grad
    assert torch.equal(x.detach(), before)


# --- properties of the numbers ----------------------------------------------------------------------------------------


@given_tensors()
@pytest.mark.parametrize("name", FAMILIES)
def test_error_is_within_half_a_step(name: str, x: Tensor):
    """|x^ - x| <= S (half of E2M1's largest spacing; half of that elsewhere), plus what a coarse scale cuts off."""
    q = quantize(x, name)
    block = q.format.block or x.shape[-1]
    blocks = x.double().unflatten(-1, (-1, block))
    error = (q.dequantize().double() - x.double()).unflatten(-1, (-1, block)).abs()
    S = q.block_scales().double()
    S = torch.where(blocks < 0, S[..., 1:], S[..., :1]) if q.format.asymmetric else S[..., None]
    half_step = {"E2M1": 1.0}.get(q.format.element, 0.5)
    cut_off = (blocks.abs() - q.format.element_type.emax * S).clamp(min=0)
    # x / S and code * S are rounded to float32: near half a step an error of either is that of a number of x's size.
    rounded = 2.0**-24 * (2 * blocks.abs() + error)
    assert (error <= torch.maximum(half_step * S, cut_off) * (1 + 1e-6) + rounded).all()


@given_tensors(32)
@pytest.mark.parametrize("rule", ["ceil", "even", "floor"])
def test_mxfp4_error_without_cut_off(rule: str, x: Tensor):
    q = quantize(x, "MXFP4", scale_rule=rule)
    ratio = (x.unflatten(-1, (-1, 32)).abs() / q.block_scales()[..., None]).amax(-1)
    assert (ratio <= {"ceil": 6, "even": 7, "floor": 8}[rule]).all()


@given_tensors()
@pytest.mark.parametrize("name", [*FAMILIES, "NVFP4 row"])
def test_scaling_by_a_power_of_two_scales_the_result(name: str, same_bits: SameBits, x: Tensor):
    """Nothing rounds differently as long as no exponent leaves its range: codes do not depend on the unit."""
    name, _, mode = name.partition(" ")
    options = {"global_scale": mode} if mode else {}
    x = torch.where(x.abs() > 2.0**-30 * x.abs().amax(), x, 0)
    x = x / 2.0 ** float(torch.log2(x.abs().amax() + 1e-30).floor())  # maximum in [1, 2), the rest at least 2^-30
    exponents = (-3, 3) if name == "AMXFP4" else (-60, 60)  # E5M2 has a short range and no global scale above it
    if name == "AMXFP4":
        x = torch.where(x.abs() > 2.0**-6, x, 0)
    q = quantize(x, name, **options)
    for k in exponents:
        scaled = quantize(x * 2.0**k, name, **options)
        same_bits(scaled.codes, q.codes)
        same_bits(scaled.dequantize(), q.dequantize() * 2.0**k)


@given_tensors()
@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("AINT")])
def test_negating_negates(name: str, x: Tensor):
    assert torch.equal(quantize_dequantize(-x, name), -quantize_dequantize(x, name))


@given_tensors(32)
@pytest.mark.parametrize("rule", ["ceil", "even", "floor"])
def test_mxfp4_is_idempotent(rule: str, same_bits: SameBits, x: Tensor):
    once = quantize_dequantize(x, "MXFP4", scale_rule=rule)
    same_bits(quantize_dequantize(once, "MXFP4", scale_rule=rule), once)


@given_tensors(16)
@pytest.mark.parametrize("element", ["E2M1", "E1M2"])
def test_nvfp4_with_a_static_scale_is_idempotent_in_its_codes(element: str, same_bits: SameBits, x: Tensor):
    """Where block scales are normal E4M3: a subnormal one may let the block's maximum round to less than emax."""
    g = global_scale_for(x, get_format("NVFP4", element=element))
    q = quantize(x, "NVFP4", element=element, global_scale=g)
    normal = q.scales.float() >= 2.0**-6
    again = quantize(q.dequantize(), "NVFP4", element=element, global_scale=g)
    keep = normal.repeat_interleave(16, -1)
    same_bits(again.dequantize()[keep], q.dequantize()[keep])


@given_tensors(16)
@pytest.mark.parametrize("name", ["NVFP4", "NVFP4-4/6"])
def test_row_scale_makes_a_row_independent_of_the_others(name: str, same_bits: SameBits, x: Tensor):
    q = quantize(x, name, global_scale="row")
    others = torch.cat(((x * 1e4).clamp(-1e38, 1e38), x.flip(0), torch.zeros_like(x)))
    together = quantize(torch.cat((others, x)), name, global_scale="row")
    same_bits(together.codes[-len(x) :], q.codes)
    same_bits(together.dequantize()[-len(x) :], q.dequantize())
    for i in range(len(x)):
        same_bits(quantize_dequantize(x[i], name, global_scale="row"), q.dequantize()[i])


def test_dynamic_scale_does_depend_on_the_others():
    """What `row` and `static` are for: with one scale a tensor, a larger neighbour changes a row's codes."""
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    joined = torch.cat((x, torch.full((1, 64), 3e3)))
    assert not torch.equal(quantize(joined, "NVFP4").codes[:4], quantize(x, "NVFP4").codes)
    g = global_scale_for(joined, get_format("NVFP4"))
    assert torch.equal(quantize(joined, "NVFP4", global_scale=g).codes[:4], quantize(x, "NVFP4", global_scale=g).codes)


def test_a_power_of_two_global_scale_does_not_change_codes():
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    codes = [quantize(x, "NVFP4", global_scale=2.0**k).codes for k in range(2, 7)]
    assert all(torch.equal(c, codes[0]) for c in codes)


@given_tensors(32)
def test_four_over_six_is_never_worse_than_either(x: Tensor):
    def errors(y: Tensor) -> Tensor:
        return ((y.double() - x.double()) ** 2).unflatten(-1, (-1, 16)).sum(-1)

    g = global_scale_for(x, "NVFP4-4/6")
    ours = errors(quantize_dequantize(x, "NVFP4-4/6"))
    assert (ours <= errors(quantize_dequantize(x, "NVFP4", global_scale=g)) * (1 + 1e-5)).all()


def test_four_over_six_takes_four_only_where_strictly_better():
    scale_to_six = torch.tensor([6.0, 3, 1.5] + [0.5] * 13)  # exact under both at first sight, so stays at six
    scale_to_four = torch.tensor([4.0, 3, 2, 1] + [0.5] * 12)  # 4 : 3 fits the magnitudes 4 and 3
    x = torch.cat((scale_to_six, scale_to_four * 1.5, torch.zeros(16)))
    q = quantize(x, "NVFP4-4/6", global_scale=1.0)
    assert q.scales.float().tolist() == [1.0, 1.5, 0.125]
    assert q.codes.view(3, 16)[0, :3].tolist() == [7, 5, 3]
    assert q.codes.view(3, 16)[1, :4].tolist() == [6, 5, 4, 2]


def test_amxfp4_scales_each_sign_by_itself():
    x = torch.zeros(32)
    x[:4] = torch.tensor([6.0, 1.0, -0.75, -0.0625])
    q = quantize(x, "AMXFP4")
    assert q.scales.float().tolist() == [[1.0, 0.125]]
    assert q.codes[:4].tolist() == [7, 2, 15, 9]
    assert torch.equal(q.dequantize(), x)


def test_amxfp4_rounds_half_away_and_its_scales_too():
    x = torch.zeros(32)
    x[:2] = torch.tensor([6 * 1.125, 0.28125])  # 6.75 / 6 = 1.125 is half way between 1 and 1.25 in E5M2
    assert quantize(x, "AMXFP4").scales.float()[0, 0] == 1.25
    assert quantize(x, "AMXFP4", rounding="even").scales.float()[0, 0] == 1.0
    assert quantize(x, "AMXFP4", scale="FP16").scales.float()[0, 0] == 1.125
    assert quantize(x, "AMXFP4", scale="FP16").codes[1] == 1  # 0.25 away from zero
    assert quantize(x, "AMXFP4", scale="FP16", rounding="even").codes[1] == 0


@pytest.mark.parametrize("options", [{}, {"scale": "FP16"}, {"scale": "E4M3"}, {"scale": "PO2"}])
def test_amxfp4_beats_one_scale_on_lopsided_blocks(options: dict[str, str]):
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    x = torch.where(x > 0, x * 8, x)
    symmetric = quantize_dequantize(x, "MXFP4", scale_rule="even")
    negative = x < 0
    error = (quantize_dequantize(x, "AMXFP4", **options) - x)[negative].square().mean()
    assert error < 0.1 * (symmetric - x)[negative].square().mean()


def test_int4_is_symmetric_and_never_minus_eight():
    x = torch.tensor([-8.0, -7.6, 8.0, 3.9] + [0.0] * 124)
    for name in ("INT4-g128", "INT4-row"):
        q = quantize(x, name)
        assert q.scales.item() == torch.tensor(8.0) / 7
        assert q.codes[:4].tolist() == [9, 9, 7, 3]
        values = q.format.element_type.decode(q.codes)
        assert values.min() == -7


# --- what a caller sees -----------------------------------------------------------------------------------------------


def test_public_names_and_fields():
    x = torch.randn(4, 64)
    q = reqat.quantize(x, "NVFP4", element="E1M2", rounding="even")
    assert isinstance(q, reqat.QuantizedTensor) and q.format == reqat.get_format("NVFP4", element="E1M2")
    assert q.codes.dtype == torch.uint8 and q.codes.shape == (4, 64) and q.codes.max() < 16
    assert q.scales.dtype == torch.float8_e4m3fn and q.scales.shape == (4, 4)
    assert q.global_scale is not None and q.global_scale.dtype == torch.float32
    assert torch.equal(q.dequantize(), reqat.quantize_dequantize(x, "NVFP4", element="E1M2"))
    assert isinstance(q.pack(), PackedTensor)
    assert reqat.quantize(x, "MXFP4").global_scale is None


@pytest.mark.parametrize(
    ("name", "options", "dtype", "blocks"),
    [
        ("MXFP4", {}, torch.uint8, (2, 4)),
        ("NVFP4", {}, torch.float8_e4m3fn, (2, 8)),
        ("NVFP4-4/6", {}, torch.float8_e4m3fn, (2, 8)),
        ("AMXFP4", {}, torch.float8_e5m2, (2, 4, 2)),
        ("AMXFP4", {"scale": "E4M3"}, torch.float8_e4m3fn, (2, 4, 2)),
        ("AMXFP4", {"scale": "FP16"}, torch.float16, (2, 4, 2)),
        ("AMXFP4", {"scale": "PO2"}, torch.uint8, (2, 4, 2)),
        ("INT4-g128", {}, torch.float32, (2, 1)),
        ("INT4-row", {"scale": "FP16"}, torch.float16, (2, 1)),
    ],
)
def test_stored_scales(name: str, options: dict[str, str], dtype: torch.dtype, blocks: tuple[int, ...]):
    q = quantize(torch.randn(2, 128), name, **options)
    assert q.scales.dtype == dtype and q.scales.shape == blocks


def test_bytes_and_bits():
    x = torch.randn(64, 256)
    for name, bits in (("MXFP4", 4.25), ("NVFP4", 4.5), ("AMXFP4", 4.5), ("INT4-g128", 4.25)):
        q = quantize(x, name)
        assert q.nbytes == q.pack().nbytes == x.numel() * bits / 8 + (4 if q.global_scale is not None else 0)
    row = quantize(x, "NVFP4", global_scale="row")
    assert row.nbytes == row.pack().nbytes == x.numel() * 4.5 / 8 + 4 * 64


def test_quantized_weights_are_as_good_as_expected():
    """Signal to noise of Gaussian data: the order of formats is known, and so, to half a decibel, are the values."""
    x = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))

    def decibel(name: str, **options: str) -> float:
        noise = (quantize_dequantize(x, name, **options) - x).square().mean()
        return 10 * math.log10(float(x.square().mean() / noise))

    nv, four_six, e1m2 = decibel("NVFP4"), decibel("NVFP4-4/6"), decibel("NVFP4", element="E1M2")
    ceil, even, floor = (decibel("MXFP4", scale_rule=rule) for rule in ("ceil", "even", "floor"))
    assert four_six > nv > even > floor and e1m2 > even
    assert nv > ceil and decibel("AMXFP4") > ceil


def test_numpy_layout_of_packed_codes():
    q = quantize(torch.tensor([0.5, -1.0, 6.0, -6.0] + [0.0] * 28), "MXFP4")
    assert q.codes[:4].tolist() == [1, 10, 7, 15]
    assert q.pack().packed[:2].tolist() == [1 | 10 << 4, 7 | 15 << 4]
    assert np.array_equal(q.pack().packed[2:].numpy(), np.zeros(14, dtype=np.uint8))
