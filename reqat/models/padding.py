"""Padded batches taken apart, for whoever must see real tokens alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from reqat.config.errors import ReqatError


def unpadded(batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The model's arguments without padding: the batch as it is where its mask [B, T] hides nothing, else row by row.

    A row keeps the positions that its mask shows, of every tensor [B, T, ...] (``position_ids`` [1, T] too); rows of
    padding alone are left out. Without ``position_ids`` a row counts from zero at its first token, as it would alone.

    Raises ``ReqatError`` for a mask that does not say which tokens are padding (4D), or of another shape than the ids.
    """
    mask = batch.get("attention_mask")
    if mask is None:
        yield dict(batch)
        return
    ids = batch.get("input_ids")
    if ids is None:
        ids = batch.get("inputs_embeds")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or ids is None or mask.shape != ids.shape[:2]:
        given = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ReqatError(
            f"an attention_mask of {given} does not say which tokens are padding: give one of the ids' shape [B, T], "
            "or sequences without padding"
        )
    real_BT = mask.bool()
    if bool(real_BT.all()):
        yield dict(batch)
        return
    B, T = mask.shape
    for b in range(B):
        at = real_BT[b].nonzero()[:, 0]
        if not len(at):
            continue
        row = {}
        for name, value in batch.items():
            if name == "attention_mask":
                continue
            cut = isinstance(value, Tensor) and value.ndim >= 2 and value.shape[0] in (1, B) and value.shape[1] == T
            row[name] = value[b if value.shape[0] == B else 0][None, at.to(value.device)] if cut else value
        if "position_ids" not in row and int(at[-1] - at[0]) + 1 != len(at):  # a hole: tokens keep their distances
            row["position_ids"] = (at - at[0])[None].to(torch.int64)
        yield row
