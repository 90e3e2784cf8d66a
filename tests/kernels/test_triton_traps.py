"""What triton's interpreter gets wrong, pinned: when an upgrade mends one of these, the way around it can go.

Each test names the code that goes around the trap. The device functions of elements.py, which do, are held to the
reference here over every bfloat16.
"""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from reqat.formats import ELEMENTS, quantize  # noqa: E402
from reqat.formats.scales import e8m0_from_amax, e8m0_to_float, global_scale_from_amax  # noqa: E402
from reqat_kernels.triton import elements as el  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|overflow|invalid value):RuntimeWarning")


@triton.jit
def _dot(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision="ieee"))


@triton.jit
def _dot_scaled(a_ptr, as_ptr, b_ptr, bs_ptr, out_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr, E4M3: tl.constexpr):
    i = tl.arange(0, SIZE)
    pairs = tl.arange(0, SIZE // 2)
    blocks = tl.arange(0, SIZE // BLOCK)
    a = tl.load(a_ptr + i[:, None] * (SIZE // 2) + pairs[None, :])
    b = tl.load(b_ptr + i[:, None] * (SIZE // 2) + pairs[None, :])
    a_s = tl.load(as_ptr + i[:, None] * (SIZE // BLOCK) + blocks[None, :])
    b_s = tl.load(bs_ptr + i[:, None] * (SIZE // BLOCK) + blocks[None, :])
    if E4M3:
        a_s = a_s.to(tl.float8e4nv, bitcast=True)
        b_s = b_s.to(tl.float8e4nv, bitcast=True)
    out = tl.dot_scaled(a, a_s, "e2m1", tl.trans(b), b_s, "e2m1")
    tl.store(out_ptr + i[:, None] * SIZE + i[None, :], out)


@triton.jit
def _each(x_ptr, out_ptr, n, WHAT: tl.constexpr, E1M2: tl.constexpr, RULE: tl.constexpr, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(x_ptr + i, mask=i < n, other=0)
    if WHAT == "to bfloat16":
        y = x.to(tl.bfloat16)
    elif WHAT == "to e4m3":
        y = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    elif WHAT == "cast":
        y = el.cast(x, tl.bfloat16)
    elif WHAT == "as_float32":
        y = el.as_float32(x)
    elif WHAT == "encode":
        y = el.encode_element(x, E1M2)
    elif WHAT == "decode":
        y = el.decode_element(x, E1M2)
    elif WHAT == "decode fp16":
        y = el.decode_element_fp16(x.to(tl.int16), E1M2)
    elif WHAT == "encode e4m3":
        y = el.encode_e4m3(x)
    elif WHAT == "decode e4m3":
        y = el.decode_e4m3(x)
    elif WHAT == "encode e8m0":
        y = el.encode_e8m0(x, RULE, E1M2)
    elif WHAT == "decode e8m0":
        y = el.decode_e8m0(x)
    else:
        y = el.nvfp4_global_scale(x, E1M2, RULE)
    tl.store(out_ptr + i, y, mask=i < n)


def _run(x, what, dtype, e1m2=False, rule=""):
    out = torch.empty(x.numel(), dtype=dtype, device=x.device)
    size = 65536 if x.device.type == "cpu" else 1024
    _each[(triton.cdiv(x.numel(), size),)](
        x.contiguous(), out, x.numel(), WHAT=what, E1M2=e1m2, RULE=rule, SIZE=size, enable_fp_fusion=False
    )
    return out


@pytest.fixture(scope="module")
def numbers(device):
    """Every finite bfloat16 as float32, and random numbers of all magnitudes with full mantissas."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(0, 2**31, (20000,), generator=generator, dtype=torch.int64)
    wild = (bits - (bits % 2) * 2**31).to(torch.int32).view(torch.float32)
    near = torch.randn(20000, generator=generator) * 4
    both = torch.cat([every, wild, near, near * 100])
    return both[torch.isfinite(both)].to(device)


# --- the traps --------------------------------------------------------------------------------------------------------


def test_bfloat16_dot_is_wrong(interpreted):
    """gemm.py computes in float32 under the interpreter."""
    x = torch.ones(16, 16, dtype=torch.bfloat16)
    out = torch.empty(16, 16)
    _dot[(1,)](x, x, out, SIZE=16)
    assert float(out[0, 0]) != 16.0, "tl.dot on bfloat16 is mended: COMPUTE in gemm.py need not be float32"


def test_float16_and_float32_dot_are_right(device):
    for dtype in (torch.float16, torch.float32):
        a = torch.arange(256, dtype=torch.float32, device=device).view(16, 16).to(dtype) - 100
        out = torch.empty(16, 16, device=device)
        _dot[(1,)](a, a, out, SIZE=16)
        assert torch.equal(out, a.float() @ a.float())  # integers below 2^24: exact


def test_cast_to_bfloat16_truncates(interpreted):
    """elements.cast rounds by integer arithmetic."""
    x = torch.tensor([1.0 + 2.0**-8 + 2.0**-9])  # three quarters of the way from 1 to the next bfloat16
    assert float(_run(x, "to bfloat16", torch.bfloat16)) == 1.0, "the cast is mended: elements.cast may use it"
    subnormal = torch.tensor([2.0**-130])
    assert float(_run(subnormal, "to bfloat16", torch.bfloat16)) == 0.0, "the cast keeps subnormals now"


def test_cast_to_e4m3_does_not_round_to_nearest_even(interpreted, numbers):
    """elements.encode_e4m3 rounds by addition."""
    x = numbers.clamp(-448, 448)
    wrong = _run(x, "to e4m3", torch.uint8) != x.to(torch.float8_e4m3fn).view(torch.uint8)
    assert bool(wrong.any()), "the cast is mended: elements.encode_e4m3 may use it where the GPU has it"


def _scaled_operands(fmt, device):
    generator = torch.Generator().manual_seed(3)
    a, b = (quantize(torch.randn(64, 64, generator=generator), fmt, global_scale=g) for g in (_G[fmt], _G[fmt]))
    out = torch.empty(64, 64, device=device)
    parts = [t.to(device) for q in (a, b) for t in (q.pack().packed, q.scales.view(torch.uint8))]
    _dot_scaled[(1,)](*parts, out, SIZE=64, BLOCK=a.format.block, E4M3=fmt == "NVFP4")
    return out.cpu(), (a.dequantize().double() @ b.dequantize().double().T)


_G = {"NVFP4": 1.0, "MXFP4": None}


def test_scaled_dot_reads_e4m3_scales_wrongly(interpreted):
    """gemm.py unpacks NVFP4 instead."""
    out, want = _scaled_operands("NVFP4", torch.device("cpu"))
    assert float((out - want).abs().max()) > 0.1 * float(want.abs().max()), "mended: linear_w4a4 may use dot_scaled"


def test_scaled_dot_reads_e8m0_scales_rightly(device):
    out, want = _scaled_operands("MXFP4", device)
    # 64 products of few bits, summed in float32 in some order: at most 64 roundings of partial sums.
    assert float((out - want).abs().max()) <= 64 * 2.0**-24 * 64 * 36


# --- the ways around them ---------------------------------------------------------------------------------------------


def test_casts(numbers, same_bits):
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).to(numbers.device)
    same_bits(_run(every, "as_float32", torch.float32), every.float())
    same_bits(_run(numbers, "cast", torch.bfloat16), numbers.bfloat16())
    special = torch.tensor([float("nan"), float("inf"), -float("inf")], device=numbers.device)
    assert str(_run(special, "cast", torch.bfloat16).tolist()) == "[nan, inf, -inf]"
    all_ones = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32, device=numbers.device).view(torch.float32)
    assert bool(torch.isnan(_run(all_ones, "cast", torch.bfloat16)).all())


@pytest.mark.parametrize("element", ["E2M1", "E1M2"])
def test_elements(numbers, element, same_bits):
    e1m2, kind = element == "E1M2", ELEMENTS[element]
    values = kind.round_(numbers.clone(), torch.empty_like(numbers))
    same_bits(_run(numbers, "encode", torch.uint8, e1m2), kind.encode(values, torch.signbit(numbers)))
    codes = torch.arange(16, dtype=torch.uint8, device=numbers.device)
    same_bits(_run(codes, "decode", torch.float32, e1m2), kind.decode(codes))
    assert torch.equal(_run(codes, "decode fp16", torch.float16, e1m2).float(), kind.decode(codes))


def test_e4m3(numbers, same_bits):
    want = numbers.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    same_bits(_run(numbers, "encode e4m3", torch.uint8), want)
    codes = torch.tensor([c for c in range(256) if c & 127 != 127], dtype=torch.uint8, device=numbers.device)
    values = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(_run(codes, "decode e4m3", torch.float32), values)


@pytest.mark.parametrize("element", ["E2M1", "E1M2"])
def test_scale_rules(numbers, element, same_bits):
    e1m2, kind, amax = element == "E1M2", ELEMENTS[element], numbers.abs()
    for rule in ("rceil", "floor", "even"):
        same_bits(_run(amax, "encode e8m0", torch.int32, e1m2, rule), e8m0_from_amax(amax, kind, rule))
    for rule in ("divide", "reciprocal"):
        want = global_scale_from_amax(amax, 448.0, kind.emax, rule)
        same_bits(_run(amax, "global scale", torch.float32, e1m2, rule), want)
    exponents = torch.arange(255, dtype=torch.uint8, device=numbers.device)
    same_bits(_run(exponents, "decode e8m0", torch.float32), e8m0_to_float(exponents))
