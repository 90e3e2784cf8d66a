"""A key/value cache that is really four bits wide, and attention that reads it as it is.

Decoding one token reads the whole cache once, so its time is the cache's bytes or the work of turning codes into
floats. :class:`PackedStates` (:mod:`reqat_kernels.native.states`) keeps keys or values in tiles of 16 tokens arranged
for that work (attention.h): one shift and one table look-up make 16 floats, all query heads of a key/value head share
them, and no sum runs across a register.

:func:`kv_attention` computes, for a query q and tokens t with ``k^ = value(code) * (s / g)`` and v^ alike,

    score_t = q . k^_t * scaling (+ mask);   p = softmax(score);   out = sum_t p_t v^_t

in float32, over spans of 512 tokens whose results are then weighed by their maxima. Spans do not depend on the batch
or the number of threads, so neither does a row's result. Scales multiply sums of q times code values, not each value.
Rounding, with u = 2^-24, against exact arithmetic on the same codes:

    |score error_t| <= (block + D / block + 6) u * scaling * sum_d |q_d k^_td|
    |out error_d|   <= sum_t p_t e_t (|v^_td| + |out_d|)
                       + (min(S, 512) + S / 512 + 12) u * (sum_t p_t |v^_td| + |out_d|)
    with e_t = |score error_t| + u |score_t - max| + 4 u  (the exponential is within 2 ulps)

Without the native library the same functions compute from the same bytes in PyTorch.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from reqat.formats.subnormals import subnormals_kept
from reqat_kernels.native import check
from reqat_kernels.native.library import NO_MEMORY, OPERATORS, library, threads
from reqat_kernels.native.states import (
    CODES_PER_THREAD,
    MAX_HEAD_DIM,
    TILE,
    AppendArgs,
    PackedStates,
    Side,
    StatesStruct,
    check_codes,
    check_side,
    dequantized,
    states_struct,
    unsupported,
)

__all__ = [
    "MAX_HEAD_DIM",
    "TILE",
    "AppendArgs",
    "AttentionArgs",
    "PackedStates",
    "kv_attention",
    "states_struct",
    "unsupported",
]

_i64, _pointer = ctypes.c_int64, ctypes.c_void_p


class AttentionArgs(ctypes.Structure):
    """``reqat::AttentionArgs``."""

    _fields_ = [
        ("query", _pointer),
        ("out", _pointer),
        ("key", StatesStruct),
        ("value", StatesStruct),
        ("mask", _pointer),
        *((name, _i64) for name in ("mask_kind", "mask_b", "mask_h", "mask_t", "mask_s")),
        ("start", _pointer),
        *((name, _i64) for name in ("B", "H", "G", "T", "S", "D", "tiles", "threads")),
        ("scaling", ctypes.c_double),
        ("causal", _i64),
    ]


def kv_attention(
    query: Tensor,
    key: PackedStates,
    value: PackedStates,
    length: int,
    *,
    scaling: float | None = None,
    mask: Tensor | None = None,
    start: Tensor | None = None,
    is_causal: bool = True,
) -> Tensor:
    """Attention of new tokens, a few or a prompt, over the first ``length`` tokens of a packed cache, in float32.

    Args:
        query: [B, H, T, D], any float dtype (float64 is rounded to float32); H a multiple of the cache's heads.
        key, value: the cache, the new tokens already appended.
        scaling: factor of the scores; ``D ** -0.5`` if None.
        mask: broadcastable to [B, H, T, length], boolean (True = attend) or additive.
        start: int64 [B], the first token of each row (what is before is padding), or None.
        is_causal: without ``mask``, query t sees the first ``length - T + t + 1`` tokens; all if False.

    Returns float32 [B, H, T, D]. A row that may attend to nothing gives zeros; NaN in a query gives NaN. Not
    differentiable. Raises ValueError for shapes, types or devices that do not fit together, TypeError for what is no
    tensor or no cache.
    """
    if check.floats("query", query).ndim != 4 or not query.shape[-1]:
        raise ValueError(f"query must be [B, H, T, D] of a float dtype, got {list(query.shape)} of {query.dtype}")
    for what, states in (("key", key), ("value", value)):
        if not isinstance(states, PackedStates) or states.kind != what:
            raise TypeError(f"{what} must be PackedStates of kind {what!r}, as PackedStates.allocate makes them")
    check.size("length", length)
    for what, part in (("mask", mask), ("start", start)):
        if part is not None:
            check.tensor(what, part)
    return torch.ops.reqat.kv_attention(
        query,
        key.codes,
        key.scales,
        key.global_scale,
        key.format.element,
        value.codes,
        value.scales,
        value.global_scale,
        value.format.element,
        length,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        mask,
        start,
        is_causal and mask is None,
    )


# --- operators --------------------------------------------------------------------------------------------------------

OPERATORS.define(
    "kv_attention(Tensor query, Tensor key_codes, Tensor key_scales, Tensor? key_global_scale, str key_element, "
    "Tensor value_codes, Tensor value_scales, Tensor? value_global_scale, str value_element, int length, "
    "float scaling, Tensor? mask, Tensor? start, bool is_causal) -> Tensor"
)


def _attention(
    query: Tensor,
    key_codes: Tensor,
    key_scales: Tensor,
    key_global_scale: Tensor | None,
    key_element: str,
    value_codes: Tensor,
    value_scales: Tensor,
    value_global_scale: Tensor | None,
    value_element: str,
    length: int,
    scaling: float,
    mask: Tensor | None,
    start: Tensor | None,
    is_causal: bool,
) -> Tensor:
    lib = library()
    key = (key_codes, key_scales, key_global_scale, key_element)
    value = (value_codes, value_scales, value_global_scale, value_element)
    if lib is None:
        return _attention_torch(query, *key, *value, length, scaling, mask, start, is_causal)
    B, H, T, D = _checked(query, key, value, length, scaling, mask, start)
    out = torch.empty(B, H, T, D, dtype=torch.float32, device="cpu")
    if not length:
        return out.zero_()
    if not out.numel():
        return out
    query = query.float().contiguous()
    kind, mask_strides = 0, (0, 0, 0, 0)
    if mask is not None:
        kind, mask = (1, mask) if mask.dtype == torch.bool else (2, mask.float())
        mask = _broadcast_mask(mask, (B, H, T, length))
        mask_strides = mask.stride()  # type: ignore[assignment]
    if start is not None:
        start = start.to(torch.int64).contiguous()
    G = key_codes.shape[1]
    reads = 1 if T <= 8 else -(-(H // G * T) // 8)  # of the cache: once, or a prompt's for every eight rows of queries
    args = AttentionArgs(
        check.address(query),
        out.data_ptr(),
        states_struct(*key),
        states_struct(*value),
        check.address(mask),
        kind,
        *mask_strides,
        check.address(start),
        B,
        H,
        G,
        T,
        length,
        D,
        key_codes.shape[2],
        threads(2 * B * G * length * D * reads, CODES_PER_THREAD),
        scaling,
        is_causal,
    )
    if lib.reqat_kv_attention(ctypes.byref(args)) == NO_MEMORY:
        raise MemoryError(f"no memory for the partial sums of {B} x {H} x {T} query rows over {length} tokens")
    return out


def _attended(
    query: Tensor,
    key_codes: Tensor,
    key_scales: Tensor,
    key_global_scale: Tensor | None,
    key_element: str,
    value_codes: Tensor,
    value_scales: Tensor,
    value_global_scale: Tensor | None,
    value_element: str,
    length: int,
    scaling: float,
    mask: Tensor | None,
    start: Tensor | None,
    is_causal: bool,
) -> Tensor:
    key = (key_codes, key_scales, key_global_scale, key_element)
    value = (value_codes, value_scales, value_global_scale, value_element)
    B, H, T, D = _checked(query, key, value, length, scaling, mask, start)
    G = key_codes.shape[1]
    k, v = (dequantized(*side, kind, length) for side, kind in ((key, False), (value, True)))
    scores = query.float().reshape(B, G, H // G * T, D) @ k.transpose(-1, -2) * scaling
    scores = scores.view(B, H, T, length)
    position = torch.arange(length, dtype=torch.int64, device=query.device)
    last = torch.arange(length - T, length, dtype=torch.int64, device=query.device)
    hidden = position[None] > last[:, None] if is_causal else None
    if mask is not None:
        mask = _broadcast_mask(mask, (B, H, T, length))
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.float()
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    if start is not None:
        scores = scores.masked_fill(position < start[:, None, None, None], -math.inf)
    blind = (scores == -math.inf).all(-1, keepdim=True)
    p = torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)
    return (p.view(B, G, H // G * T, length) @ v).view(B, H, T, D)


def _attention_torch(query: Tensor, key_codes: Tensor, *rest: Any) -> Tensor:
    with subnormals_kept(check.tensor("key codes", key_codes)):
        return _attended(query, key_codes, *rest)


def _attention_meta(
    query: Tensor,
    key_codes: Tensor,
    key_scales: Tensor,
    key_global_scale: Tensor | None,
    key_element: str,
    value_codes: Tensor,
    value_scales: Tensor,
    value_global_scale: Tensor | None,
    value_element: str,
    length: int,
    scaling: float,
    mask: Tensor | None,
    start: Tensor | None,
    is_causal: bool,
) -> Tensor:
    key = (key_codes, key_scales, key_global_scale, key_element)
    value = (value_codes, value_scales, value_global_scale, value_element)
    _checked(query, key, value, length, scaling, mask, start)
    return query.new_empty(query.shape, dtype=torch.float32)


OPERATORS.impl("kv_attention", _attention_torch, "CompositeExplicitAutograd")
OPERATORS.impl("kv_attention", _attention, "CPU")
torch.library.register_fake("reqat::kv_attention", _attention_meta)


# --- helpers ----------------------------------------------------------------------------------------------------------


def _checked(
    query: Tensor, key: Side, value: Side, length: int, scaling: float, mask: Tensor | None, start: Tensor | None
) -> tuple[int, int, int, int]:
    """The query's shape; raises ValueError where the C++ code could read what is not there."""
    if check.tensor("query", query).ndim != 4 or not query.is_floating_point():
        raise ValueError(f"query must be [B, H, T, D] of a float dtype, got {list(query.shape)} of {query.dtype}")
    B, H, T, D = query.shape
    for what, (codes, scales, g, element) in (("key", key), ("value", value)):
        shape = check_codes(what, codes)
        _, G, tiles, _ = shape
        if shape[0] != B or shape[3] != D or G == 0 or H % G:
            raise ValueError(f"query {list(query.shape)} does not fit {what} codes {list(codes.shape)}")
        check_side(what, codes, scales, g, element, shape)
        if (g is None) != (scales.dtype == torch.uint8):
            raise ValueError(f"{what} scales of {scales.dtype} {'need a' if g is None else 'have no'} global scale")
        if not 0 <= length <= tiles * TILE:
            raise ValueError(f"{length} tokens of a cache that holds {tiles * TILE}")
        if codes.device != query.device:
            raise ValueError(f"the query is on {query.device}, {what} codes on {codes.device}: move one of them")
    if key[0].shape != value[0].shape:
        raise ValueError(f"key codes {list(key[0].shape)} and value codes {list(value[0].shape)} differ in shape")
    check.finite("scaling", scaling)
    if mask is not None and (not (mask.dtype == torch.bool or mask.is_floating_point()) or mask.device != query.device):
        raise ValueError(f"mask must be boolean or floating on {query.device}, got {mask.dtype} on {mask.device}")
    if start is not None and (
        start.shape != (B,) or start.is_floating_point() or start.is_complex() or start.dtype == torch.bool
    ):
        raise ValueError(f"start must be one integer a batch row, got {list(start.shape)} of {start.dtype}")
    if start is not None and start.device != query.device:
        raise ValueError(f"start is on {start.device}, the query on {query.device}: move one of them")
    return B, H, T, D


def _broadcast_mask(mask: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    try:
        return mask.broadcast_to(shape)
    except RuntimeError as error:
        raise ValueError(f"mask of shape {list(mask.shape)} does not broadcast to {list(shape)}") from error
