"""Bad input: each error names the value at fault and what to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from reqat.formats import FORMATS, Format, get_format, global_scale_for, quantize, quantize_dequantize

BOTH = pytest.mark.parametrize("function", [quantize, quantize_dequantize])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_nan_and_infinity_name_the_tensor(fmt: Format, dtype: torch.dtype):
    for function in (quantize, quantize_dequantize):
        for bad, what in ((torch.nan, "1 NaN"), (torch.inf, "1 infinite values"), (-torch.inf, "1 infinite values")):
            x = torch.randn(4, 256).to(dtype)
            x[2, 7] = bad
            x[0, 0] = 1e4  # larger numbers elsewhere do not hide it
            with pytest.raises(ValueError, match=rf"layers\.3\.weight .*\(4, 256\) holds {what}"):
                function(x, fmt, name="layers.3.weight")
    x[3] = torch.nan
    with pytest.raises(ValueError, match=r"256 NaN and 1 infinite"):
        quantize(x, fmt)


@BOTH
def test_only_tensors_are_taken(function: Callable):
    with pytest.raises(TypeError, match=r"bias is a list.*torch\.as_tensor"):
        function([1.0, 2.0], "NVFP4", name="bias")


@BOTH
def test_a_nan_with_its_sign_bit_set_is_seen(fmt: Format, function: Callable):
    x = torch.randn(2, 256)
    x[1, 1] = torch.tensor(-4194304, dtype=torch.int32).view(torch.float32)  # 0xFFC00000
    assert torch.isnan(x[1, 1]) and torch.signbit(x[1, 1])
    with pytest.raises(ValueError, match="1 NaN"):
        function(x, fmt)


@BOTH
def test_float64_beyond_float32_is_refused(fmt: Format, function: Callable):
    x = torch.ones(2, 256, dtype=torch.float64)
    x[0, 0] = 1e39
    with pytest.raises(ValueError, match="beyond the float32 range"):
        function(x, fmt)
    x[0, 0] = 1e-320  # underflow is rounding like any other
    assert torch.isfinite(function(x, fmt) if function is quantize_dequantize else function(x, fmt).dequantize()).all()


@BOTH
def test_a_length_that_does_not_divide_is_refused(function: Callable):
    x = torch.randn(3, 40)
    with pytest.raises(ValueError, match=r"keys .*\(3, 40\).* 40 along axis 1 .*block of 32.*pad=True"):
        function(x, "MXFP4", name="keys")
    with pytest.raises(ValueError, match=r"3 along axis 0 .*NVFP4's block of 16"):
        function(x, "NVFP4", axis=0)
    function(x, "INT4-row")


@BOTH
def test_types_axes_and_scalars(function: Callable):
    for dtype in (torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match=f"tokens.*{dtype}.*torch.float16"):
            function(torch.zeros(32, dtype=dtype), "MXFP4", name="tokens")
    for axis in (2, -3):
        with pytest.raises(ValueError, match=rf"\(4, 32\) has no axis {axis}"):
            function(torch.zeros(4, 32), "MXFP4", axis=axis)
    with pytest.raises(ValueError, match="has no axis -1"):
        function(torch.tensor(1.0), "INT4-row")


@BOTH
def test_global_scales(function: Callable):
    x = torch.randn(4, 32)
    with pytest.raises(ValueError, match="'static'.*pass global_scale="):
        function(x, "NVFP4", global_scale="static")
    for bad in (0.0, -1.0, float("nan"), float("inf"), 1e-37):
        with pytest.raises(ValueError, match="global_scale.*finite"):
            function(x, "NVFP4", global_scale=bad)
    with pytest.raises(ValueError, match=r"\(3, 1\).*scalar or of shape \(4, 1\)"):
        function(x, "NVFP4", global_scale=torch.ones(3, 1))
    with pytest.raises(ValueError, match="MXFP4 has no global scale"):
        function(x, "MXFP4", global_scale=1.0)
    with pytest.raises(ValueError, match="INT4-row has no global scale"):
        global_scale_for(x, "INT4-row")
    x[0, 0] = torch.nan
    with pytest.raises(ValueError, match="queries of shape"):
        global_scale_for(x, "NVFP4", name="queries")


def test_a_given_scale_wins_and_takes_many_shapes():
    x = torch.randn(2, 4, 32)
    for mode in ("dynamic", "row", "static"):
        fmt = get_format("NVFP4", global_scale=mode)
        for g in (
            100.0,
            torch.tensor(100.0),
            torch.tensor([100.0]),
            torch.full((2, 4, 1), 100.0),
            torch.full((4, 1), 100.0),
        ):
            q = quantize(x, fmt, global_scale=g)
            assert torch.equal(q.codes, quantize(x, "NVFP4", global_scale=100.0).codes)
            assert torch.equal(q.dequantize(), quantize_dequantize(x, fmt, global_scale=g))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("NVFP5", {}, "format 'NVFP5'.*mean 'NVFP4'"),
        (
            "fp4",
            {},
            "Known: AINT2-tensor.*AMXFP4.*INT4-g128, INT4-g32.*MXFP4, MXFP4-4/3, NVFP4, NVFP4-4/6.*TERNARY-row",
        ),
        ("NVFP4", {"element": "E3M0"}, "element of NVFP4 'E3M0'.*Known: E1M2, E2M1"),
        ("NVFP4-4/6", {"element": "E1M2"}, "Known: E2M1"),
        ("MXFP4", {"scale_rule": "ceiling"}, "mean 'rceil'.*Known: even, floor, rceil"),
        ("MXFP4", {"rounding": "nearest"}, "Known: away, even"),
        ("MXFP4", {"scale": "E4M3"}, "Known: E8M0"),
        ("MXFP4", {"global_scale": "row"}, "Known: none"),
        ("NVFP4", {"global_scale": "rows"}, "mean 'row'.*Known: dynamic, row, static"),
        ("NVFP4", {"round": "even"}, "format option 'round'.*Known: element, global_scale, rounding"),
        ("AMXFP4", {"scale": "PO2", "scale_rule": "nearest"}, "takes scale_rule 'floor' or 'even'"),
        ("AMXFP4", {"scale_rule": "floor"}, "takes scale_rule 'nearest'"),
    ],
)
def test_unknown_names_and_options_list_the_valid_ones(name: str, options: dict[str, str], message: str):
    with pytest.raises(ValueError, match=message):
        get_format(name, **options)
    with pytest.raises(ValueError, match=message):
        quantize_dequantize(torch.zeros(128), name, **options)


def test_formats_are_values():
    for name in FORMATS:
        fmt = get_format(name)
        assert (
            get_format(name.lower()) == fmt == get_format(fmt) and str(fmt) == name and hash(fmt) == hash(fmt.replace())
        )
        assert get_format(name, element=None, rounding=None) == fmt
    assert get_format(get_format("NVFP4"), element="E1M2") == get_format("NVFP4", element="E1M2")
    assert get_format("AMXFP4", scale="PO2").scale == "E8M0" and get_format("AMXFP4", scale="PO2").scale_rule == "floor"
    with pytest.raises(ValueError, match="block of NVFP4"):
        get_format("NVFP4").replace(block=32)
    with pytest.raises(ValueError, match="format 'X'"):
        Format("X")
