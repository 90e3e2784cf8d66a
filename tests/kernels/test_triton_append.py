"""Append-and-quantize against ``reqat.quantize``: the same codes, scales and rows' global scales, bit for bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from reqat.formats import Format, get_format
from reqat_kernels.triton.append import append
from reqat_kernels.triton.attention import decode_attention
from reqat_kernels.triton.finite import FiniteFlag, NotFinite
from reqat_kernels.triton.kv_side import KVSide
from reqat_kernels.triton.naive_attention import append_naive, dequantize_side
from reqat_kernels.triton.runtime import INTERPRETED

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or TRITON_INTERPRET=1"),
    # Rows of zeros divide 1 by 0 on the way to a result that is not taken; numpy says so.
    pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow):RuntimeWarning"),
]
DEVICE = "cpu" if INTERPRETED else "cuda"

NVFP4, MXFP4 = get_format("NVFP4"), get_format("MXFP4")
FORMATS = {
    "NVFP4": NVFP4,
    "NVFP4 E1M2": get_format("NVFP4", element="E1M2"),
    "NVFP4 multiply": get_format("NVFP4", scale_rule="multiply"),
    "NVFP4 reciprocal": get_format("NVFP4", scale_rule="reciprocal"),
    "MXFP4": MXFP4,
    "MXFP4 E1M2": get_format("MXFP4", element="E1M2"),
    "MXFP4 floor": get_format("MXFP4", scale_rule="floor"),
    "MXFP4 even": get_format("MXFP4", scale_rule="even"),
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def empty(B: int, G: int, S: int, D: int, fmt: Format, g: Any = None) -> KVSide:
    """A cache full of garbage, so that what is not to be written shows too."""
    side = KVSide.allocate(B, G, S, D, fmt, global_scale=g, device=DEVICE)
    side.codes.fill_(0xA5)
    side.scales.fill_(0x5A)
    return side


def copy(side: KVSide) -> KVSide:
    g = side.global_scale
    return KVSide(side.codes.clone(), side.scales.clone(), None if g is None else g.clone(), side.format)


def assert_same(a: KVSide, b: KVSide) -> None:
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.scales, b.scales)
    if a.global_scale is not None and b.global_scale is not None:
        assert torch.equal(a.global_scale, b.global_scale)


def assert_appends_as_the_reference(
    key: Tensor,
    value: Tensor,
    kf: Format,
    vf: Format,
    offset: int = 0,
    capacity: int = 0,
    g: Any = None,
    **options: Any,
) -> None:
    """Append by kernel and by reference to the same garbage; all of both caches must be equal then."""
    B, G, T, D = key.shape
    g = g or (None, None)
    caches = [empty(B, G, capacity or offset + T, D, fmt, one) for fmt, one in zip((kf, vf), g, strict=True)]
    expected = [copy(cache) for cache in caches]
    append(key, value, *caches, offset, **options)
    append_naive(expected[0], key, offset, **options)
    append_naive(expected[1], value, offset)
    for cache, twin in zip(caches, expected, strict=True):
        assert_same(cache, twin)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_format(name: str, dtype: torch.dtype) -> None:
    fmt, other = FORMATS[name], FORMATS["NVFP4 E1M2" if name == "MXFP4" else "MXFP4"]
    key, value = (randn(2, 2, 5, 64, seed=seed).to(dtype) for seed in (0, 1))
    g = (500.0, None) if fmt.has_global_scale else None
    assert_appends_as_the_reference(key, value, fmt, other, offset=3, capacity=11, shift_GD=randn(2, 64, seed=2))
    assert_appends_as_the_reference(key, value, fmt, MXFP4, offset=3, capacity=11, g=g)


def hard_rows() -> dict[str, Tensor]:
    ties = torch.tensor([6, 5, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25, -5, -3.5, -2.5, -1.75, -1.25, -0.75, -0.25, -0.0])
    e1m2_ties = (torch.arange(64) % 15 - 7) * 0.5 + 0.25
    normal = torch.randn(8, 64, generator=torch.Generator().manual_seed(5))
    return {
        "zeros": torch.stack([torch.zeros(64), torch.full((64,), -0.0)]),
        "ties": torch.stack([ties.repeat(4) * 2.0**k for k in range(-10, 11)]),
        "E1M2 ties": torch.stack([e1m2_ties * 2.0**k for k in range(-4, 5)]),
        "zero blocks among others": torch.where(torch.arange(64) % 64 < 32, 0.0, normal),
        "wide range": normal * torch.exp(8 * normal.flip(0)),
        "subnormal": normal * 1e-39,
        "huge": (normal * 1e38).clamp(-3.4028234e38, 3.4028234e38),
        "largest": torch.full((2, 64), torch.finfo(torch.float32).max),
    }


@pytest.mark.parametrize(
    "kf, vf", [("NVFP4", "MXFP4"), ("NVFP4 E1M2", "MXFP4 E1M2"), ("NVFP4 reciprocal", "MXFP4 even")]
)
def test_hard_numbers(kf: str, vf: str) -> None:
    rows = torch.cat(list(hard_rows().values())).to(DEVICE)
    x = rows.view(1, 1, *rows.shape)
    assert_appends_as_the_reference(x, x, FORMATS[kf], FORMATS[vf])
    # A calibrated g does not know these rows: scales saturate at 448 and codes at the element's maximum.
    assert_appends_as_the_reference(x, x, FORMATS[kf], FORMATS[vf], g=(448.0 * 6 / 3, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [32, 80, 96])
def test_rotation_and_shift(dtype: torch.dtype, D: int) -> None:
    B, G, T = 2, 2, 3
    fmt = NVFP4 if D == 80 else MXFP4
    key, value = (randn(B, G, T, D, seed=seed).to(dtype) * 3 for seed in (0, 1))
    angle = torch.arange(7.0, 7 + T, device=DEVICE)[:, None] * 10000 ** -(torch.arange(D, device=DEVICE) % (D // 2) / D)
    cos, sin = angle.cos()[None], angle.sin()[None]
    shift = randn(G, D, seed=2)
    # Tables in the model's type, as transformers makes them; and one a batch row, in float32.
    assert_appends_as_the_reference(key, value, fmt, fmt, shift_GD=shift, cos=cos.to(dtype), sin=sin.to(dtype))
    each = (cos.repeat(B, 1, 1) * torch.tensor([[[1.0]], [[0.5]]], device=DEVICE), sin.repeat(B, 1, 1))
    assert_appends_as_the_reference(key, value, NVFP4, NVFP4, cos=each[0], sin=each[1])


def test_rotation_is_the_one_of_transformers() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    key = randn(2, 2, 3, 32).bfloat16()
    angle = randn(2, 3, 16, seed=1)
    angle = torch.cat((angle, angle), -1)
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    _, rotated = apply_rotary_pos_emb(key, key, cos, sin)
    fused, separate, value = (empty(2, 2, 3, 32, NVFP4) for _ in range(3))
    append(key, key, fused, value, 0, cos=cos, sin=sin)
    append(rotated, key, separate, value, 0)
    assert_same(fused, separate)


def test_global_scale_a_token_is_read_at_its_place() -> None:
    key, value = randn(2, 2, 4, 32), randn(2, 2, 4, 32, seed=1)
    per_token = 300 + 100 * torch.arange(9.0, device=DEVICE)
    per_row = torch.rand(2, 2, 9).to(DEVICE) * 900 + 100
    assert_appends_as_the_reference(key, value, NVFP4, NVFP4, offset=3, capacity=9, g=(per_token, per_row))


def test_any_strides() -> None:
    x = randn(2, 5, 3, 64)
    key = x.transpose(1, 2)  # [B, T, G, D] in memory
    value = randn(2, 3, 5, 128)[..., ::2]
    assert_appends_as_the_reference(key, value, NVFP4, MXFP4, offset=1)
    assert_appends_as_the_reference(key, value, NVFP4, MXFP4, shift_GD=randn(64, 3).T)
    whole = KVSide.allocate(2, 3, 40, 64, NVFP4, device=DEVICE)
    assert whole.global_scale is not None
    window = KVSide(whole.codes[:, :, 10:20], whole.scales[:, :, 10:20], whole.global_scale[:, :, 10:20], whole.format)
    expected, other = copy(window), empty(2, 3, 10, 64, MXFP4)
    append(key, value, window, other, 2)
    append_naive(expected, key, 2)
    assert_same(window, expected)
    assert not bool(whole.codes[:, :, :12].any()) and not bool(whole.codes[:, :, 17:].any())


def test_an_offset_for_each_row_of_the_batch() -> None:
    key, value = randn(3, 2, 2, 32), randn(3, 2, 2, 32, seed=1)
    caches = empty(3, 2, 8, 32, NVFP4), empty(3, 2, 8, 32, MXFP4)
    expected = [copy(cache) for cache in caches]
    places = [0, 6, 3]
    append(key, value, *caches, torch.tensor(places, device=DEVICE))
    for row, place in enumerate(places):
        for side, x in zip(expected, (key, value), strict=True):
            g = side.global_scale
            part = KVSide(
                side.codes[row, None], side.scales[row, None], None if g is None else g[row, None], side.format
            )
            append_naive(part, x[row, None], place)
    for cache, twin in zip(caches, expected, strict=True):
        assert_same(cache, twin)


def test_tokens_that_the_host_did_not_look_at_are_dropped_beyond_the_capacity() -> None:
    flag = FiniteFlag(DEVICE)
    key = randn(2, 1, 3, 32)
    caches = empty(2, 1, 5, 32, NVFP4), empty(2, 1, 5, 32, NVFP4)
    expected = copy(caches[0])
    append(key, key, *caches, torch.tensor([0, 2], device=DEVICE), flag=flag)
    flag.check()
    caches = empty(2, 1, 5, 32, NVFP4), empty(2, 1, 5, 32, NVFP4)
    append(key, key, *caches, torch.tensor([4, -1], device=DEVICE), flag=flag)
    with pytest.raises(ValueError, match="capacity of 5") as told:
        flag.check()
    assert type(told.value) is ValueError
    assert expected.global_scale is not None
    first = KVSide(expected.codes[:1], expected.scales[:1], expected.global_scale[:1], expected.format)
    second = KVSide(expected.codes[1:], expected.scales[1:], expected.global_scale[1:], expected.format)
    append_naive(first, key[:1, :, :1], 4)
    append_naive(second, key[1:, :, 1:], 0)
    for cache in caches:
        assert_same(cache, expected)


def test_token_by_token_equals_all_at_once() -> None:
    key, value = randn(1, 2, 6, 32), randn(1, 2, 6, 32, seed=1)
    at_once = empty(1, 2, 6, 32, NVFP4), empty(1, 2, 6, 32, NVFP4, 400.0)
    one_by_one = empty(1, 2, 6, 32, NVFP4), empty(1, 2, 6, 32, NVFP4, 400.0)
    append(key, value, *at_once, 0)
    for t in range(6):
        append(key[:, :, t : t + 1], value[:, :, t : t + 1], *one_by_one, t)
    for a, b in zip(at_once, one_by_one, strict=True):
        assert_same(a, b)


def test_decoding_needs_no_correction_for_the_shift() -> None:
    key, value, shift = randn(1, 2, 20, 32), randn(1, 2, 20, 32, seed=1), 4 * randn(2, 32, seed=2)
    key = key + shift[:, None]
    caches = empty(1, 2, 20, 32, NVFP4), empty(1, 2, 20, 32, NVFP4)
    append(key, value, *caches, 0, shift_GD=shift)
    query = randn(1, 2, 1, 32, seed=3)
    stored = dequantize_side(caches[0])
    assert float((stored + shift[:, None] - key).abs().mean()) < 0.15  # the cache holds K - m
    logits = query.double() @ (stored + shift[:, None].double()).mT * 32**-0.5  # with m put back
    expected = torch.softmax(logits, -1) @ dequantize_side(caches[1])
    # A sum of 32 products and 16 operations more in float32; weights are off by twice that, relatively.
    size = (query.double().abs() @ stored.abs().mT).max() * 32**-0.5
    bound = 2 * (32 + 16) * 2.0**-24 * size * dequantize_side(caches[1]).abs().max()
    assert float((decode_attention(query, *caches).double() - expected).abs().max()) <= float(bound)


def test_no_tokens() -> None:
    caches = empty(1, 2, 6, 32, NVFP4), empty(1, 2, 6, 32, MXFP4)
    expected = [copy(cache) for cache in caches]
    append(randn(1, 2, 0, 32), randn(1, 2, 0, 32), *caches, 6)
    for cache, twin in zip(caches, expected, strict=True):
        assert_same(cache, twin)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_an_error_and_nothing_is_written(bad: float) -> None:
    key, value = randn(1, 2, 3, 32), randn(1, 2, 3, 32)
    caches = empty(1, 2, 6, 32, NVFP4), empty(1, 2, 6, 32, NVFP4)
    expected = [copy(cache) for cache in caches]
    value[0, 1, 2, 7] = bad
    with pytest.raises(ValueError, match="value of shape .*NaN"):
        append(key, value, *caches, 0)
    for cache, twin in zip(caches, expected, strict=True):
        assert_same(cache, twin)


@pytest.mark.parametrize("bad", ["key", "value", "shifted"])
def test_a_flag_is_raised_by_the_call_whose_numbers_are_not_finite(bad: str) -> None:
    key, value, shift = randn(1, 2, 3, 32), randn(1, 2, 3, 32), torch.zeros(2, 32, device=DEVICE)
    caches = empty(1, 2, 6, 32, NVFP4), empty(1, 2, 6, 32, MXFP4)
    flag = FiniteFlag(DEVICE)
    append(key, value, *caches, 0, shift_GD=shift, names=("good keys", "good values"), flag=flag)
    flag.check()
    if bad == "shifted":  # finite until the shift is subtracted
        key[0, 1, 2, 7], shift[1, 7] = 3e38, -3e38
    else:
        (key if bad == "key" else value)[0, 1, 2, 7] = math.inf
    for names in (("these keys", "these values"), ("later keys", "later values")):
        append(key, value, *caches, 0, shift_GD=shift, names=names, flag=flag)
    with pytest.raises(NotFinite, match=r"these values .*\(1, 2, 3, 32\)" if bad == "value" else "these keys"):
        flag.check()
    if bad == "shifted":
        with pytest.raises(NotFinite, match="these keys"):
            append(key, value, *caches, 0, shift_GD=shift, names=("these keys", None))


def test_arguments_that_do_not_fit() -> None:
    x, nv, mx = randn(2, 2, 3, 32), empty(2, 2, 6, 32, NVFP4), empty(2, 2, 6, 32, MXFP4)
    dynamic = KVSide(nv.codes, nv.scales, nv.global_scale, NVFP4)
    table = randn(1, 3, 32)
    assert nv.global_scale is not None
    shared = KVSide(nv.codes, nv.scales, nv.global_scale[:1, :1].expand(2, 2, 6), nv.format)
    for arguments, options, message in [
        ((x, x, nv, mx, 4), {}, "3 tokens at 4 .*capacity of 6"),
        ((x, x, nv, mx, -1), {}, "3 tokens at -1"),
        ((x, x, nv, mx, torch.tensor([0.0, 1.0])), {}, "offsets must be int32"),
        ((x[0], x, nv, mx, 0), {}, "key must be"),
        ((x.double(), x, nv, mx, 0), {}, "key must be"),
        ((x, x[:, :1], nv, mx, 0), {}, "value .* does not fit a cache"),
        ((x, x[:, :, :2], nv, mx, 0), {}, "must have one shape"),
        ((x, x, dynamic, mx, 0), {}, "global_scale row or static"),
        ((x, x, shared, mx, 0), {}, "one global scale a row"),
        ((x, x, nv, empty(2, 2, 6, 32, get_format("MXFP4", rounding="away")), 0), {}, "rounding even"),
        ((x, x, nv, mx, 0), {"shift_GD": randn(2, 16)}, "shift must be float32"),
        ((x, x, nv, mx, 0), {"cos": table}, "both cos and sin"),
        ((x, x, nv, mx, 0), {"cos": table, "sin": table[:, :2]}, "sin must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            append(*arguments, **options)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=r"3 tokens at \[0, 4\]"):
            append(x, x, nv, mx, torch.tensor([0, 4]))
