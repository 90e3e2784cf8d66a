"""W4A16 and W4A4 GEMM against float64 products of the dequantized operands.

Bound of the float32 results: the kernels sum ``code * s * x``, exact products but for float32 activations (one rounding
each), in some order: at most K roundings of partial sums that sum |x w| bounds, then two divisions by g and the bias.
So |error| <= (K + 4) * 2^-24 * (sum |x w| + |bias|), and where all sums are exact, bits are equal.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from reqat.formats import get_format, quantize  # noqa: E402
from reqat_kernels.triton import naive  # noqa: E402
from reqat_kernels.triton.gemm import linear_w4a4, linear_w4a16  # noqa: E402

FORMATS = {
    "NVFP4": get_format("NVFP4"),
    "NVFP4 row": get_format("NVFP4", global_scale="row"),
    "NVFP4 E1M2": get_format("NVFP4", element="E1M2"),
    "NVFP4-4/6": get_format("NVFP4-4/6"),
    "MXFP4": get_format("MXFP4"),
    "MXFP4 E1M2": get_format("MXFP4", element="E1M2"),
}
EACH_FORMAT = pytest.mark.parametrize("fmt", FORMATS.values(), ids=[label.replace(" ", "-") for label in FORMATS])
# One token; less than a tile; ragged in every direction and over a tile's depth (256 in the interpreter).
SHAPES = [(1, 1, 32), (1, 70, 288), (19, 33, 544)]


def _randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _on(device, packed):
    return packed.unpack().to(device).pack()


def _assert_within(got, want, magnitude, K):
    """``got`` in float32, float16 or bfloat16 against the float64 ``want``; ``magnitude`` = sum |x w| + |bias|."""
    bound = (K + 4) * 2.0**-24 * magnitude
    if got.dtype != torch.float32:  # then rounded once more, to nearest; float16's subnormals are 2^-24 apart
        bound = bound + torch.finfo(got.dtype).eps / 2 * (want.abs() + bound) + 2.0**-25
    error = (got.cpu().double() - want).abs()
    assert bool((error <= bound).all()), f"{float((error / bound).max())} times the bound"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@EACH_FORMAT
def test_w4a16(fmt, dtype, device):
    for M, N, K in SHAPES:
        w = quantize(_randn(N, K) * 0.03, fmt).pack()
        x, bias = _randn(M, K, seed=1).to(dtype), _randn(N, seed=2)
        for b in (None, bias):
            got = linear_w4a16(x.to(device), _on(device, w), None if b is None else b.to(device))
            magnitude = naive.linear_w4a16(x.abs(), _abs(w)) + (0 if b is None else b.abs())
            assert got.dtype == dtype
            _assert_within(got, naive.linear_w4a16(x, w, b), magnitude, K)


def _abs(t):
    """The packed tensor with every sign bit cleared."""
    import dataclasses

    return dataclasses.replace(t, packed=t.packed & 0x77)


@EACH_FORMAT
def test_w4a4(fmt, device):
    x_fmt = fmt.replace(name="NVFP4", adaptive=False) if fmt.adaptive else fmt
    for M, N, K in SHAPES:
        w, x = quantize(_randn(N, K) * 0.03, fmt).pack(), quantize(_randn(M, K, seed=1), x_fmt).pack()
        bias = _randn(N, seed=2)
        for b in (None, bias):
            got = linear_w4a4(_on(device, x), _on(device, w), None if b is None else b.to(device))
            magnitude = naive.linear_w4a4(_abs(x), _abs(w)) + (0 if b is None else b.abs())
            _assert_within(got, naive.linear_w4a4(x, w, b), magnitude, K)


def test_w4a4_scaled_and_unpacked_agree(device):
    w, x = quantize(_randn(40, 320), "MXFP4").pack(), quantize(_randn(24, 320, seed=1), "MXFP4").pack()
    got = [linear_w4a4(_on(device, x), _on(device, w), scaled=scaled) for scaled in (True, False)]
    for y in got:
        _assert_within(y, naive.linear_w4a4(x, w), naive.linear_w4a4(_abs(x), _abs(w)), 320)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["NVFP4", "MXFP4"])
def test_exact_sums_are_bit_equal(name, dtype, device, same_bits):
    """Small integers, scales that are powers of two: every partial sum is exact, only the output rounds."""
    options = {"global_scale": 1.0} if name == "NVFP4" else {}
    generator = torch.Generator().manual_seed(5)
    w, x = (
        torch.tensor([-6.0, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6])[torch.randint(0, 11, (n, 256), generator=generator)]
        for n in (48, 5)
    )
    w[:, ::16] = 6.0  # every block's maximum, so that its scale is 1
    x[:, ::16] = -6.0
    packed = quantize(w, name, **options).pack()
    assert torch.equal(packed.dequantize(), w)
    want = (x.double() @ w.double().T).to(dtype)  # integers below 2^24: exact, then rounded once
    same_bits(linear_w4a16(x.to(dtype).to(device), _on(device, packed)), want)
    x_packed = quantize(x, name, **options).pack()
    same_bits(linear_w4a4(_on(device, x_packed), _on(device, packed), dtype=dtype), want)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_scales_beyond_float16(device):
    """E8M0 scales are taken relative to the largest: float16 activations meet weights of 1e-20 and of 1e+20."""
    for size in (1e-20, 1.0, 1e20):
        w = quantize(_randn(32, 64) * size, "MXFP4").pack()
        x = (_randn(3, 64, seed=1)).half()
        bias = torch.zeros(32)
        got = linear_w4a16(x.to(device), _on(device, w), bias.to(device))
        want = naive.linear_w4a16(x, w)
        if size == 1.0:
            _assert_within(got, want, naive.linear_w4a16(x.abs(), _abs(w)), 64)
        elif size < 1:
            assert bool((got == 0).all())  # below float16's range
        else:
            assert bool(torch.isinf(got).all())  # and above it
    mixed = torch.cat([_randn(32, 32) * 2.0**-9, _randn(32, 32, seed=3) * 2.0**9], dim=1)
    w = quantize(mixed, "MXFP4").pack()
    x = (_randn(3, 64, seed=1) * 0.01).half()
    _assert_within(
        linear_w4a16(x.to(device), _on(device, w)), naive.linear_w4a16(x, w), naive.linear_w4a16(x.abs(), _abs(w)), 64
    )


def test_nan_stays_in_its_row(device):
    w = quantize(_randn(8, 64), "NVFP4").pack()
    x = _randn(3, 64)
    x[1, 5] = float("nan")
    got = linear_w4a16(x.to(device), _on(device, w)).cpu()
    assert bool(torch.isnan(got[1]).all()) and bool(torch.isfinite(got[[0, 2]]).all())


def test_any_leading_axes_and_strides(device, same_bits):
    w = _on(device, quantize(_randn(24, 64), "NVFP4").pack())
    x = _randn(2, 3, 64).to(device)
    got = linear_w4a16(x, w)
    assert got.shape == (2, 3, 24)
    same_bits(got.view(6, 24), linear_w4a16(x.view(6, 64), w))
    same_bits(linear_w4a16(x.transpose(0, 1), w), linear_w4a16(x.transpose(0, 1).contiguous(), w))
    packed = _on(device, quantize(x.cpu(), "NVFP4").pack())
    assert linear_w4a4(packed, w).shape == (2, 3, 24)
    assert linear_w4a16(x[0, 0], w).shape == (24,)


@pytest.mark.parametrize("shape", [(0, 5, 64), (4, 0, 64), (3, 5, 0)], ids=str)
def test_empty(shape, device):
    M, N, K = shape
    w = _on(device, quantize(torch.randn(N, K), "MXFP4").pack())
    bias = torch.arange(float(N), device=device)
    x = torch.randn(M, K)
    want = bias.expand(M, N) if K == 0 else torch.empty(M, N, device=device)
    assert torch.equal(linear_w4a16(x.to(device), w, bias), want)
    assert torch.equal(linear_w4a4(_on(device, quantize(x, "MXFP4").pack()), w, bias), want)


def test_refuses_what_does_not_fit(device):
    w = _on(device, quantize(_randn(8, 64), "NVFP4").pack())
    x = _randn(2, 64).to(device)
    packed = _on(device, quantize(_randn(2, 64), "NVFP4").pack())
    for call, message in [
        (lambda: linear_w4a16(x[:, :32], w), "differ in the last axis"),
        (lambda: linear_w4a16(x.double(), w), "give float16, bfloat16 or float32"),
        (lambda: linear_w4a16(x, w, torch.zeros(7, device=device)), r"bias must be .* of shape \(8,\)"),
        (lambda: linear_w4a16(x, quantize(_randn(8, 64), "AMXFP4").pack()), "dequantize it instead"),
        (lambda: linear_w4a16(x, quantize(_randn(64, 8), "NVFP4", axis=0).pack()), "along the last axis"),
        (lambda: linear_w4a16(x, quantize(_randn(8, 50), "NVFP4", pad=True).pack()), "padded to its block"),
        (lambda: linear_w4a16(x, quantize(_randn(2, 8, 64), "NVFP4").pack()), r"must be \[N, K\]"),
        (lambda: linear_w4a4(packed, _on(device, quantize(_randn(8, 64), "MXFP4").pack())), "quantize both to one"),
        (lambda: linear_w4a4(packed, _on(device, quantize(_randn(8, 32), "NVFP4").pack())), "differ in the last"),
        (lambda: linear_w4a4(packed, w, dtype=torch.int8), "choose float16"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
