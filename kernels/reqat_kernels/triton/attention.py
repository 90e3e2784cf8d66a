"""Decode attention that reads its keys and values as four-bit codes and never writes them out in a wider type.

Decoding is a question of bytes: each new token reads the whole cache once, so a cache of 4.5 bits an element takes a
quarter of the time of a bf16 one, as long as the numbers are unpacked in registers. Four ideas:

- *A scaled code is exact in bf16.* A code has three significant bits at most, an E4M3 scale four: the product fits
  bf16's eight. So the tensor cores get exact operands, and only the float32 global scale, which would not fit, is taken
  out: logits are divided by the keys' g and probabilities by the values' g, one number a token.
- *Halves instead of shuffles.* A byte holds elements 2i and 2i + 1. Interleaving them costs register shuffles; taking
  the sum over even and odd channels as two products, with the query split the same way, costs nothing.
- *One program a KV head.* The query heads that share a KV head (GQA) are rows of one tile, so the cache is read and
  unpacked once for all of them. Rows are padded to 16, the least that a tensor core takes.
- *Split over the sequence* (flash decoding): with few heads and a long cache, ``splits`` programs share a KV head; each
  keeps a running maximum, sum and weighted values, and a second kernel merges them. Each row splits its own length.

The Q-FIT shift needs nothing here: stored keys are K - m, which moves all logits of a query equally, and softmax does
not see that; the append kernel subtracts m.

Trade-off: the queries of float32 are multiplied in true float32, off the tensor cores; float16 ones as tf32, which
holds them exactly and has the exponent range that E8M0 scales ask for.

Sources: online softmax, arXiv:1805.02867; FlashAttention, arXiv:2205.14135; ReQAT's cache format and Q-FIT.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from reqat_kernels.native import check
from reqat_kernels.triton.attention_check import check_arguments, expanded_mask
from reqat_kernels.triton.elements import as_float32, bits_float, cast, decode_e4m3, decode_e8m0, spread
from reqat_kernels.triton.kv_side import KVSide
from reqat_kernels.triton.launches import launch
from reqat_kernels.triton.runtime import INTERPRETED, capability, require, tl, triton

#: An additive mask hides a key where it is this or less, so that both -inf and the lowest float of any wide type do.
HIDDEN = -1e30
#: Rows a tile at most.
MAX_BLOCK_M = 32
_LOG2_E = 1.4426950408889634
_MAX_SPLITS = 128

# --- kernels ----------------------------------------------------------------------------------------------------------
# M: rows, the n query heads of a KV head times T tokens. S: keys. C: half of head_dim, D/2, padded to a power of two.


@triton.jit
def _signed_values(packed, SHIFT: tl.constexpr, E1M2: tl.constexpr):
    """Float32 values of the nibbles of ``packed`` (int32) that begin at bit SHIFT, times 2^-126 (E1M2: 2^-127).

    A code is a tiny float: with its sign at float32's sign and its exponent at the low end of float32's exponent, it is
    one, subnormal where the code is. Two shifts and two logical operations; a multiplication puts the range right.
    """
    sign = (packed << (28 - SHIFT)) & -0x80000000
    if E1M2:
        return bits_float(sign | ((packed << (21 - SHIFT)) & 0x00E00000))
    else:
        return bits_float(sign | ((packed << (22 - SHIFT)) & 0x01C00000))


@triton.jit
def _load_halves(
    codes,  # pointer to the first row's codes
    scales,
    offset_S,  # int64 rows
    stride_code,
    stride_scale,
    visible_S,
    E1M2: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF_DIM: tl.constexpr,
    C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Even and odd channels of a tile of rows, float32 [BLOCK_S, C] each; zeros if hidden.

    Code times block scale; in NVFP4 times 2^-8 (E1M2: 2^-9), which the caller undoes together with the global scale.
    """
    RANGE: tl.constexpr = 2.0**127 if E1M2 else 2.0**126
    c = tl.arange(0, C)
    BLOCKS: tl.constexpr = C * 2 // BLOCK
    b = tl.arange(0, BLOCKS)
    code_mask = visible_S[:, None] & (c < HALF_DIM)[None, :]
    scale_mask = visible_S[:, None] & (b < HALF_DIM * 2 // BLOCK)[None, :]
    packed = tl.load(codes + offset_S[:, None] * stride_code + c[None, :], mask=code_mask, other=0).to(tl.int32)
    bits = tl.load(scales + offset_S[:, None] * stride_scale + b[None, :], mask=scale_mask, other=0)
    even, odd = _signed_values(packed, 0, E1M2), _signed_values(packed, 4, E1M2)
    if SCALE == "E4M3":
        scale = decode_e4m3(bits) * 3.32306998946229e35  # 2^118: as far as 448 may go
    else:  # scales that may be as large as float32 itself: bring the codes to their own size first
        scale = decode_e8m0(bits)
        even, odd = even * RANGE, odd * RANGE
    scale = spread(scale, BLOCK_S, BLOCKS, BLOCK // 2)
    return even * scale, odd * scale


@triton.jit
def decode_attention_kernel(
    query,
    out,  # [B, H, T, D] contiguous: the answer where there is one split
    partial,  # float32 [splits, B*H*T, D]: weighted values of each split
    partial_stats,  # float32 [2, splits, B*H*T]: maximum (base-2 logits) and sum
    key_codes,
    key_scales,
    key_global,
    value_codes,
    value_scales,
    value_global,
    mask,
    lengths,
    query_b,
    query_h,
    query_t,
    key_codes_b,
    key_codes_g,
    key_codes_s,
    key_scales_b,
    key_scales_g,
    key_scales_s,
    key_global_b,
    key_global_g,
    key_global_s,
    value_codes_b,
    value_codes_g,
    value_codes_s,
    value_scales_b,
    value_scales_g,
    value_scales_s,
    value_global_b,
    value_global_g,
    value_global_s,
    mask_b,
    mask_h,
    mask_t,
    mask_s,
    length,  # keys in use; where there are lengths a row, the most
    heads,
    tokens,
    kv_heads,
    scale_log2,  # softmax scale times log2(e)
    GROUP: tl.constexpr,  # query heads a KV head
    HALF_DIM: tl.constexpr,
    C: tl.constexpr,
    KEY_E1M2: tl.constexpr,
    KEY_SCALE: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_E1M2: tl.constexpr,
    VALUE_SCALE: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    MASK: tl.constexpr,  # "none", "bool", "add"
    HAS_LENGTHS: tl.constexpr,
    CAUSAL: tl.constexpr,
    DIRECT: tl.constexpr,  # one split: write the answer itself
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    COMPUTE: tl.constexpr,  # type of the products' operands
    PRECISION: tl.constexpr,  # of float32 products
):
    """One split of one KV head's rows: grid (splits, B * G, row tiles)."""
    KEY_UNDO: tl.constexpr = 512.0 if KEY_E1M2 else 256.0  # see _load_halves
    VALUE_UNDO: tl.constexpr = 512.0 if VALUE_E1M2 else 256.0
    split = tl.program_id(0)
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    group = (tl.program_id(1) % kv_heads).to(tl.int64)

    row_M = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_is_real = row_M < GROUP * tokens
    token_M = row_M // GROUP
    head_M = (group * GROUP + row_M % GROUP).to(tl.int64)
    c = tl.arange(0, C)
    channel_is_real = c < HALF_DIM
    row_mask = row_is_real[:, None] & channel_is_real[None, :]
    query_M = query + batch * query_b + head_M * query_h + token_M.to(tl.int64) * query_t
    query_even = tl.load(query_M[:, None] + 2 * c[None, :], mask=row_mask, other=0.0)
    query_odd = tl.load(query_M[:, None] + 2 * c[None, :] + 1, mask=row_mask, other=0.0)
    query_even, query_odd = as_float32(query_even).to(COMPUTE), as_float32(query_odd).to(COMPUTE)

    if HAS_LENGTHS:
        length = tl.minimum(tl.load(lengths + batch), length).to(tl.int32)  # never beyond the cache
    # Each split takes as many whole tiles as the row's own length asks for; the last ones may be left without any.
    tiles = tl.cdiv(tl.cdiv(length, BLOCK_S), tl.num_programs(0))
    first = split * tiles * BLOCK_S
    last = tl.minimum(first + tiles * BLOCK_S, length)

    key_codes += batch * key_codes_b + group * key_codes_g
    key_scales += batch * key_scales_b + group * key_scales_g
    key_global += batch * key_global_b + group * key_global_g
    value_codes += batch * value_codes_b + group * value_codes_g
    value_scales += batch * value_scales_b + group * value_scales_g
    value_global += batch * value_global_b + group * value_global_g

    maximum_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    even = tl.zeros([BLOCK_M, C], tl.float32)
    odd = tl.zeros([BLOCK_M, C], tl.float32)
    for start in range(first, last, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        offset_S = s.to(tl.int64)
        in_use = s < last
        key_even, key_odd = _load_halves(
            key_codes,
            key_scales,
            offset_S,
            key_codes_s,
            key_scales_s,
            in_use,
            KEY_E1M2,
            KEY_SCALE,
            KEY_BLOCK,
            HALF_DIM,
            C,
            BLOCK_S,
        )
        logits = tl.dot(query_even, tl.trans(key_even.to(COMPUTE)), input_precision=PRECISION)
        logits = tl.dot(query_odd, tl.trans(key_odd.to(COMPUTE)), logits, input_precision=PRECISION)
        if KEY_SCALE == "E4M3":
            key_inverse_S = KEY_UNDO / tl.load(key_global + offset_S * key_global_s, mask=in_use, other=1.0)
            logits = logits * (key_inverse_S * scale_log2)[None, :]
        else:
            logits = logits * scale_log2

        visible = in_use[None, :] & row_is_real[:, None]
        if CAUSAL:  # the last token sees all keys in use
            visible = visible & (s[None, :] <= (length - tokens + token_M)[:, None])
        if MASK != "none":
            mask_M = mask + batch * mask_b + head_M * mask_h + token_M.to(tl.int64) * mask_t
            pointer = mask_M[:, None] + offset_S[None, :] * mask_s
            if MASK == "bool":
                visible = visible & (tl.load(pointer, mask=visible, other=0) != 0)
            else:
                bias = as_float32(tl.load(pointer, mask=visible, other=0.0))
                visible = visible & (bias > -1e30)
                logits += tl.where(visible, bias, 0.0) * 1.4426950408889634
        logits = tl.where(visible, logits, float("-inf"))

        new_maximum_M = tl.maximum(maximum_M, tl.max(logits, 1))
        # Where nothing was visible so far the maximum is -inf, and -inf - -inf would be NaN.
        reference_M = tl.where(new_maximum_M == float("-inf"), 0.0, new_maximum_M)
        weights = tl.exp2(logits - reference_M[:, None])
        decay_M = tl.exp2(maximum_M - reference_M)
        sum_M = sum_M * decay_M + tl.sum(weights, 1)
        maximum_M = new_maximum_M

        if VALUE_SCALE == "E4M3":
            value_inverse_S = VALUE_UNDO / tl.load(value_global + offset_S * value_global_s, mask=in_use, other=1.0)
            weights = weights * value_inverse_S[None, :]
        value_even, value_odd = _load_halves(
            value_codes,
            value_scales,
            offset_S,
            value_codes_s,
            value_scales_s,
            in_use,
            VALUE_E1M2,
            VALUE_SCALE,
            VALUE_BLOCK,
            HALF_DIM,
            C,
            BLOCK_S,
        )
        weights = weights.to(COMPUTE)
        even = tl.dot(weights, value_even.to(COMPUTE), even * decay_M[:, None], input_precision=PRECISION)
        odd = tl.dot(weights, value_odd.to(COMPUTE), odd * decay_M[:, None], input_precision=PRECISION)

    flat_M = (batch * heads + head_M) * tokens + token_M
    if DIRECT:
        # Where a row saw no key its sum is 0, and so are its weighted values.
        inverse = (1.0 / tl.where(sum_M > 0, sum_M, 1.0))[:, None]
        target = out + flat_M[:, None] * (2 * HALF_DIM) + 2 * c[None, :]
        tl.store(target, cast(even * inverse, out.dtype.element_ty), mask=row_mask)
        tl.store(target + 1, cast(odd * inverse, out.dtype.element_ty), mask=row_mask)
    else:
        rows = (tl.num_programs(1) // kv_heads).to(tl.int64) * heads * tokens
        target = partial + (split * rows + flat_M)[:, None] * (2 * HALF_DIM) + 2 * c[None, :]
        tl.store(target, even, mask=row_mask)
        tl.store(target + 1, odd, mask=row_mask)
        tl.store(partial_stats + split * rows + flat_M, maximum_M, mask=row_is_real)
        tl.store(partial_stats + (tl.num_programs(0) + split) * rows + flat_M, sum_M, mask=row_is_real)


@triton.jit
def merge_splits_kernel(
    out,  # [rows, D]
    partial,  # float32 [splits, rows, D]
    partial_stats,  # float32 [2, splits, rows]
    splits,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,  # HEAD_DIM padded to a power of two
    SPLITS: tl.constexpr,  # splits padded to a power of two
    CHUNK: tl.constexpr,
):
    """Put the splits of a row together: grid (rows)."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    d = tl.arange(0, D)
    every = tl.arange(0, SPLITS)
    maxima = tl.load(partial_stats + every * rows + row, mask=every < splits, other=float("-inf"))
    maximum = tl.max(maxima, 0)
    maximum = tl.where(maximum == float("-inf"), 0.0, maximum)
    sums = tl.load(partial_stats + (splits + every) * rows + row, mask=every < splits, other=0.0)
    total = tl.sum(sums * tl.exp2(maxima - maximum), 0)
    answer = tl.zeros([D], tl.float32)
    for start in range(0, splits, CHUNK):
        k = start + tl.arange(0, CHUNK)
        weights = tl.exp2(tl.load(partial_stats + k * rows + row, mask=k < splits, other=float("-inf")) - maximum)
        pointer = partial + (k * rows + row)[:, None] * HEAD_DIM + d[None, :]
        values = tl.load(pointer, mask=(k < splits)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        answer += tl.sum(values * weights[:, None], 0)
    answer = answer / tl.where(total > 0, total, 1.0)
    tl.store(out + row * HEAD_DIM + d, cast(answer, out.dtype.element_ty), mask=d < HEAD_DIM)


# --- launching --------------------------------------------------------------------------------------------------------


def decode_attention(
    query: Tensor,
    key: KVSide,
    value: KVSide,
    *,
    length: int | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    splits: int | None = None,
    trusted: bool = False,
) -> Tensor:
    """Attention of ``query`` [B, H, T, D] (bf16, fp16 or fp32) over a packed cache; returns its shape and type.

    ``softmax(q . k * scale + mask) v`` with k, v as the cache's codes stand for, H a multiple of the cache's G.

    Args:
        length: keys in use, the same for every row of the batch; by default the capacity.
        lengths: integers [B] in place of it, each at most the capacity (not checked on a GPU, where it would wait for
            the device, nor if ``trusted``; a greater one counts as the capacity then).
        mask: boolean (True: visible) or floating (added to the logits; -1e30 or less hides), [B, S] or broadcastable to
            [B, H, T, S], where S is at least ``length``.
        causal: token t of T sees the keys before ``length - T + t + 1``. Nothing changes for T = 1.
        scale: softmax scale, by default ``D ** -0.5``.
        splits: programs that share a KV head's cache; by default chosen to fill the device.
        trusted: the numbers of ``lengths`` are known to fit; look at none of them, wherever they lie.

    A query that sees no key gives zeros. Raises ValueError for shapes, types, devices or lengths that do not fit.
    """
    for side in (key, value):
        if not isinstance(side, KVSide):
            raise TypeError(f"keys and values are KVSide, as KVSide.allocate makes them, not {type(side).__name__}")
    require(query, key.codes, value.codes, mask, lengths)
    check_arguments(query, key, value, mask, length, lengths, looks=not trusted)
    if splits is not None and not 1 <= check.integer("splits", splits) <= _MAX_SPLITS:
        raise ValueError(f"splits must be 1 to {_MAX_SPLITS}, got {splits}")
    if scale is not None:
        check.finite("scale", scale)
    B, H, T, D = query.shape
    G, capacity = key.codes.shape[1:3]
    if query.numel() == 0:
        return torch.empty_like(query)
    if query.stride(-1) != 1:
        query = query.contiguous()
    longest = capacity if length is None else length
    rows = H // G * T
    block_m = max(16, min(MAX_BLOCK_M, triton.next_power_of_2(rows)))
    # Products off the tensor cores hold more in registers. The interpreter pays by operation, whatever its size.
    tile = launch("attention float32" if query.dtype == torch.float32 else "attention", capability(query))
    block_s = tile["BLOCK_S"] = 64 if INTERPRETED else tile["BLOCK_S"]
    row_tiles = triton.cdiv(rows, block_m)
    if splits is None:
        splits = _splits(B * G * row_tiles, triton.cdiv(longest, block_s), query.device)

    # The interpreter multiplies bf16 as if it were integers: float32 there.
    half = query.dtype == torch.bfloat16 and not INTERPRETED
    out = torch.empty(B, H, T, D, device=query.device, dtype=query.dtype)
    direct = splits == 1
    partial = out if direct else torch.empty(splits, B * H * T, D, dtype=torch.float32, device=query.device)
    stats = out if direct else torch.empty(2, splits, B * H * T, dtype=torch.float32, device=query.device)
    key_global, value_global = key.global_scale_BGS(), value.global_scale_BGS()
    mask_BHTS = expanded_mask(mask, B, H, T)
    mask_kind = "none" if mask is None else "bool" if mask.dtype == torch.bool else "add"
    if mask_BHTS is None:
        mask_BHTS = stats.reshape(1, 1, 1, -1)  # not read
    elif mask_kind == "bool":
        mask_BHTS = mask_BHTS.view(torch.uint8)
    half_dim = D // 2
    c = max(16, triton.next_power_of_2(half_dim))
    decode_attention_kernel[(splits, B * G, row_tiles)](
        query,
        out,
        partial,
        stats,
        key.codes,
        key.scales,
        key_global,
        value.codes,
        value.scales,
        value_global,
        mask_BHTS,
        stats if lengths is None else lengths,
        *query.stride()[:3],
        *key.codes.stride()[:3],
        *key.scales.stride()[:3],
        *key_global.stride(),
        *value.codes.stride()[:3],
        *value.scales.stride()[:3],
        *value_global.stride(),
        *mask_BHTS.stride(),
        longest,
        H,
        T,
        G,
        (D**-0.5 if scale is None else scale) * _LOG2_E,
        GROUP=H // G,
        HALF_DIM=half_dim,
        C=c,
        KEY_E1M2=key.format.element == "E1M2",
        KEY_SCALE=key.format.scale,
        KEY_BLOCK=key.format.block,
        VALUE_E1M2=value.format.element == "E1M2",
        VALUE_SCALE=value.format.scale,
        VALUE_BLOCK=value.format.block,
        MASK=mask_kind,
        HAS_LENGTHS=lengths is not None,
        CAUSAL=causal and T > 1,
        DIRECT=direct,
        BLOCK_M=block_m,
        COMPUTE=tl.bfloat16 if half else tl.float32,
        PRECISION="tf32" if query.dtype == torch.float16 else "ieee",
        **tile,
        enable_fp_fusion=True,
    )
    if not direct:
        merge_splits_kernel[(B * H * T,)](
            out,
            partial,
            stats,
            splits,
            HEAD_DIM=D,
            D=triton.next_power_of_2(D),
            SPLITS=triton.next_power_of_2(splits),
            CHUNK=min(16, triton.next_power_of_2(splits)),
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out


def _splits(programs: int, tiles: int, device: torch.device) -> int:
    """Enough programs for two on each multiprocessor, no split of less than one tile."""
    return max(1, min(tiles, triton.cdiv(2 * _multiprocessors(device), programs), _MAX_SPLITS))


@lru_cache(maxsize=32)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
