"""The Triton quantizer gives the codes, scales and global scale of reqat.quantize, bit for bit, rotation included."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import reqat  # noqa: E402
from reqat.formats import get_format  # noqa: E402
from reqat.formats.hadamard import block_hadamard  # noqa: E402
from reqat_kernels.triton import naive  # noqa: E402
from reqat_kernels.triton.finite import FiniteFlag, NotFinite  # noqa: E402
from reqat_kernels.triton.quantize import fake_quantize, quantize  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|overflow|invalid value):RuntimeWarning")

FORMATS = {
    f"{name} {element} {rule} {g}".rstrip(): get_format(
        name, element=element, scale_rule=rule, **({"global_scale": g} if g else {})
    )
    for element in ("E2M1", "E1M2")
    for name, rule, g in [
        *(("MXFP4", rule, "") for rule in ("ceil", "floor", "even")),
        *(("NVFP4", rule, "dynamic") for rule in ("divide", "multiply", "reciprocal")),
        ("NVFP4", "divide", "row"),
        ("NVFP4", "reciprocal", "row"),
    ]
}


@pytest.fixture
def same(same_bits):
    """Assert that two packed tensors are alike in every part."""

    def check(got, want):
        same_bits(got.packed, want.packed)
        same_bits(got.scales, want.scales)
        assert (got.global_scale is None) == (want.global_scale is None)
        if want.global_scale is not None:
            same_bits(got.global_scale, want.global_scale)
        assert (got.format, got.axis, got.shape, got.dtype) == (want.format, want.axis, want.shape, want.dtype)

    return check


def _randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=[label.replace(" ", "-") for label in FORMATS])
def test_hard_rows(fmt, hard_rows, device, same):
    # Row by row the maximum of the tensor changes: with one tensor for all, its largest row would hide the others.
    parts = [hard_rows] if fmt.global_scale in ("none", "row") else [hard_rows, hard_rows[-9:], hard_rows[:3]]
    for x in parts:
        same(quantize(x.to(device), fmt), naive.quantize(x, fmt))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=[label.replace(" ", "-") for label in FORMATS])
def test_fake_quantization_without_codes(fmt, hard_rows, device):
    """Equal numbers (a zero's sign aside, which codes keep and dequantizing drops), also in types that are narrow."""
    for x in (hard_rows, hard_rows[-9:].bfloat16(), hard_rows[-9:].half(), hard_rows[-2:].double()):
        if not torch.isfinite(x).all():
            continue
        got = fake_quantize(x.to(device), fmt)
        assert got.dtype == x.dtype and got.shape == x.shape
        assert torch.equal(got.cpu(), reqat.formats.quantize_dequantize(x, fmt))
    with pytest.raises(ValueError, match="weights of shape .*NaN"):
        fake_quantize(torch.full((2, 32), torch.nan, device=device), fmt, name="weights")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (1, 48), (7, 208), (2, 3, 5, 64), (16,), (33, 1040)], ids=str)
def test_shapes_and_types(shape, dtype, device, same):
    x = _randn(*shape, dtype=dtype)
    for g in ("dynamic", "row"):
        same(quantize(x.to(device), "NVFP4", global_scale=g), naive.quantize(x, "NVFP4", global_scale=g))
    if shape[-1] % 32 == 0:
        same(quantize(x.to(device), "MXFP4"), naive.quantize(x, "MXFP4"))


@pytest.mark.parametrize("g", [1.0, 448 * 6 / 7.3, torch.tensor(33.3), torch.tensor([[3.0], [700.1], [0.1]])], ids=str)
def test_static_global_scale(g, device, same):
    x = _randn(3, 80) * torch.tensor([[1.0], [0.01], [50.0]])
    fmt = get_format("NVFP4", global_scale="static")
    same(quantize(x.to(device), fmt, global_scale=g), naive.quantize(x, fmt, global_scale=g))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [2, 16, 32, 128])
def test_rotation(size, dtype, device, same):
    x = _randn(5, 384, dtype=dtype)
    for fmt in ("NVFP4", "MXFP4"):
        same(quantize(x.to(device), fmt, rotation=size), naive.quantize(x, fmt, rotation=size))


