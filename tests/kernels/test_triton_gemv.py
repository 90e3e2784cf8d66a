"""The W4A4 GEMV for few rows, against its float64 twin and, where all sums are exact, bit for bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from reqat.formats import PackedTensor, get_format, quantize  # noqa: E402
from reqat_kernels.triton import naive  # noqa: E402
from reqat_kernels.triton.gemv import gemv_w4a4  # noqa: E402

FORMATS = {
    "NVFP4": get_format("NVFP4"),
    "NVFP4 row": get_format("NVFP4", global_scale="row"),
    "NVFP4 E1M2": get_format("NVFP4", element="E1M2"),
    "MXFP4": get_format("MXFP4"),
    "MXFP4 E1M2": get_format("MXFP4", element="E1M2"),
}


def _randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _on(device, packed):
    return packed.unpack().to(device).pack()


def _abs(t):
    return dataclasses.replace(t, packed=t.packed & 0x77)


@pytest.mark.parametrize("M", [1, 3, 8])
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=[label.replace(" ", "-") for label in FORMATS])
def test_against_float64(fmt, M, device):
    # Sums in a block are exact; then K / 16 additions in float32, the product of sum and scale, two divisions, the
    # bias: each 2^-24 of at most sum |x w| + |bias|. 1072 is an odd multiple of 16.
    for N, K in ((5, 32), (70, 1072 if fmt.block == 16 else 1056)):
        w, x = quantize(_randn(N, K) * 0.03, fmt).pack(), quantize(_randn(M, K, seed=1), fmt).pack()
        b = _randn(N, seed=2) if K > 32 else None
        got = gemv_w4a4(_on(device, x), _on(device, w), None if b is None else b.to(device)).cpu()
        want = naive.linear_w4a4(x, w, b)
        magnitude = naive.linear_w4a4(_abs(x), _abs(w)) + (0 if b is None else b.abs())
        bound = (K // 16 + 5) * 2.0**-24 * magnitude
        error = (got.double() - want).abs()
        assert bool((error <= bound).all()), f"{float((error / bound).max())} times the bound"


def _packed(codes, scales, name):
    """A packed tensor of given codes and scale bytes; g is 1."""
    fmt = get_format(name)
    stored = scales if name == "MXFP4" else scales.view(torch.float8_e4m3fn)
    g = None if name == "MXFP4" else torch.ones(())
    packed = codes[:, ::2] | (codes[:, 1::2] << 4)
    return PackedTensor(packed, stored, g, fmt, 1, codes.shape, torch.float32)


def test_every_pair_of_scales_is_exact(device, same_bits):
    """All 126 * 126 products of positive E4M3 scales, 448 * 448 and the smallest subnormals among them."""
    scales = torch.arange(1, 127, dtype=torch.uint8)
    codes = torch.zeros(126, 16, dtype=torch.uint8)
    codes[:, 3] = 7  # 6: one product a block, 36
    w = _packed(codes, scales[:, None], "NVFP4")
    s = scales.view(torch.float8_e4m3fn).float()
    for first in range(0, 126, 8):
        rows = w.scales[first : first + 8]
        x = dataclasses.replace(w, packed=w.packed[: len(rows)], scales=rows, shape=torch.Size((len(rows), 16)))
        same_bits(gemv_w4a4(_on(device, x), _on(device, w)), 36 * s[first : first + 8, None] * s[None, :])


@pytest.mark.parametrize("name", ["NVFP4", "MXFP4"])
def test_every_pair_of_codes(name, device, same_bits):
    block = 16 if name == "NVFP4" else 32
    codes = torch.arange(16, dtype=torch.uint8)[:, None].expand(16, block).contiguous()
    one = torch.full((16, 1), 127 if name == "MXFP4" else 0x38, dtype=torch.uint8)
    w = _packed(codes, one, name)
    values = get_format(name).element_type.decode(codes[:, 0])
    for first in (0, 8):
        x = _packed(codes[first : first + 8], one[:8], name)
        same_bits(
            gemv_w4a4(_on(device, x), _on(device, w)) + 0.0, block * values[first : first + 8, None] * values + 0.0
        )


def test_largest_block_sums_are_exact(device):
    """Sixteen products of 36, one of them 3: no partial sum leaves the range in which float16 holds quarters."""
    codes = torch.full((16, 16), 7, dtype=torch.uint8)
    x = _packed(codes[:1].clone(), torch.full((1, 1), 0x38, dtype=torch.uint8), "NVFP4")
    codes = codes.fill_diagonal_(1)  # 0.5, at each place in turn
    w = _packed(codes, torch.full((16, 1), 0x38, dtype=torch.uint8), "NVFP4")
    assert gemv_w4a4(_on(device, x), _on(device, w)).tolist() == [[15 * 36.0 + 3] * 16]


def test_any_address(device, same_bits):
    """Rows that start at an odd address: a slice of a larger buffer."""
    x, w = (_on(device, quantize(_randn(n, 64, seed=n), "MXFP4").pack()) for n in (2, 9))
    buffer = torch.empty(w.packed.numel() + 3, dtype=torch.uint8, device=device)
    buffer[3:] = w.packed.view(-1)
    odd = dataclasses.replace(w, packed=buffer[3:].view(w.packed.shape))
    same_bits(gemv_w4a4(x, odd), gemv_w4a4(x, w))


def test_types_and_axes(device, same_bits):
    w = _on(device, quantize(_randn(20, 64), "NVFP4").pack())
    x = _on(device, quantize(_randn(2, 3, 64, seed=1).bfloat16(), "NVFP4").pack())
    got = gemv_w4a4(x, w)
    assert got.shape == (2, 3, 20) and got.dtype == torch.bfloat16
    full = gemv_w4a4(x, w, dtype=torch.float32)
    same_bits(got, full.bfloat16())
    same_bits(gemv_w4a4(x, w, dtype=torch.float16), full.half())


def test_rows_do_not_depend_on_each_other(device, same_bits):
    w = _on(device, quantize(_randn(20, 544), "NVFP4").pack())
    x = quantize(_randn(8, 544, seed=1), "NVFP4", global_scale=5.0)
    together = gemv_w4a4(_on(device, x.pack()), w)
    for M in (1, 3):
        alone = quantize(_randn(8, 544, seed=1)[:M], "NVFP4", global_scale=5.0).pack()
        same_bits(gemv_w4a4(_on(device, alone), w), together[:M])


@pytest.mark.parametrize("shape", [(0, 5, 64), (4, 0, 64), (3, 5, 0)], ids=str)
def test_empty(shape, device):
    M, N, K = shape
    w, x = (_on(device, quantize(torch.randn(n, K), "NVFP4").pack()) for n in (N, M))
    bias = torch.arange(float(N), device=device)
    got = gemv_w4a4(x, w, bias)
    assert torch.equal(got, bias.expand(M, N) if K == 0 else torch.empty(M, N, device=device))


def test_refuses_more_rows(device):
    w = _on(device, quantize(_randn(8, 64), "NVFP4").pack())
    with pytest.raises(ValueError, match="8 rows, not 9.*linear_w4a4"):
        gemv_w4a4(_on(device, quantize(_randn(9, 64), "NVFP4").pack()), w)
