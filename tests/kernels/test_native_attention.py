"""The packed cache and its attention: codes equal to reqat.quantize's bit for bit, sums within a derived bound.

The reference takes the codes as they are stored, turns them into float64 exactly (value * s / g) and applies the
formula. Each test runs on every instruction set and without the library.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from reqat.formats import Format, get_format, quantize
from reqat.inference.native_backend import NativeBackend
from reqat_kernels.native import attention
from reqat_kernels.native.attention import PackedStates, kv_attention
from reqat_kernels.native.library import library
from reqat_kernels.native.quantize import format_key

U = 2.0**-24
NVFP4 = get_format("NVFP4", element="E1M2", global_scale="row")


@pytest.fixture(params=("torch", "portable", "avx2", "avx512"))
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Everything below this instruction set is what runs; ``torch`` is the path without a library."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if request.param == "torch":
        monkeypatch.setattr(attention, "library", lambda: None)
    else:
        request.getfixturevalue("limit_isa")(request.param)
    yield request.param
    torch.set_num_threads(threads)


def filled(kind: str, fmt: Format, states: Tensor, chunks: int = 3, **options: Any) -> PackedStates:
    """A cache that took ``states`` [B, G, S, D] in ``chunks`` pieces, with a little room left."""
    B, G, S, D = states.shape
    packed = PackedStates.allocate(kind, fmt, B, G, S + 3, D, **options)  # type: ignore[arg-type]
    start = 0
    for piece in states.tensor_split(min(chunks, max(S, 1)), 2):
        packed.append(piece, start)
        start += piece.shape[2]
    return packed


def exact(packed: PackedStates, length: int) -> Tensor:
    """What the codes stand for, in float64."""
    q = packed.quantized(length)
    values = q.format.element_type.decode(q.codes).double()
    s = q.block_scales() if q.global_scale is None else q.scales.double() / q.global_scale.double()
    return values * s.double().repeat_interleave(values.shape[-1] // s.shape[-1], -1)


def reference(
    query: Tensor, key: PackedStates, value: PackedStates, length: int, visible: Tensor, added: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """Output in float64 and the bound on its error that attention.py states; ``visible`` [B, H, T, S] boolean."""
    q = query.double()
    H, D = q.shape[1], q.shape[3]
    k, v = (exact(side, length).repeat_interleave(H // side.shape[1], 1) for side in (key, value))
    scaling, block = D**-0.5, key.format.block
    assert block is not None
    score = q @ k.transpose(-1, -2) * scaling
    error = (block + D / block + 6) * U * scaling * (q.abs() @ k.abs().transpose(-1, -2))
    if isinstance(added, Tensor):
        added = added.double()
        error = error + U * (score.abs() + added.abs()).nan_to_num(posinf=0.0)
        score = score + added
    score = score.masked_fill(~visible, -torch.inf)
    top = score.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    e = (score - top).exp()
    p = e / e.sum(-1, keepdim=True).clamp(min=1e-300)
    out = p @ v
    distance = (score - top).abs().nan_to_num(posinf=0.0)
    weighted = p * (error + U * distance + 4 * U)
    sums = (min(length, 512) + length / 512 + 12) * U
    bound = weighted @ v.abs() + weighted.sum(-1, keepdim=True) * out.abs() + sums * (p @ v.abs() + out.abs())
    return out, 1.01 * bound


def check(out: Tensor, expected: Tensor, bound: Tensor) -> None:
    assert out.dtype == torch.float32 and out.shape == expected.shape
    worst = ((out.double() - expected).abs() / bound.clamp(min=1e-300)).max() if out.numel() else torch.zeros(())
    assert worst <= 1, f"error is {float(worst):.3g} times the bound"


def causal(B: int, H: int, T: int, S: int) -> Tensor:
    return torch.ones(T, S, dtype=torch.bool).tril(S - T).expand(B, H, T, S)


# tokens, head_dim, query heads, key/value heads
SHAPES = [(1, 32, 1, 1), (15, 64, 2, 2), (16, 128, 4, 2), (33, 96, 5, 1), (513, 64, 9, 3), (1040, 32, 7, 1)]
FORMATS = {
    "E1M2-row": NVFP4,
    "E2M1-dynamic": get_format("NVFP4", global_scale="dynamic"),
    "4/6": get_format("NVFP4-4/6", global_scale="row"),
    "reciprocal": get_format("NVFP4", scale_rule="reciprocal", global_scale="dynamic"),
    "MXFP4": get_format("MXFP4"),
}


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_attention_stays_within_its_bound(isa: str, fmt: Format) -> None:
    for S, D, H, G in [
        (1, 32, 1, 1),
        (15, 64, 2, 2),
        (16, 128, 4, 2),
        (33, 96, 5, 1),
        (513, 64, 9, 3),
        (1040, 32, 7, 1),
    ]:
        key, value = (filled(kind, fmt, torch.randn(2, G, S, D)) for kind in ("key", "value"))
        query = 3 * torch.randn(2, H, 1, D)
        check(kv_attention(query, key, value, S), *reference(query, key, value, S, causal(2, H, 1, S)))


@pytest.mark.parametrize("D", [16, 48, 80, 112, 256])
def test_any_head_dimension_that_blocks_divide(isa: str, D: int) -> None:
    key, value = (filled(kind, NVFP4, torch.randn(1, 2, 50, D)) for kind in ("key", "value"))
    query = torch.randn(1, 4, 1, D)
    check(kv_attention(query, key, value, 50), *reference(query, key, value, 50, causal(1, 4, 1, 50)))


def test_keys_and_values_may_differ_in_format_and_magnitude(isa: str) -> None:
    for size, other in ((1e-30, 1e30), (1e30, 1e-30)):
        key = filled("key", get_format("MXFP4", element="E1M2"), size * torch.randn(1, 1, 40, 64))
        value = filled("value", FORMATS["E2M1-dynamic"], other * torch.randn(1, 1, 40, 64))
        query = torch.randn(1, 3, 1, 64) / size
        check(kv_attention(query, key, value, 40), *reference(query, key, value, 40, causal(1, 3, 1, 40)))


def test_masks_boolean_additive_broadcast_and_left_padding(isa: str) -> None:
    B, H, G, T, S, D = 2, 4, 2, 3, 540, 32
    key, value = (filled(kind, NVFP4, torch.randn(B, G, S, D)) for kind in ("key", "value"))
    query = torch.randn(B, H, T, D)
    for shape in [(B, 1, T, S), (1, 1, 1, S), (B, H, T, S), (B, 1, 1, 1)]:
        allowed = torch.rand(shape) < 0.6
        out = kv_attention(query, key, value, S, mask=allowed)
        check(out, *reference(query, key, value, S, allowed.expand(B, H, T, S)))
        added = torch.randn(shape).masked_fill(~allowed, -torch.inf)
        out = kv_attention(query, key, value, S, mask=added)
        check(out, *reference(query, key, value, S, allowed.expand(B, H, T, S), added.masked_fill(~allowed, 0.0)))
    start = torch.tensor([530, 7])
    seen = torch.arange(S) >= start[:, None, None, None]
    out = kv_attention(query, key, value, S, start=start)
    check(out, *reference(query, key, value, S, causal(B, H, T, S) & seen))
    assert torch.equal(out, kv_attention(query, key, value, S, mask=causal(B, H, T, S) & seen))
    transposed = (torch.rand(S, T, B, 1) < 0.5).permute(2, 3, 1, 0)
    out = kv_attention(query, key, value, S, mask=transposed)
    assert torch.equal(out, kv_attention(query, key, value, S, mask=transposed.contiguous()))


def test_a_row_that_sees_nothing_gives_zeros(isa: str) -> None:
    key, value = (filled(kind, NVFP4, torch.randn(2, 1, 600, 32)) for kind in ("key", "value"))
    query, mask = torch.randn(2, 2, 1, 32), torch.ones(2, 1, 1, 600, dtype=torch.bool)
    mask[1] = False
    for given in (mask, torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)):
        out = kv_attention(query, key, value, 600, mask=given)
        assert torch.equal(out[1], torch.zeros(2, 1, 32)) and out[0].abs().min() > 0
    assert torch.equal(kv_attention(query, key, value, 600, start=torch.tensor([600, 600])), torch.zeros(2, 2, 1, 32))
    assert torch.equal(kv_attention(query, key, value, 0), torch.zeros(2, 2, 1, 32))


def test_several_new_tokens_are_causal_or_not(isa: str) -> None:
    key, value = (filled(kind, NVFP4, torch.randn(1, 2, 70, 64)) for kind in ("key", "value"))
    query = torch.randn(1, 6, 5, 64)
    check(kv_attention(query, key, value, 70), *reference(query, key, value, 70, causal(1, 6, 5, 70)))
    everything = torch.ones(1, 6, 5, 70, dtype=torch.bool)
    out = kv_attention(query, key, value, 70, is_causal=False)
    check(out, *reference(query, key, value, 70, everything))


def one_by_one(query: Tensor, key: PackedStates, value: PackedStates, before: int, mask: Tensor | None) -> Tensor:
    """Attention of each of the new tokens in a step of its own, with 7 for NaN."""
    parts = []
    for t in range(query.shape[2]):
        end = before + t + 1
        own = None if mask is None else mask[:, :, t : t + 1, :end]
        parts.append(kv_attention(query[:, :, t : t + 1], key, value, end, mask=own))
    return torch.cat(parts, 2).nan_to_num(nan=7.0)


@pytest.mark.parametrize(("H", "G", "D"), [(1, 1, 32), (6, 2, 16), (8, 1, 48), (9, 3, 64)])
def test_a_prompt_gets_the_bits_of_its_tokens_one_by_one(
    isa: str, H: int, G: int, D: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isa == "torch":
        pytest.skip("torch's matrix products promise no such thing")
    monkeypatch.setattr(attention, "CODES_PER_THREAD", 1)
    B = 2
    for before, T in [(0, 9), (0, 61), (37, 30), (500, 40), (1030, 9)]:  # spans end at 512 and 1024
        S = before + T
        key, value = (filled(kind, NVFP4, torch.randn(B, G, S, D)) for kind in ("key", "value"))
        query = torch.randn(B, H, T, D)
        query[0, 0, T // 2, 3] = torch.nan  # shows in its row alone
        seen = (torch.rand(B, 1, T, S) < 0.8) & causal(B, 1, T, S)
        seen[1, :, :, : S // 2] = False  # padding

        for mask in (None, seen):
            expected = one_by_one(query, key, value, before, mask)
            for threads in (1, 3):
                torch.set_num_threads(threads)
                assert torch.equal(kv_attention(query, key, value, S, mask=mask).nan_to_num(nan=7.0), expected)
            torch.set_num_threads(1)


def test_a_prompt_under_masks(isa: str) -> None:
    B, H, G, T, D = 2, 6, 2, 29, 32
    for S in (29, 531):
        key, value = (filled(kind, NVFP4, torch.randn(B, G, S, D)) for kind in ("key", "value"))
        query = torch.randn(B, H, T, D)
        check(kv_attention(query, key, value, S), *reference(query, key, value, S, causal(B, H, T, S)))
        everything = torch.ones(B, H, T, S, dtype=torch.bool)
        out = kv_attention(query, key, value, S, is_causal=False)
        check(out, *reference(query, key, value, S, everything))
        seen = torch.arange(S) >= torch.tensor([3, 17])[:, None, None, None]  # padded on the left
        out = kv_attention(query, key, value, S, start=torch.tensor([3, 17]))
        check(out, *reference(query, key, value, S, causal(B, H, T, S) & seen))
        start = torch.tensor([S - 4, S])  # a whole span is padding; a row that sees nothing
        out = kv_attention(query, key, value, S, start=start)
        check(out, *reference(query, key, value, S, causal(B, H, T, S) & (torch.arange(S) >= start.view(B, 1, 1, 1))))
        transposed = (torch.rand(S, T, B, 1) < 0.5).permute(2, 3, 1, 0)
        out = kv_attention(query, key, value, S, mask=transposed)
        check(out, *reference(query, key, value, S, transposed.expand(B, H, T, S)))
        for shape in [(B, 1, T, S), (B, H, T, S), (1, 1, 1, S)]:
            # What each row sees ends anywhere, in the middle of a tile too; some rows see nothing.
            allowed = (torch.rand(shape) < 0.7) & (torch.arange(S) < torch.randint(0, S + 1, (*shape[:3], 1)))
            out = kv_attention(query, key, value, S, mask=allowed)
            check(out, *reference(query, key, value, S, allowed.expand(B, H, T, S)))
            assert not out[~allowed.expand(B, H, T, S).any(-1)].any()
            added = torch.randn(shape).masked_fill(~allowed, -torch.inf)
            out = kv_attention(query, key, value, S, mask=added)
            check(out, *reference(query, key, value, S, allowed.expand(B, H, T, S), added.masked_fill(~allowed, 0.0)))


def test_prompts_are_read_where_the_kernel_is_the_faster_way(isa: str) -> None:
    if isa == "torch":
        pytest.skip("the path without a library is a choice of the fixture here")
    assert NativeBackend().most_new_tokens == (8 if isa == "portable" else None)


def test_more_queries_than_tokens(isa: str) -> None:
    key, value = (filled(kind, NVFP4, torch.randn(1, 1, 7, 32)) for kind in ("key", "value"))
    query = torch.randn(1, 3, 20, 32)
    out = kv_attention(query, key, value, 7)
    check(out, *reference(query, key, value, 7, causal(1, 3, 20, 7)))
    assert not out[:, :, :13].any(), "the first have nothing to see"


def test_tokens_beyond_the_length_are_never_looked_at(isa: str) -> None:
    key, value = (filled(kind, NVFP4, torch.randn(1, 1, 37, 32)) for kind in ("key", "value"))
    query = torch.randn(1, 3, 1, 32)
    before = kv_attention(query, key, value, 21)
    junk = torch.full((1, 1, 16, 32), 1e20)
    for side in (key, value):
        side.append(junk, 21)
        side.scales.view(torch.uint8)[:, :, 1, :, 5:] = 0x7F
        assert side.global_scale is not None
        side.global_scale[:, :, 21:] = torch.nan
    assert torch.equal(kv_attention(query, key, value, 21), before)


def test_nan_in_a_query_shows_in_its_row_alone(isa: str) -> None:
    key, value = (filled(kind, NVFP4, torch.randn(1, 1, 530, 32)) for kind in ("key", "value"))
    query = torch.randn(1, 3, 1, 32)
    clean = kv_attention(query, key, value, 530)
    query[0, 1, 0, 7] = torch.nan
    out = kv_attention(query, key, value, 530)
    assert out[:, 1].isnan().all() and torch.equal(out[:, [0, 2]], clean[:, [0, 2]])


def test_queries_of_any_type_and_stride(isa: str) -> None:
    key, value = (filled(kind, NVFP4, torch.randn(2, 2, 20, 32)) for kind in ("key", "value"))
    query = torch.randn(2, 1, 4, 32).transpose(1, 2)
    expected = kv_attention(query.contiguous(), key, value, 20)
    assert torch.equal(kv_attention(query, key, value, 20), expected)
    assert torch.equal(kv_attention(query.double(), key, value, 20), expected)
    half = query.bfloat16()
    assert torch.equal(kv_attention(half, key, value, 20), kv_attention(half.float(), key, value, 20))


def test_neither_the_batch_nor_threads_change_a_row(isa: str) -> None:
    if isa == "torch":
        pytest.skip("torch's matrix products promise no such thing")
    key, value = (filled(kind, NVFP4, torch.randn(3, 2, 1500, 64)) for kind in ("key", "value"))
    query = torch.randn(3, 8, 1, 64)
    together = kv_attention(query, key, value, 1500)
    rows = torch.tensor([1])
    alone = kv_attention(query[1:2], key.select_rows(rows, 1500), value.select_rows(rows, 1500), 1500)
    assert torch.equal(together[1:2], alone)
    torch.set_num_threads(3)
    assert torch.equal(kv_attention(query, key, value, 1500), together)


def test_the_exponential_is_within_two_ulps(isa: str) -> None:
    lib = library()
    if isa == "torch" or lib is None:
        pytest.skip("the kernel's own")
    x = torch.cat([-torch.rand(1 << 15) * 87.3, -torch.logspace(-30, 0, 1 << 12), torch.zeros(16)])
    y = torch.empty_like(x)
    lib.reqat_kv_exp(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(len(x)))
    truth = x.double().exp()
    ulp = 2.0 ** (torch.frexp(truth).exponent - 24).double()
    assert ((y.double() - truth).abs() / ulp).max() <= 2
    x = torch.tensor([-87.5, -200.0, -1e30, -torch.inf, torch.nan, -0.0, 0.0, -87.33] + [-1.0] * 8)
    y = torch.empty_like(x)
    lib.reqat_kv_exp(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(len(x)))
    assert torch.equal(y[:4], torch.zeros(4)) and y[4].isnan() and torch.equal(y[5:7], torch.ones(2)) and y[7] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["static", "E1M2-row", "E2M1-dynamic", "4/6", "reciprocal", "MXFP4"])
def test_append_stores_what_quantize_gives(isa: str, name: str, dtype: torch.dtype) -> None:
    fmt = get_format("NVFP4", global_scale="static") if name == "static" else FORMATS[name]
    given = torch.tensor(431.7) if name == "static" else None
    for D in (32, 96) if isa == "torch" else (32, 64, 96, 128):
        for kind in ("key", "value"):
            packed = PackedStates.allocate(kind, fmt, 2, 3, 64, D, global_scale=given)  # type: ignore[arg-type]
            shift, parts, start = torch.randn(3, D), [], 0
            for T in (5, 1, 1, 20, 33):
                x = torch.randn(2, T, 3, D).mul_(torch.randn(2, T, 3, 1).exp()).to(dtype).transpose(1, 2)
                packed.append(x, start, shift=shift if kind == "key" else None)
                wide = x if dtype == torch.float64 else x.float()
                parts.append(quantize(wide - shift[:, None] if kind == "key" else wide, fmt, global_scale=given))
                start += T
            got = packed.quantized(start)
            assert torch.equal(got.codes, torch.cat([q.codes for q in parts], 2))
            assert torch.equal(got.scales.view(torch.uint8), torch.cat([q.scales.view(torch.uint8) for q in parts], 2))
            assert torch.equal(packed.dequantize(start), torch.cat([q.dequantize(torch.float32) for q in parts], 2))


def test_append_uses_threads_without_harm(isa: str) -> None:
    x = torch.randn(2, 3, 700, 48)  # three nibbles a lane and token: tokens of a tile share bytes
    packed = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        packed.append(filled("value", FORMATS["E2M1-dynamic"], x, chunks=2))
    assert torch.equal(packed[0].codes, packed[1].codes)
    assert torch.equal(packed[0].dequantize(700), packed[1].dequantize(700))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_are_refused(isa: str, bad: float) -> None:
    for fmt in FORMATS.values():
        packed = filled("value", fmt, torch.randn(1, 2, 10, 32))
        before = packed.dequantize(10)
        x = torch.randn(1, 2, 2, 32)
        x[0, 1, 1, 31] = bad
        with pytest.raises(ValueError, match="layer 3 values .* holds 1 (NaN|infinite)"):
            packed.append(x, 10, name="layer 3 values")
        assert torch.equal(packed.dequantize(10), before)


def test_copies_hold_the_same_tokens(isa: str) -> None:
    for fmt in FORMATS.values():
        packed = filled("key", fmt, torch.randn(3, 2, 21, 32))
        numbers = packed.dequantize(21)
        grown = packed.resized(100, 21)
        assert torch.equal(grown.dequantize(21), numbers) and grown.shape == (3, 2, 112, 32)
        chosen = packed.select_rows(torch.tensor([2, 0, 2]), 21)
        assert torch.equal(chosen.dequantize(21), numbers[[2, 0, 2]])


@pytest.mark.parametrize(
    ("scale", "heads", "least"), [("static", 3, 3.55), ("dynamic", 8, 3.5), ("row", 8, 3.2), ("none", 3, 3.76)]
)
def test_bytes_allocated(scale: str, heads: int, least: float) -> None:
    fmt = get_format("MXFP4") if scale == "none" else get_format("NVFP4", global_scale=scale)
    given = torch.tensor(1.0) if scale == "static" else None
    packed = PackedStates.allocate("key", fmt, 1, heads, 2048, 64, global_scale=given)
    assert torch.zeros(1, heads, 2048, 64, dtype=torch.bfloat16).nbytes / packed.nbytes >= least


def test_what_does_not_fit_is_an_error(isa: str) -> None:
    key, value = (filled(kind, NVFP4, torch.randn(2, 2, 13, 32)) for kind in ("key", "value"))
    query = torch.randn(2, 4, 1, 32)
    with pytest.raises(ValueError, match="17 tokens.*holds 16"):
        kv_attention(query, key, value, 17)
    with pytest.raises(ValueError, match="does not fit key codes"):
        kv_attention(torch.randn(2, 3, 1, 32), key, value, 13)
    with pytest.raises(ValueError, match="does not broadcast"):
        kv_attention(query, key, value, 13, mask=torch.ones(2, 1, 1, 12, dtype=torch.bool))
    with pytest.raises(ValueError, match="start.*one integer"):
        kv_attention(query, key, value, 13, start=torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="float dtype"):
        kv_attention(query.long(), key, value, 13)
    with pytest.raises(ValueError, match="16 tokens.*17"):
        key.append(torch.randn(2, 2, 1, 32), 16)
    with pytest.raises(ValueError, match="for a cache of"):
        key.append(torch.randn(2, 2, 1, 64), 13)
    with pytest.raises(ValueError, match="shift of shape"):
        key.append(torch.randn(2, 2, 1, 32), 13, shift=torch.zeros(32))
    with pytest.raises(ValueError, match="format is AMXFP4"):
        PackedStates.allocate("key", get_format("AMXFP4"), 1, 1, 16, 32)
    with pytest.raises(ValueError, match="not a multiple of 16"):
        PackedStates.allocate("key", NVFP4, 1, 1, 16, 40)
    with pytest.raises(ValueError, match="calibrated value"):
        PackedStates.allocate("key", get_format("NVFP4", global_scale="static"), 1, 1, 16, 32)


def test_empty_inputs(isa: str) -> None:
    key, value = (filled(kind, NVFP4, torch.randn(2, 2, 5, 32)) for kind in ("key", "value"))
    key.append(torch.randn(2, 2, 0, 32), 5)
    assert kv_attention(torch.randn(2, 4, 0, 32), key, value, 5).shape == (2, 4, 0, 32)
    nobody = [PackedStates.allocate(kind, NVFP4, 0, 2, 5, 32) for kind in ("key", "value")]  # type: ignore[arg-type]
    nobody[0].append(torch.randn(0, 2, 1, 32), 0)
    assert kv_attention(torch.randn(0, 4, 1, 32), *nobody, 5).shape == (0, 4, 1, 32)


def test_operators_have_a_schema_and_a_fake_that_hold() -> None:
    torch.manual_seed(0)  # MXFP4: opcheck cannot copy float8 scales
    fmt = get_format("MXFP4")
    key, value = (filled(kind, fmt, torch.randn(1, 2, 5, 32)) for kind in ("key", "value"))
    sides = [(side.codes, side.scales, None, "E2M1") for side in (key, value)]
    args = (torch.randn(1, 4, 1, 32), *sides[0], *sides[1], 5, 0.2, None, None, True)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.reqat.kv_attention.default, args, test_utils=checks)
    states = (torch.randn(1, 2, 1, 32), None, key.codes, key.scales, None, 5, False, format_key(fmt))
    torch.library.opcheck(torch.ops.reqat.kv_append.default, states, test_utils=checks)
