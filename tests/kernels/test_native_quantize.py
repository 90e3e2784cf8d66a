"""Native quantization against reqat.formats: the same bits for every format, type and instruction set; same errors."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reqat.formats import ELEMENTS, Format, get_format
from reqat.formats import quantize as reference
from reqat.formats import quantize_dequantize as reference_fake
from reqat_kernels.native import quantize as native
from reqat_kernels.native.library import NOT_FINITE, OK, library

torch.set_num_threads(1)

# The formats and hard rows that the reference itself is tested with.
_spec = importlib.util.spec_from_file_location(
    "reqat_formats_conftest", Path(__file__).resolve().parents[1] / "formats" / "conftest.py"
)
assert _spec is not None and _spec.loader is not None
_shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)
FORMATS: dict[str, Format] = {
    **{label: fmt for label, fmt in _shared.FORMATS.items() if native.supports(fmt)},
    "NVFP4 static": get_format("NVFP4", global_scale="static"),
    "NVFP4 reciprocal row E1M2": get_format("NVFP4", scale_rule="reciprocal", global_scale="row", element="E1M2"),
    "NVFP4 reciprocal away": get_format("NVFP4", scale_rule="reciprocal", rounding="away"),
    "NVFP4-4/6 away": get_format("NVFP4-4/6", rounding="away"),
    "AMXFP4 E4M3 even": get_format("AMXFP4", scale="E4M3", rounding="even"),
    "INT4-g128 FP16": get_format("INT4-g128", scale="FP16"),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}

needs_library = pytest.mark.skipif(library() is None, reason="no native library")


@pytest.fixture(params=FORMATS, ids=lambda label: label.replace(" ", "-"))
def fmt(request: pytest.FixtureRequest) -> Format:
    return FORMATS[request.param]


@pytest.fixture(params=("portable", "avx2", "avx512"))  # of which there is code
def isa(request: pytest.FixtureRequest, limit_isa: Callable[[str], None]) -> str:
    limit_isa(request.param)
    return str(request.param)


@pytest.fixture
def no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would go to the reference fails instead: what is tested is the native path."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("this went to the reference")

    monkeypatch.setattr(native, "reference_quantize", refuse)
    monkeypatch.setattr(native, "reference_quantize_dequantize", refuse)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal type, shape and bits, signs of zeros included."""
    bits = BITS[a.element_size()]
    return (
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))
    )


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return x.double().clamp(-largest, largest).to(dtype)


def static_scale(fmt: Format) -> Tensor | None:
    return torch.tensor(700.0) if fmt.global_scale == "static" else None


def check(x: Tensor, fmt: Format, g: Tensor | float | None, label: str = "") -> None:
    """Fake quantization, codes, packed codes, scales and g, all at once."""
    q = reference(x, fmt, global_scale=g)
    assert same(native.fake_quantize(x, fmt, g), reference_fake(x, fmt, global_scale=g)), f"fake {label}"
    ours = native.quantize(x, fmt, g)
    assert same(ours.codes, q.codes), f"codes {label}"
    assert same(ours.scales, q.scales), f"scales {label}"
    assert (ours.shape, ours.dtype, ours.axis, ours.format) == (q.shape, q.dtype, q.axis, q.format)
    packed = native.quantize_packed(x, fmt, g)
    assert same(packed.packed, q.pack().packed) and same(packed.scales, q.scales), f"packed {label}"
    for found in (ours.global_scale, packed.global_scale):
        assert (found is None and q.global_scale is None) or same(found, q.global_scale), f"g {label}"
    assert same(packed.dequantize(), q.dequantize())


def test_formats_are_native_or_go_to_the_reference() -> None:
    for label, fmt in _shared.FORMATS.items():
        fp4_or_int4 = fmt.name in ("MXFP4", "NVFP4", "NVFP4-4/6", "AMXFP4", "INT4-g32", "INT4-g128", "INT4-row")
        assert native.supports(fmt) or not fp4_or_int4, label
        if not fp4_or_int4:
            check(torch.randn(3, 256), fmt, None, label)


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hard_blocks(isa: str, fmt: Format, dtype: torch.dtype, no_fallback: None) -> None:
    for label, hard in HARD.items():
        check(cast(hard, dtype), fmt, static_scale(fmt), label)


HARD = _shared.adversarial(256)