def test_rotation_of_hard_rows(hard_rows, device, same):
    x = hard_rows.clamp(-1e36, 1e36)  # sums of 32 stay finite
    for fmt in ("MXFP4", get_format("NVFP4", global_scale="row")):
        same(quantize(x.to(device), fmt, rotation=32), naive.quantize(x, fmt, rotation=32))


@pytest.mark.parametrize("size", [16, 32])
def test_rotation_is_the_hadamard_product(size):
    x = _randn(64, 256)
    got, want = naive.block_hadamard(x, size), block_hadamard(x.double(), size)
    # log2(size) additions, the product, and 1/sqrt(size) itself rounded: each 2^-24 of at most sum |x| / sqrt(size).
    bound = x.double().abs().view(64, -1, size).sum(-1, keepdim=True) / size**0.5 * 7 * 2.0**-24
    assert bool(((got - want).view(64, -1, size).abs() <= bound).all())
    integers = torch.arange(-128, 128).float().view(1, 256)
    exact = naive.block_hadamard(integers, 16)  # sqrt(16) is exact, and so are the sums
    assert torch.equal(exact.double(), block_hadamard(integers.double(), 16))


def test_any_strides(device, same):
    x = _randn(64, 6, seed=4)
    same(quantize(x.to(device).t(), "MXFP4"), naive.quantize(x.t().contiguous(), "MXFP4"))
    wide = _randn(4, 128)
    same(quantize(wide.to(device)[:, ::2], "NVFP4"), naive.quantize(wide[:, ::2].contiguous(), "NVFP4"))


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0,), (2, 0, 32)], ids=str)
@pytest.mark.parametrize("fmt", ["NVFP4", "MXFP4"])
def test_empty(shape, fmt, device, same):
    x = torch.empty(shape)
    same(quantize(x.to(device), fmt), reqat.quantize(x, fmt).pack())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_refuses_what_is_not_finite(bad, device):
    x = _randn(3, 64).to(device)
    x[1, 17] = bad
    for fmt, options in (
        ("MXFP4", {}),
        ("NVFP4", {}),
        ("NVFP4", {"global_scale": "row"}),
        ("NVFP4", {"global_scale": 10.0}),
        ("MXFP4", {"rotation": 32}),
    ):
        with pytest.raises(ValueError, match=r"act .*\(3, 64\).*NaN"):
            quantize(x, fmt, name="act", **options)


def test_a_flag_keeps_the_first_call_that_met_what_is_not_finite(device):
    """It is told when it is asked, once; the calls before go through, and so does what comes after."""
    good, bad = _randn(3, 64).to(device), _randn(3, 64).to(device)
    bad[1, 17] = float("nan")
    flag = FiniteFlag(device)
    flag.check()
    for g in ("row", "dynamic", 10.0):
        quantize(good, "NVFP4", global_scale=g, name="good", flag=flag)
        flag.check()
        assert quantize(bad, "NVFP4", global_scale=g, name="first", flag=flag).packed.shape == (3, 32)
        fake_quantize(bad, "NVFP4", global_scale=g, name="second", flag=flag)
        quantize(good, "MXFP4", name="good", flag=flag)
        with pytest.raises(NotFinite, match=r"first .*\(3, 64\)"):
            flag.check()
        flag.check()


def test_refuses_what_it_cannot_do(device):
    x = _randn(2, 64).to(device)
    for fmt, options, message in [
        ("AMXFP4", {}, "use reqat.quantize"),
        ("NVFP4-4/6", {}, "use reqat.quantize"),
        ("NVFP4", {"rounding": "away"}, "use reqat.quantize"),
        ("MXFP4", {"global_scale": 2.0}, "has no global scale"),
        ("NVFP4", {"global_scale": "static"}, "needs the calibrated value"),
        ("NVFP4", {"global_scale": 0.0}, "must be finite and above"),
        ("NVFP4", {"global_scale": torch.ones(3, 1)}, r"scalar or of shape \(2, 1\)"),
        ("NVFP4", {"rotation": 24}, "power of two"),
        ("NVFP4", {"rotation": 128}, "that divides"),
        ("FP5", {}, "unknown format"),
    ]:
        with pytest.raises(ValueError, match=message):
            quantize(x, fmt, **options)
    with pytest.raises(ValueError, match="MXFP4's block of 32"):
        quantize(x[:, :48], "MXFP4")
    with pytest.raises(ValueError, match="dtype"):
        quantize(x.to(torch.int32), "MXFP4")
