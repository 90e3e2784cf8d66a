"""Naive PyTorch twins of the cache kernels: the same arguments, one statement an idea, no speed.

``attention_naive`` builds the whole dequantized cache and all logits in float64 (or the dtype it is given), so its own
rounding does not count against a kernel that works in float32. ``append_naive`` is ``reqat.quantize`` and an
assignment.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reqat.formats import pack_codes, quantize, unpack_codes
from reqat_kernels.triton.attention import HIDDEN
from reqat_kernels.triton.kv_side import KVSide


def dequantize_side(side: KVSide, dtype: torch.dtype = torch.float64) -> Tensor:
    """What the codes stand for, [B, G, S, D]: value(code) * s / g, in ``dtype``. Unused tokens hold garbage."""
    values = side.format.element_type.decode(unpack_codes(side.codes, side.head_dim)).to(dtype)
    if side.format.scale == "E8M0":
        scales = torch.exp2(side.scales.to(torch.float64) - 127).to(dtype)
    else:
        scales = side.scales.view(torch.float8_e4m3fn).to(dtype)
    scales = scales.repeat_interleave(side.format.block or 1, -1)
    return values * scales / side.global_scale_BGS()[..., None].to(dtype)


def attention_naive(
    query: Tensor,
    key: KVSide,
    value: KVSide,
    *,
    length: int | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """:func:`reqat_kernels.triton.attention.decode_attention` in ``dtype``; [B, H, T, D] of that type."""
    weights, v = attention_weights_naive(
        query, key, value, length=length, lengths=lengths, mask=mask, causal=causal, scale=scale, dtype=dtype
    )
    return weights @ v


def attention_weights_naive(
    query: Tensor,
    key: KVSide,
    value: KVSide,
    *,
    length: int | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """The softmax weights [B, H, T, S] and the values they weigh, [B, H, S, D]; zeros where nothing is visible."""
    B, H, T, D = query.shape
    capacity = key.codes.shape[2]
    S = capacity if length is None else length
    n = H // key.codes.shape[1]
    k = dequantize_side(key, dtype)[:, :, :S].repeat_interleave(n, 1)
    v = dequantize_side(value, dtype)[:, :, :S].repeat_interleave(n, 1)
    logits = query.to(dtype) @ k.mT * (1 / math.sqrt(D) if scale is None else scale)

    ends = torch.full((B,), S, dtype=torch.int64, device=query.device) if lengths is None else lengths
    position = torch.arange(S, dtype=torch.int64, device=query.device)
    last = ends[:, None] - (
        T - 1 - torch.arange(T, dtype=torch.int64, device=query.device) if causal else 0
    )  # [B, T] or [B, 1]
    visible = (position < ends[:, None, None]) & (position < last[..., None])
    visible = visible[:, None].expand(B, H, T, S)
    if mask is not None:
        mask = (mask[:, None, None] if mask.ndim == 2 else mask)[..., :S]
        if mask.dtype == torch.bool:
            visible = visible & mask
        else:
            visible = visible & (mask > HIDDEN)
            logits = logits + mask.to(dtype)
    weights = torch.softmax(logits.masked_fill(~visible, -math.inf), -1).masked_fill(~visible, 0.0)
    in_use = (position < ends[:, None])[:, None, :, None]
    return weights, torch.where(in_use, v, 0.0)


def append_naive(
    side: KVSide,
    x_BGTD: Tensor,
    offset: int,
    *,
    shift_GD: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> None:
    """Rotate if ``cos`` and ``sin`` ([B, T, D]) are given, subtract the shift, quantize, write at ``offset``.

    The rotation in the types given, the rest in float32. A cache of one global scale a row gets its rows' own; any
    other keeps what it has.
    """
    x = x_BGTD
    if cos is not None and sin is not None:
        left, right = x.chunk(2, -1)
        x = x * cos[:, None] + torch.cat((-right, left), -1) * sin[:, None]
    x = x.float()
    if shift_GD is not None:
        x = x - shift_GD[:, None]
    end = offset + x.shape[2]
    if side.format.global_scale == "none":
        q = quantize(x, side.format)
    elif side.global_scale is not None and side.format.global_scale == "row":
        q = quantize(x, side.format)
        assert q.global_scale is not None
        side.global_scale[:, :, offset:end] = q.global_scale[..., 0]
    else:
        g = side.global_scale_BGS()[:, :, offset:end, None]
        q = quantize(x, side.format, global_scale=g)
    side.codes[:, :, offset:end] = pack_codes(q.codes)
    side.scales[:, :, offset:end] = q.scales.view(torch.uint8)