@pytest.mark.parametrize("rounding", ["even", "away"])
@pytest.mark.parametrize("name", ["MXFP4 ceil", "MXFP4 E1M2", "INT4-row"])
def test_every_number_around_every_tie(isa: str, name: str, rounding: str, no_fallback: None) -> None:
    """All bfloat16 numbers of the element's range, and both neighbours of every tie, at scale 1."""
    fmt = FORMATS[name].replace(rounding=rounding)
    magnitudes = torch.tensor(ELEMENTS[fmt.element].magnitudes)
    numbers = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()
    numbers = numbers[numbers.abs() <= magnitudes[-1]]
    ties = (magnitudes[1:] + magnitudes[:-1]) / 2
    ties = torch.cat([ties, -ties])
    near = [torch.nextafter(ties, torch.full_like(ties, side)) for side in (-9.0, 9.0)]
    values = torch.cat([numbers, ties, *near])
    block = (fmt.block or 128) - 1
    values = torch.nn.functional.pad(values, (0, -len(values) % block)).view(-1, block)
    x = torch.cat([values, magnitudes[-1].expand(len(values), 1)], 1)  # the block's maximum: the scale is 1
    q = reference(x, fmt)
    assert (q.block_scales() == 1).all()
    check(x, fmt, None)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """[rows, k * 128]: exponents spread by block, zeros, few mantissa bits, any type."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randn(draw(st.integers(1, 5)), 128 * draw(st.integers(1, 20)), generator=generator)
    spread = draw(st.sampled_from([0.0, 1.0, 4.0, 20.0]))
    x *= torch.exp(spread * torch.randn(len(x), x.shape[1] // 16, generator=generator)).repeat_interleave(16, 1)
    if draw(st.booleans()):
        x = (x * 4).round() / 4
    x = (x * 2.0 ** draw(st.integers(-60, 60))).clamp_(-3e38, 3e38)  # infinity times zero would be NaN
    x *= torch.rand(x.shape, generator=generator) >= draw(st.sampled_from([0.0, 0.5, 0.99]))
    return cast(x, draw(st.sampled_from(DTYPES)))


@needs_library
@settings(max_examples=60)
@given(tensors(), st.sampled_from(sorted(FORMATS)), st.data())
def test_any_tensor(x: Tensor, label: str, data: st.DataObject) -> None:
    fmt = FORMATS[label]
    g: Tensor | float | None = static_scale(fmt)
    if fmt.has_global_scale and data.draw(st.booleans()):
        value = 2.0 ** data.draw(st.integers(-60, 60)) * 1.37
        g = data.draw(st.sampled_from([value, torch.tensor([value]), torch.full((len(x), 1), value)]))
    check(x, fmt, g, label)


def test_given_global_scales(isa: str, no_fallback: None) -> None:
    """Far from fitting, too: scales at both ends of E4M3, quotients beyond float32."""
    x = torch.randn(6, 64) * torch.exp(20 * torch.randn(6, 1))
    for rule in ("divide", "multiply", "reciprocal"):
        fmt = get_format("NVFP4", scale_rule=rule)
        for g in (1.4e-36, 1e-20, 0.7, 3e9, 1e30, 3.4028234663852886e38):
            check(x, fmt, g, f"{rule} {g}")
            check((x * 1e30).clamp(-3e38, 3e38), fmt, torch.tensor(g), f"{rule} {g}, large")
        rows = torch.exp(10 * torch.randn(6, 1))
        check(x, fmt, rows)
        check(x.view(2, 3, 64), fmt, rows.view(2, 3, 1))
        check(x.view(2, 3, 64), fmt, torch.rand(3, 1) + 0.5)  # broadcast


@pytest.mark.parametrize("length", [1, 2, 15, 17, 2047, 2048, 4999, 6145])
def test_rows_of_any_length(isa: str, length: int, no_fallback: None) -> None:
    """Blocks longer than what is handled at a time, odd lengths, tails."""
    for dtype in DTYPES:
        x = (torch.randn(3, length) * torch.exp(torch.randn(3, 1))).to(dtype)
        for options in ({}, {"scale": "FP16", "rounding": "away"}):
            check(x, get_format("INT4-row", **options), None)


@needs_library
def test_pieces_and_threads_do_not_matter(fmt: Format, no_fallback: None) -> None:
    x = torch.randn(300, 384) * torch.exp(2 * torch.randn(300, 1))
    check(x, fmt, static_scale(fmt))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        check(x, fmt, static_scale(fmt))
    finally:
        torch.set_num_threads(before)


def test_a_row_for_other_kernels(isa: str, fmt: Format) -> None:
    """quantize_row() of quantize.h: what the products and the KV cache are built on."""
    lib = library()
    assert lib is not None
    for label, hard in HARD.items():
        x = hard[0].contiguous()
        row = fmt.replace(global_scale="row") if fmt.has_global_scale else fmt
        q = reference(x, row)
        g = 1.0 if q.global_scale is None else float(q.global_scale)
        packed, doubled = torch.empty(128, dtype=torch.uint8), torch.empty(256, dtype=torch.int8)
        scales, effective = torch.empty_like(q.scales), torch.empty(q.scales.shape)
        dequantized = torch.empty(256)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (packed, doubled, scales, effective, dequantized)]
        spec = ctypes.byref(native.spec_of(row))
        status = lib.reqat_quantize_row(
            spec, 0, ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(256), ctypes.c_float(g), *pointers
        )
        assert status == OK
        assert same(packed, q.pack().packed), label
        assert same(scales, q.scales) and same(effective, q.block_scales()), label
        values = fmt.element_type.decode(q.codes) * (1 if fmt.element == "INT4" else 2)
        assert torch.equal(doubled.float(), values), label
        assert same(dequantized, q.dequantize()), label
    bad = torch.full((256,), float("nan"))
    status = lib.reqat_quantize_row(
        spec, 0, ctypes.c_void_p(bad.data_ptr()), ctypes.c_int64(256), ctypes.c_float(1.0), *pointers
    )
    assert status == NOT_FINITE


# --- shapes, strides, types -------------------------------------------------------------------------------------------

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(0, 1),
    "axis not last in memory": lambda x: x.transpose(0, 2),
    "every second row": lambda x: x[:, ::2],
    "every second element": lambda x: x.repeat(1, 1, 2)[..., ::2],
    "one row": lambda x: x[0, 0],
    "expanded": lambda x: x[:1].expand(5, -1, -1),
    "unaligned": lambda x: x.flatten()[3:131],
    "negated lazily": lambda x: torch.complex(x, x).conj().imag,
}


@needs_library
def test_strides_do_not_matter(fmt: Format) -> None:
    for label, view in VIEWS.items():
        x = view(torch.randn(128, 6, 128))
        before = x.clone()
        check(x, fmt, static_scale(fmt), label)
        assert native.fake_quantize(x, fmt, static_scale(fmt)).stride() == (
            reference_fake(x, fmt, global_scale=static_scale(fmt)).stride()
        ), label
        assert torch.equal(x, before)


@needs_library
def test_a_global_scale_a_row_follows_the_rows_of_a_permuted_tensor(no_fallback: None) -> None:
    x = torch.randn(2, 7, 4, 32).transpose(1, 2)  # [B, H, T, D] of [B, T, H, D]
    g = torch.rand(2, 4, 7, 1) + 0.5
    check(x, get_format("NVFP4"), g)
    check(x, get_format("NVFP4", global_scale="row"), None)


@pytest.mark.parametrize("shape", [(0, 128), (2, 0, 128), (3, 0), (0,)])
def test_empty_tensors(fmt: Format, shape: tuple[int, ...]) -> None:
    check(torch.empty(shape), fmt, static_scale(fmt))


def test_float64_and_parameters(fmt: Format) -> None:
    check(torch.randn(3, 128).float(), fmt, static_scale(fmt))
    x = torch.randn(3, 128, dtype=torch.float64)
    g = static_scale(fmt)
    assert torch.equal(native.fake_quantize(x, fmt, g), reference_fake(x, fmt, global_scale=g))
    weight = torch.nn.Parameter(torch.randn(3, 128))
    out = native.fake_quantize(weight, fmt, g)
    assert not out.requires_grad and same(out, reference_fake(weight, fmt, global_scale=g))


# --- errors -----------------------------------------------------------------------------------------------------------


def message(function: Callable[[], object]) -> tuple[type, str]:
    with pytest.raises((ValueError, TypeError)) as caught:
        function()
    return caught.type, str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_that_are_not_finite(isa: str, fmt: Format, dtype: torch.dtype) -> None:
    for bad in (float("nan"), float("inf"), -float("inf"), -float("nan")):
        for at in ((0, 0), (2, 130), (4, 255)):
            x = torch.randn(5, 256).to(dtype)
            x[at] = bad
            g = static_scale(fmt)
            expected = message(lambda x=x, g=g: reference_fake(x, fmt, global_scale=g, name="layer 3"))
            for function in (native.fake_quantize, native.quantize, native.quantize_packed):
                assert message(lambda f=function, x=x, g=g: f(x, fmt, g, name="layer 3")) == expected
            assert "layer 3" in expected[1]


BAD_CALLS: dict[str, tuple[object, str, object]] = {
    "a length that the block does not divide": (torch.randn(2, 40), "NVFP4", None),
    "no axis": (torch.tensor(1.0), "NVFP4", None),
    "integers": (torch.ones(2, 32, dtype=torch.int32), "MXFP4", None),
    "a list": ([1.0] * 32, "MXFP4", None),
    "a format without global scale": (torch.randn(2, 32), "MXFP4", torch.tensor(1.0)),
    "a static format without value": (torch.randn(2, 32), "static", None),
    "g is zero": (torch.randn(2, 32), "NVFP4", torch.tensor(0.0)),
    "g is negative": (torch.randn(2, 32), "NVFP4", -1.0),
    "g is NaN": (torch.randn(2, 32), "NVFP4", float("nan")),
    "g is infinite in a row": (torch.randn(2, 32), "NVFP4", torch.tensor([[1.0], [float("inf")]])),
    "g is too small": (torch.randn(2, 32), "NVFP4", 1.3e-36),
    "g of another shape": (torch.randn(2, 32), "NVFP4", torch.ones(3, 1)),
}


@pytest.mark.parametrize("label", BAD_CALLS)
def test_bad_calls_fail_as_the_reference_does(label: str) -> None:
    x, name, g = BAD_CALLS[label]
    fmt = get_format("NVFP4", global_scale="static") if name == "static" else get_format(name)
    expected = message(lambda: reference_fake(x, fmt, global_scale=g))  # type: ignore[arg-type]
    for function in (native.fake_quantize, native.quantize, native.quantize_packed):
        assert message(lambda f=function: f(x, fmt, g)) == expected


# --- operators --------------------------------------------------------------------------------------------------------


def test_a_format_is_a_string_to_operators(fmt: Format) -> None:
    assert native.format_from_key(native.format_key(fmt)) == fmt
    assert native.format_from_key("NVFP4") == get_format("NVFP4")


@pytest.mark.parametrize("label", ["NVFP4", "NVFP4 row", "MXFP4 ceil", "AMXFP4", "INT4-row"])
def test_operators_have_fake_kernels(label: str) -> None:
    fmt = FORMATS[label]
    key = native.format_key(fmt)
    g = torch.tensor(700.0) if fmt.has_global_scale else None
    for x in (torch.randn(3, 128), torch.randn(2, 7, 4, 32).transpose(1, 2).to(torch.bfloat16)):
        for scale in (None, g):
            for operator in (torch.ops.reqat.fake_quantize, torch.ops.reqat.quantize):
                torch.library.opcheck(operator.default, (x, key, scale), test_utils=("test_schema", "test_faketensor"))
        assert same(torch.ops.reqat.fake_quantize(x, key), native.fake_quantize(x, fmt))
        packed, scales, found = torch.ops.reqat.quantize(x, key)
        q = native.quantize_packed(x, fmt)
        assert same(packed, q.packed) and same(scales, q.scales)
        assert (found.numel() == 0) if q.global_scale is None else same(found, q.global_scale)


def test_meta_tensors_and_traces() -> None:
    x = torch.empty(4, 64, device="meta", dtype=torch.bfloat16)
    out = native.fake_quantize(x, "NVFP4") if not native._plain(x) else torch.ops.reqat.fake_quantize(x, "NVFP4")
    assert out.device.type == "meta" and out.shape == x.shape and out.dtype == x.dtype
    traced = torch.fx.experimental.proxy_tensor.make_fx(
        lambda t: torch.ops.reqat.fake_quantize(t, "NVFP4"), tracing_mode="fake"
    )(torch.randn(2, 32))
    y = torch.randn(2, 32)
    assert same(traced(y), reference_fake(y, "NVFP4"))
