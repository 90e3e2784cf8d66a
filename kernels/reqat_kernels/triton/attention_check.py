"""Arguments of the Triton decode attention: what fits together, and masks in one shape."""

from __future__ import annotations

import torch
from torch import Tensor

from reqat_kernels.native import check
from reqat_kernels.triton.kv_side import KVSide, check_pair, check_rows

_QUERY_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def expanded_mask(mask: Tensor | None, B: int, H: int, T: int) -> Tensor | None:
    """A mask [B, S] or broadcastable to [B, H, T, S], in that shape."""
    if mask is None:
        return None
    if mask.ndim == 2:
        mask = mask[:, None, None, :]
    return mask.expand(B, H, T, mask.shape[-1])


def check_arguments(
    query: Tensor,
    key: KVSide,
    value: KVSide,
    mask: Tensor | None,
    length: int | None,
    lengths: Tensor | None,
    *,
    looks: bool,
) -> None:
    """Raise ValueError for arguments of decode_attention that do not fit together; ``looks``: at lengths on a CPU."""
    if query.ndim != 4 or query.dtype not in _QUERY_DTYPES:
        raise ValueError(f"query must be [B, H, T, D] in bf16, fp16 or fp32, got {query.dtype} {tuple(query.shape)}")
    B, H, T, _ = query.shape
    capacity = key.shape[2]
    check_pair(key, value)
    check_rows("query", query.shape, key, grouped=True)
    if query.device != key.codes.device:
        raise ValueError(f"query on {query.device}, keys on {key.codes.device}: move them to one device")
    if length is not None and lengths is not None:
        raise ValueError("give length or lengths, not both")
    if length is not None:
        check.integer("length", length)
    if length is not None and not 0 <= length <= capacity:
        raise ValueError(f"length {length} is outside the cache's capacity of {capacity}")
    if lengths is not None:
        if tuple(lengths.shape) != (B,) or lengths.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"lengths must be int32 or int64 [{B}], got {lengths.dtype} {tuple(lengths.shape)}")
        if lengths.device != query.device or not lengths.is_contiguous():
            raise ValueError(f"lengths must be contiguous on {query.device}")
        if looks and lengths.device.type == "cpu" and B and (int(lengths.min()) < 0 or int(lengths.max()) > capacity):
            raise ValueError(f"lengths {lengths.tolist()} are outside the cache's capacity of {capacity}")
    if mask is None:
        return
    if mask.ndim not in (2, 4) or not (mask.dtype == torch.bool or mask.dtype.is_floating_point):
        raise ValueError(f"mask must be boolean or floating, [B, S] or 4D, got {mask.dtype} {tuple(mask.shape)}")
    lead = mask.shape[:1] if mask.ndim == 2 else mask.shape[:3]
    wanted = (B,) if mask.ndim == 2 else (B, H, T)
    needed = capacity if length is None else length
    if any(have not in (1, want) for have, want in zip(lead, wanted, strict=True)) or mask.shape[-1] < needed:
        raise ValueError(
            f"mask of shape {tuple(mask.shape)} must broadcast to {(B, H, T)} and have at least {needed} keys"
        )
    if mask.device != query.device:
        raise ValueError(f"mask is on {mask.device}, query on {query.device}")
