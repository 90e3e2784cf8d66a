"""Decode attention over packed codes against its float64 twin, within a bound that follows from the arithmetic."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from reqat.formats import Format, get_format
from reqat_kernels.triton import attention as module
from reqat_kernels.triton.attention import decode_attention
from reqat_kernels.triton.kv_side import KVSide
from reqat_kernels.triton.naive_attention import append_naive, attention_naive, attention_weights_naive, dequantize_side
from reqat_kernels.triton.runtime import INTERPRETED

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or TRITON_INTERPRET=1"
)
DEVICE = "cpu" if INTERPRETED else "cuda"
U = 2.0**-24  # unit roundoff of float32

NVFP4, MXFP4 = get_format("NVFP4"), get_format("MXFP4")
NVFP4_E1M2, MXFP4_E1M2 = get_format("NVFP4", element="E1M2"), get_format("MXFP4", element="E1M2")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def filled(B: int, G: int, S: int, D: int, fmt: Format, g: Any = None, seed: int = 1) -> KVSide:
    """A full cache of Gaussian numbers; rows differ in size, so that a wrong global scale shows."""
    side = KVSide.allocate(B, G, S, D, fmt, global_scale=g, device=DEVICE)
    append_naive(side, randn(B, G, S, D, seed=seed) * (1 + torch.arange(S, device=DEVICE)[:, None] % 3), 0)
    return side


def assert_close_to_twin(query: Tensor, key: KVSide, value: KVSide, splits: int | None = None, **options: Any) -> None:
    """The kernel's answer lies within its rounding errors of float64's.

    Operands are exact: codes times block scales have six significant bits. A logit is a sum of D products in float32
    and a few operations more, so it is off by at most delta = (D + 16) u (sum |q k| scale + |mask|), in whatever order
    the sum is taken. A weight is then off by 2 delta relatively (itself and the sum that it is divided by), plus S u
    for that sum and 16 u for exp2, decay and division; and the weighted sum of values by another S u. On a GPU bf16
    rounds the weights by 2^-8, and tf32, which may cut, by 2^-10. Then the answer is rounded to the query's type.
    """
    out = decode_attention(query, key, value, splits=splits, **options)
    assert out.dtype == query.dtype and out.shape == query.shape
    weights, v = attention_weights_naive(query, key, value, **options)
    expected = weights @ v
    S, D, H = v.shape[2], query.shape[-1], query.shape[1]
    k = dequantize_side(key)[:, :, :S].repeat_interleave(H // key.codes.shape[1], 1)
    size = (query.double().abs() @ k.abs().mT) * abs(options.get("scale") or D**-0.5)
    mask = options.get("mask")
    if mask is not None and mask.dtype != torch.bool:
        size = size + (mask[:, None, None] if mask.ndim == 2 else mask)[..., :S].double().abs().clamp(max=1e30)
    size = torch.where(weights > 0, size, 0.0)
    delta = (D + 16) * U * size.amax(-1, keepdim=True) if S else torch.zeros_like(expected[..., :1])
    operand = 0.0
    if DEVICE != "cpu":
        operand = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float32: 0.0}[query.dtype]
    bound = (2 * delta + (2 * S + 16) * U + operand) * (weights @ v.abs())
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}[query.dtype]
    bound = bound + rounding * (expected.abs() + bound)
    excess = (out.double() - expected).abs() - bound
    assert bool((excess <= 0).all()), f"{float(excess.max())} above the bound {float(bound.max())}"


CASES = [
    # B, H, G, T, D, S, length, splits, keys, values
    (2, 6, 2, 1, 64, 130, None, 1, NVFP4, NVFP4),  # three heads a KV head, two tiles and a bit
    (1, 4, 4, 1, 32, 64, 63, 1, MXFP4, MXFP4),  # no sharing; one short of a tile
    (1, 8, 1, 1, 64, 200, 161, 2, NVFP4_E1M2, NVFP4),  # MQA; elements differ
    (1, 2, 1, 1, 96, 70, 65, 2, MXFP4_E1M2, MXFP4),  # head_dim no power of two
    (2, 2, 1, 1, 80, 40, 33, 1, NVFP4, NVFP4_E1M2),
    (1, 3, 3, 1, 16, 20, 17, 1, NVFP4, NVFP4),  # one block
    (1, 4, 2, 1, 64, 90, 1, 1, NVFP4, MXFP4),  # one token in the cache
    (1, 2, 1, 1, 64, 70, 70, 5, MXFP4, NVFP4),  # more splits than tiles: some are empty
    (1, 4, 2, 3, 32, 80, 77, 2, NVFP4, NVFP4),  # three tokens, causal
    (1, 6, 1, 13, 32, 80, 20, 2, MXFP4, MXFP4),  # 78 rows: a second row tile; most of the cache unused
    (1, 2, 2, 4, 32, 8, 2, 1, NVFP4, NVFP4),  # more tokens than keys: the first two see nothing
    (1, 2, 2, 1, 32, 8, 0, 2, NVFP4, NVFP4),  # empty cache
    (1, 2, 2, 1, 256, 66, None, 2, NVFP4, NVFP4),
]


@pytest.mark.parametrize("B, H, G, T, D, S, length, splits, kf, vf", CASES)
def test_attention_is_within_float32_rounding_of_float64(
    B: int, H: int, G: int, T: int, D: int, S: int, length: int | None, splits: int, kf: Format, vf: Format
) -> None:
    key, value = filled(B, G, S, D, kf), filled(B, G, S, D, vf, seed=2)
    assert_close_to_twin(randn(B, H, T, D), key, value, splits, length=length)


def test_the_bound_is_tight_enough_to_see_one_wrong_nibble() -> None:
    query, key, value = randn(1, 2, 1, 32), filled(1, 1, 40, 32, NVFP4), filled(1, 1, 40, 32, NVFP4, seed=2)
    assert_close_to_twin(query, key, value, 1)
    wrong = KVSide(key.codes.clone(), key.scales, key.global_scale, key.format)
    wrong.codes[0, 0, 7, 3] ^= 0x10  # the last bit of one code
    difference = decode_attention(query, wrong, value, splits=1).double() - attention_naive(query, key, value)
    assert float(difference.abs().max()) > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_queries(dtype: torch.dtype) -> None:
    key, value = filled(1, 2, 70, 64, NVFP4), filled(1, 2, 70, 64, MXFP4, seed=2)
    assert_close_to_twin(randn(1, 4, 1, 64).to(dtype), key, value, 1)
    assert_close_to_twin(randn(1, 4, 1, 64).to(dtype), key, value, 2)


def test_global_scale_as_a_number_a_token_or_a_row() -> None:
    query, per_token = randn(2, 2, 1, 32), 500 + 40 * torch.arange(30.0, device=DEVICE)
    for g in (700.0, torch.tensor([700.0]), per_token, torch.rand(2, 2, 30).to(DEVICE) * 500 + 300):
        key, value = filled(2, 2, 30, 32, NVFP4, g), filled(2, 2, 30, 32, NVFP4, 1.5 * torch.as_tensor(g), seed=2)
        assert_close_to_twin(query, key, value, 1)


def test_e8m0_scales_at_the_ends_of_their_range() -> None:
    key, value = filled(1, 1, 20, 32, MXFP4), filled(1, 1, 20, 32, MXFP4, seed=2)
    key.scales[:, :, :3] = 0  # 2^-127, a subnormal
    value.scales.fill_(251)  # values up to 6 * 2^124, just within float32
    value.scales[:, :, 5] = 1
    assert_close_to_twin(randn(1, 2, 1, 32), key, value, 1)


def masks(B: int, H: int, T: int, S: int) -> dict[str, Tensor]:
    position = torch.arange(S, device=DEVICE)
    left_padding = position >= torch.tensor([[0], [S - 5]], device=DEVICE)[:B]
    scattered = randn(B, H, T, S) > 0
    scattered[0, 1] = False  # a head that sees nothing: zeros
    return {
        "bool [B, S]": left_padding,
        "bool 4D": scattered,
        "bool, longer than the keys": torch.cat((left_padding, torch.ones_like(left_padding)), 1),
        "additive [B, 1, 1, S]": torch.where(left_padding, 0.0, -math.inf)[:, None, None],
        "additive 4D, lowest float32": torch.where(
            scattered, randn(B, H, T, S, seed=3), torch.finfo(torch.float32).min
        ),
        "additive, one a head": (randn(1, H, 1, 1) * position),
        "additive bf16": randn(B, 1, T, S, seed=4).bfloat16(),
    }


@pytest.mark.parametrize("kind", masks(2, 4, 2, 70))
def test_masks(kind: str) -> None:
    B, H, T, D, S = 2, 4, 2, 32, 70
    key, value = filled(B, 2, S, D, NVFP4), filled(B, 2, S, D, NVFP4, seed=2)
    assert_close_to_twin(randn(B, H, T, D), key, value, 2, mask=masks(B, H, T, S)[kind])


@pytest.mark.parametrize("splits", [1, 3])
def test_lengths_of_each_row(splits: int) -> None:
    B, S, D = 4, 200, 32
    key, value = filled(B, 1, S, D, NVFP4), filled(B, 1, S, D, NVFP4, seed=2)
    lengths = torch.tensor([200, 1, 0, 129], dtype=torch.int32 if splits == 1 else torch.int64, device=DEVICE)
    assert_close_to_twin(randn(B, 2, 1, D), key, value, splits, lengths=lengths)
    out = decode_attention(randn(B, 2, 1, D), key, value, lengths=lengths, splits=splits)
    assert bool((out[2] == 0).all())


def test_many_tokens_without_causality_and_with_another_scale() -> None:
    key, value = filled(1, 2, 50, 32, NVFP4), filled(1, 2, 50, 32, NVFP4, seed=2)
    assert_close_to_twin(randn(1, 4, 3, 32), key, value, 1, causal=False, scale=0.05)


def test_what_lies_beyond_the_length_is_never_read_into_the_answer() -> None:
    query, length = randn(1, 4, 1, 64), 37
    key, value = filled(1, 2, 130, 64, NVFP4), filled(1, 2, 130, 64, MXFP4, seed=2)
    expected = decode_attention(query, key, value, length=length, splits=1)
    for side in (key, value):
        side.codes[:, :, length:] = 0xFF
        side.scales[:, :, length:] = 0xFF  # NaN in both types
    assert key.global_scale is not None
    key.global_scale[:, :, length:] = math.nan
    assert torch.equal(decode_attention(query, key, value, length=length, splits=1), expected)


def test_any_strides() -> None:
    B, G, S, D = 2, 2, 70, 32
    key, value = filled(B, G, S, D, NVFP4), filled(B, G, S, D, NVFP4, seed=2)
    query = randn(B, 2, 4, D).transpose(1, 2)
    expected = decode_attention(query.contiguous(), key, value, splits=1)

    def token_major(side: KVSide) -> KVSide:  # [B, S, G, ...] in memory
        assert side.global_scale is not None
        parts = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (side.codes, side.scales, side.global_scale))
        return KVSide(*parts, side.format)

    assert torch.equal(decode_attention(query, token_major(key), token_major(value), splits=1), expected)
    spread = torch.zeros(B, 4, 2, 2 * D, device=DEVICE)[..., ::2].copy_(query)
    assert torch.equal(decode_attention(spread, key, value, splits=1), expected)


def test_no_queries() -> None:
    key, value = filled(1, 1, 8, 32, NVFP4), filled(1, 1, 8, 32, NVFP4)
    assert decode_attention(randn(1, 2, 0, 32), key, value).shape == (1, 2, 0, 32)


def test_splits_are_chosen_to_fill_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_multiprocessors", lambda device: 132)
    device = torch.device("cpu")
    assert module._splits(1, 1000, device) == 128  # no more partial results than one merge loads at once
    assert module._splits(8, 1000, device) == 33  # 8 * 33 = 264 = 2 * 132
    assert module._splits(8, 4, device) == 4  # a split has a tile at least
    assert module._splits(512, 1000, device) == 1
    assert module._splits(8, 0, device) == 1


def test_arguments_that_do_not_fit() -> None:
    query, key, value = randn(2, 4, 1, 32), filled(2, 2, 8, 32, NVFP4), filled(2, 2, 8, 32, NVFP4)
    for arguments, options, message in [
        ((query[0], key, value), {}, "query must be"),
        ((query.double(), key, value), {}, "query must be"),
        ((query[:, :3], key, value), {}, "does not fit a cache"),
        ((query[:1], key, value), {}, "does not fit a cache"),
        ((randn(2, 4, 1, 64), key, value), {}, "head_dim 32"),
        ((query, key, filled(2, 2, 9, 32, NVFP4)), {}, "one shape"),
        ((query, key, value), {"length": 9}, "capacity of 8"),
        ((query, key, value), {"length": -1}, "capacity of 8"),
        ((query, key, value), {"lengths": torch.tensor([3.0, 3.0])}, "lengths must be int32"),
        ((query, key, value), {"length": 3, "lengths": torch.tensor([3, 3])}, "not both"),
        ((query, key, value), {"mask": torch.ones(2, 7, dtype=torch.bool)}, "at least 8 keys"),
        ((query, key, value), {"mask": torch.ones(3, 8, dtype=torch.bool)}, "must broadcast"),
        ((query, key, value), {"mask": torch.ones(2, 8, dtype=torch.int64)}, "boolean or floating"),
        ((query, key, value), {"splits": 0}, "splits must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            decode_attention(*arguments, **options)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="capacity of 8"):
            decode_attention(query, key, value, lengths=torch.tensor([3, 9]))


def test_caches_that_do_not_fit() -> None:
    codes = torch.zeros(1, 2, 8, 16, dtype=torch.uint8)
    scales = torch.zeros(1, 2, 8, 2, dtype=torch.uint8)
    g = torch.ones(())
    for arguments, message in [
        ((codes.int(), scales, g, NVFP4), "codes must be uint8"),
        ((codes, scales[..., :1], g, NVFP4), "scales must be uint8"),
        ((codes, scales.view(torch.float8_e4m3fn), g, NVFP4), "view float8 scales"),
        ((codes[..., :12], scales, None, MXFP4), "MXFP4's block of 32"),
        ((codes, scales, None, NVFP4), "needs a global_scale"),
        ((codes, scales[..., :1], g, MXFP4), "has no global scale"),
        ((codes, scales, g.double(), NVFP4), "must be float32"),
        ((codes, scales, torch.ones(7), NVFP4), r"must be a scalar, \[S\]"),
        ((codes.transpose(2, 3).contiguous().transpose(2, 3), scales, g, NVFP4), "must be contiguous"),
        ((codes, scales, g, get_format("AMXFP4")), "the cache kernels take"),
    ]:
        with pytest.raises(ValueError, match=message):
            KVSide(*arguments)
    with pytest.raises(ValueError, match="no global scale"):
        KVSide.allocate(1, 1, 8, 32, MXFP4, global_scale=2.0)
    with pytest.raises(ValueError, match="multiple of NVFP4's block"):
        KVSide.allocate(1, 1, 8, 24, NVFP4)


def test_bytes_of_a_cache() -> None:
    assert KVSide.allocate(2, 3, 100, 64, "MXFP4").nbytes == 2 * 3 * 100 * (32 + 2)
    assert KVSide.allocate(2, 3, 100, 64, "NVFP4").nbytes == 2 * 3 * 100 * (32 + 4 + 4)
    assert KVSide.allocate(2, 3, 100, 64, "NVFP4", global_scale=300.0).nbytes == 2 * 3 * 100 * (32 + 4) + 4
