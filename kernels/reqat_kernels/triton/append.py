"""Append new tokens to a packed cache: rotate (optional), subtract the Q-FIT shift, quantize, pack, store. One launch.

Everything a token needs lies in one row of head_dim numbers, so a program takes a few rows, keeps them in registers
and reads and writes each byte once; keys and values are two halves of the same grid. The codes and scales are those of
``reqat.quantize(K - m)`` bit for bit, which is what makes a cached decode equal to the fake-quantized model:

- float32 arithmetic in the reference's order, IEEE division, no fused multiply-add (``enable_fp_fusion=False``);
- the rotation, if it is done here, rounds after each operation to the type in which transformers would have computed.

The global scale of NVFP4 is the cache's own: calibrated (``static``: a number, or one a token, read at the token's
place), or ``row``: computed here from the row's maximum and stored beside the codes. ``dynamic``, one for the whole
tensor, cannot be: a token's codes would depend on tokens that are not there yet.

Sources: the reference is :mod:`reqat.formats`; RoPE in the half-rotation convention of Llama, arXiv:2104.09864.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reqat.formats import Format
from reqat_kernels.native import check
from reqat_kernels.triton.elements import (
    as_float32,
    block_maxima,
    cast,
    decode_e4m3,
    decode_e8m0,
    divide_by_scale,
    encode_e8m0,
    encode_element,
    float_bits,
    nvfp4_global_scale,
    nvfp4_scale_bits,
    pack_pairs,
    spread,
)
from reqat_kernels.triton.finite import FiniteFlag, raise_flag, refusal, refuse
from reqat_kernels.triton.kv_side import KVSide, check_pair, check_rows
from reqat_kernels.triton.launches import launch
from reqat_kernels.triton.runtime import capability, require, tl, triton

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_TL_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}

# --- kernels ----------------------------------------------------------------------------------------------------------
# R: rows, one token of one KV head each. D: head_dim padded to a power of two, by whole blocks of zeros.


@triton.jit
def _quantize_rows(
    x_RD,  # float32
    is_real_R,
    codes_R,  # pointers to where the rows begin
    scales_R,
    global_R,
    flag,
    call,
    E1M2: tl.constexpr,
    SCALE: tl.constexpr,
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    BLOCKS: tl.constexpr = D // BLOCK
    amax = block_maxima(x_RD, ROWS, BLOCKS, BLOCK)
    raise_flag(flag, float_bits(amax), call)
    if SCALE == "E4M3":
        if ROW_SCALE:
            g_R = nvfp4_global_scale(tl.max(amax, axis=1), E1M2, RULE)
            tl.store(global_R, g_R, mask=is_real_R)
        else:
            g_R = tl.load(global_R, mask=is_real_R, other=1.0)
        bits = nvfp4_scale_bits(amax, g_R[:, None], E1M2, RULE)
        y_RD = divide_by_scale(x_RD, spread(decode_e4m3(bits), ROWS, BLOCKS, BLOCK), g_R[:, None], RULE)
    else:
        bits = encode_e8m0(amax, RULE, E1M2)
        y_RD = tl.div_rn(x_RD, spread(decode_e8m0(bits), ROWS, BLOCKS, BLOCK))
    packed = pack_pairs(encode_element(y_RD, E1M2), ROWS, D // 2)
    c = tl.arange(0, D // 2)
    b = tl.arange(0, BLOCKS)
    tl.store(codes_R[:, None] + c[None, :], packed, mask=is_real_R[:, None] & (c < HEAD_DIM // 2)[None, :])
    scale_mask = is_real_R[:, None] & (b < HEAD_DIM // BLOCK)[None, :]
    tl.store(scales_R[:, None] + b[None, :], bits.to(tl.uint8), mask=scale_mask)


@triton.jit(do_not_specialize=["key_call", "value_call", "room_call"])
def append_kernel(
    key,
    value,
    cos,
    sin,
    shift,  # [G, D] contiguous
    offsets,
    flag,  # int32 [1]: takes a call's number if its numbers are not finite, or its tokens have no place (see finite.py)
    key_codes,
    key_scales,
    key_global,
    value_codes,
    value_scales,
    value_global,
    key_b,
    key_g,
    key_t,
    value_b,
    value_g,
    value_t,
    cos_b,
    cos_t,
    sin_b,
    sin_t,
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
    offset,  # where the first token goes, if there are no offsets a row of the batch
    capacity,
    tokens,
    kv_heads,
    rows,  # B * G * T
    key_call,
    value_call,
    room_call,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    ROTATE: tl.constexpr,  # the type of the rotation's arithmetic, or None
    KEY_E1M2: tl.constexpr,
    KEY_SCALE: tl.constexpr,
    KEY_RULE: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    KEY_ROW_SCALE: tl.constexpr,
    VALUE_E1M2: tl.constexpr,
    VALUE_SCALE: tl.constexpr,
    VALUE_RULE: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    VALUE_ROW_SCALE: tl.constexpr,
):
    """Grid (row tiles, 2): keys, then values."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = (r % tokens).to(tl.int64)
    g = (r // tokens % kv_heads).to(tl.int64)
    b = (r // tokens // kv_heads).to(tl.int64)
    is_real = r < rows
    s = t + offset
    if HAS_OFFSETS:
        s += tl.load(offsets + b, mask=is_real, other=0).to(tl.int64)
    # Offsets on a GPU were not looked at by the host: a token without a place is dropped, not written elsewhere.
    fits = is_real & (s >= 0) & (s < capacity)
    if tl.max((is_real & (fits == 0)).to(tl.int32), axis=0) > 0:
        tl.atomic_cas(flag, 0, room_call)
    d = tl.arange(0, D)
    mask = is_real[:, None] & (d < HEAD_DIM)[None, :]
    if tl.program_id(1) == 0:
        key_R = key + b * key_b + g * key_g + t * key_t
        x = as_float32(tl.load(key_R[:, None] + d[None, :], mask=mask, other=0.0))
        if ROTATE is not None:
            HALF: tl.constexpr = HEAD_DIM // 2
            partner = tl.where(d < HALF, d + HALF, d - HALF)
            y = as_float32(tl.load(key_R[:, None] + partner[None, :], mask=mask, other=0.0))
            y = tl.where((d < HALF)[None, :], -y, y)
            c = as_float32(tl.load(cos + (b * cos_b + t * cos_t)[:, None] + d[None, :], mask=mask, other=0.0))
            n = as_float32(tl.load(sin + (b * sin_b + t * sin_t)[:, None] + d[None, :], mask=mask, other=0.0))
            # Each operation rounds to that type, as it does where they are operations of their own.
            x = as_float32(cast(as_float32(cast(x * c, ROTATE)) + as_float32(cast(y * n, ROTATE)), ROTATE))
        if HAS_SHIFT:
            x -= tl.load(shift + g[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0)
        _quantize_rows(
            x,
            fits,
            key_codes + b * key_codes_b + g * key_codes_g + s * key_codes_s,
            key_scales + b * key_scales_b + g * key_scales_g + s * key_scales_s,
            key_global + b * key_global_b + g * key_global_g + s * key_global_s,
            flag,
            key_call,
            KEY_E1M2,
            KEY_SCALE,
            KEY_RULE,
            KEY_BLOCK,
            KEY_ROW_SCALE,
            HEAD_DIM,
            D,
            ROWS,
        )
    else:
        value_R = value + b * value_b + g * value_g + t * value_t
        _quantize_rows(
            as_float32(tl.load(value_R[:, None] + d[None, :], mask=mask, other=0.0)),
            fits,
            value_codes + b * value_codes_b + g * value_codes_g + s * value_codes_s,
            value_scales + b * value_scales_b + g * value_scales_g + s * value_scales_s,
            value_global + b * value_global_b + g * value_global_g + s * value_global_s,
            flag,
            value_call,
            VALUE_E1M2,
            VALUE_SCALE,
            VALUE_RULE,
            VALUE_BLOCK,
            VALUE_ROW_SCALE,
            HEAD_DIM,
            D,
            ROWS,
        )


# --- launching --------------------------------------------------------------------------------------------------------


def writes(fmt: Format) -> bool:
    """Whether :func:`append` quantizes to this format; others are quantized in PyTorch (``KVSide.store``)."""
    return fmt.name in ("NVFP4", "MXFP4") and fmt.rounding == "even" and fmt.global_scale != "dynamic"


def append(
    key: Tensor,
    value: Tensor,
    key_cache: KVSide,
    value_cache: KVSide,
    offset: int | Tensor,
    *,
    shift_GD: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    names: tuple[str | None, str | None] = (None, None),
    flag: FiniteFlag | None = None,
) -> None:
    """Write T tokens, ``key`` and ``value`` [B, G, T, D] (bf16, fp16, fp32), into the cache from place ``offset`` on.

    Codes, scales and rows' global scales are bit for bit those of ``reqat.quantize(key.float() - shift, ...)`` and
    ``reqat.quantize(value.float(), ...)``.

    Args:
        key: after RoPE; or before it, with ``cos`` and ``sin``.
        offset: place of the first token; or integers [B], one a row of the batch. Those on a GPU, or given with a flag,
            are not looked at beforehand: tokens that find no place are dropped, the others written, and it is an error.
        shift_GD: the Q-FIT shift m, float32 [G, D], subtracted from the rotated keys.
        cos, sin: [B or 1, T, D]: rotate ``key * cos + rotate_half(key) * sin``, with torch's rounding in the type that
            torch would compute in (``key``'s, or float32 if they are).
        names: what to call key and value in an error.
        flag: takes note of NaN and infinity, for the caller to look at; until then such tokens have garbage for codes.
            None: look before anything is written, for which the host waits.

    Raises NotFinite for NaN or infinity, ValueError for tokens beyond the capacity and for shapes, types, devices or
    formats that do not fit; nothing is written then.
    """
    for side in (key_cache, value_cache):
        if not isinstance(side, KVSide):
            raise TypeError(f"the caches are KVSide, as KVSide.allocate makes them, not {type(side).__name__}")
    offsets = offset if isinstance(offset, Tensor) else None
    require(key, value, key_cache.codes, value_cache.codes, shift_GD, cos, sin, offsets)
    _check(key, value, key_cache, value_cache, offset, shift_GD, cos, sin, looks=flag is None)
    key_name, value_name = names[0] or "key", names[1] or "value"
    if flag is None:
        refuse(key_name, key)
        refuse(value_name, value)
    if key.numel() == 0:
        return
    noted = FiniteFlag(key.device) if flag is None else flag
    calls = (
        noted.number(refusal(key_name, key.shape)),
        noted.number(refusal(value_name, value.shape)),
        noted.number(
            f"{key_name}: {key.shape[2]} tokens a row do not fit the cache's capacity of {key_cache.shape[2]}: "
            "allocate a larger one",
            ValueError,
        ),
    )
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    B, G, T, D = key.shape
    rotate = None
    if cos is not None and sin is not None:
        rotate = _TL_DTYPES[torch.promote_types(key.dtype, cos.dtype)]
        cos, sin = (x.expand(B, T, D) if x.stride(-1) == 1 else x.expand(B, T, D).contiguous() for x in (cos, sin))
    cos_strides = (0, 0) if cos is None else cos.stride()[:2]
    sin_strides = (0, 0) if sin is None else sin.stride()[:2]
    key_global, value_global = key_cache.global_scale_BGS(), value_cache.global_scale_BGS()
    rows = B * G * T
    padded = max(32, triton.next_power_of_2(D))
    chosen = launch("append", capability(key))
    tile = min(triton.next_power_of_2(rows), max(1, chosen["elements"] // padded))
    append_kernel[(triton.cdiv(rows, tile), 2)](
        key,
        value,
        key if cos is None else cos,
        key if sin is None else sin,
        key if shift_GD is None else shift_GD.contiguous(),
        key if offsets is None else offsets,
        noted.found,
        key_cache.codes,
        key_cache.scales,
        key_global,
        value_cache.codes,
        value_cache.scales,
        value_global,
        *key.stride()[:3],
        *value.stride()[:3],
        *cos_strides,
        *sin_strides,
        *key_cache.codes.stride()[:3],
        *key_cache.scales.stride()[:3],
        *key_global.stride(),
        *value_cache.codes.stride()[:3],
        *value_cache.scales.stride()[:3],
        *value_global.stride(),
        0 if offsets is not None else offset,
        key_cache.codes.shape[2],
        T,
        G,
        rows,
        *calls,
        HEAD_DIM=D,
        D=padded,
        ROWS=tile,
        HAS_OFFSETS=offsets is not None,
        HAS_SHIFT=shift_GD is not None,
        ROTATE=rotate,
        **_constants("KEY", key_cache),
        **_constants("VALUE", value_cache),
        num_warps=chosen["num_warps"],
        enable_fp_fusion=False,
    )
    if flag is None:
        noted.check()  # of numbers that became infinite on the way, by the rotation or the shift


def _constants(side: str, cache: KVSide) -> dict[str, object]:
    fmt = cache.format
    return {
        f"{side}_E1M2": fmt.element == "E1M2",
        f"{side}_SCALE": fmt.scale,
        f"{side}_RULE": fmt.scale_rule,
        f"{side}_BLOCK": fmt.block,
        f"{side}_ROW_SCALE": fmt.global_scale == "row",
    }


def _check(
    key: Tensor,
    value: Tensor,
    key_cache: KVSide,
    value_cache: KVSide,
    offset: int | Tensor,
    shift_GD: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    looks: bool,
) -> None:
    """Raise ValueError for arguments of append that do not fit together; ``looks``: at offsets on a CPU, too."""
    for name, x, cache in (("key", key, key_cache), ("value", value, value_cache)):
        batch, G, capacity, _ = cache.shape
        if x.ndim != 4 or x.dtype not in _DTYPES:
            raise ValueError(f"{name} must be [B, G, T, D] in bf16, fp16 or fp32, got {x.dtype} {tuple(x.shape)}")
        check_rows(name, x.shape, cache)
        fmt = cache.format
        if not writes(fmt):
            raise ValueError(
                f"append writes NVFP4 (global_scale row or static) and MXFP4, rounding even; the {name} cache's format "
                f"is {fmt!r}: make the cache with KVSide.allocate, or quantize in PyTorch and call KVSide.store"
            )
        g = cache.global_scale
        if fmt.global_scale == "row" and (g is None or tuple(g.shape) != (batch, G, capacity) or 0 in g.stride()):
            shape = None if g is None else tuple(g.shape)
            raise ValueError(f"a cache of one global scale a row stores them as [B, G, S], here {shape}")
        if isinstance(offset, Tensor):
            if tuple(offset.shape) != (batch,) or offset.dtype not in (torch.int32, torch.int64):
                raise ValueError(f"offsets must be int32 or int64 [{batch}], got {offset.dtype} {tuple(offset.shape)}")
            if offset.device != x.device or not offset.is_contiguous():
                raise ValueError(f"offsets must be contiguous on {x.device}")
            places = offset.tolist() if looks and offset.device.type == "cpu" else [0]
        else:
            places = [check.integer("offset", offset)]
        if any(place < 0 or place + x.shape[2] > capacity for place in places):
            raise ValueError(
                f"{x.shape[2]} tokens at {places if len(places) > 1 else places[0]} do not fit the cache's capacity of "
                f"{capacity}: allocate a larger one"
            )
    check_pair(key_cache, value_cache)
    if key.shape != value.shape:
        raise ValueError(f"key {tuple(key.shape)} and value {tuple(value.shape)} must have one shape")
    B, G, T, D = key.shape
    if shift_GD is not None and (tuple(shift_GD.shape) != (G, D) or shift_GD.dtype != torch.float32):
        raise ValueError(f"shift must be float32 {(G, D)}, got {shift_GD.dtype} {tuple(shift_GD.shape)}")
    if (cos is None) != (sin is None):
        raise ValueError("give both cos and sin, or neither (keys that are rotated already)")
    for name, table in (("cos", cos), ("sin", sin)):
        if table is not None and (tuple(table.shape) not in ((B, T, D), (1, T, D)) or table.dtype not in _DTYPES):
            raise ValueError(f"{name} must be [{B} or 1, {T}, {D}], got {table.dtype} {tuple(table.shape)}")
