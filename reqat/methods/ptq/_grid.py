"""Scales of a weight by search: cut each block off where its rounding error is least.

The largest number of a block decides its scale, and with it the error of all the others. For each of a list of shares
p the block is rounded with the scale that p times its largest magnitude has, what lies beyond saturates, and the share
of the least ``sum |x^ - x|^norm`` is kept. The share 1 is among them, so the result is never worse than rounding to
nearest in that norm. Used by QuaRot's GPTQ (a row is a block) and by MR-GPTQ (arXiv 2509.23202, section 4).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reqat.formats import Format, QuantizedTensor, global_scale_for, quantize, quantize_dequantize
from reqat.quant import clipped


def searchable(fmt: Format) -> bool:
    """Whether a finer choice of scales helps: powers of two only halve, and ternary scales are no maxima."""
    return fmt.scale != "E8M0" and fmt.scale_rule != "twn" and not fmt.per_tensor


@torch.no_grad()
def searched(
    weight_NK: Tensor,
    fmt: Format,
    shares: Sequence[float],
    *,
    norm: float,
    global_scale: Tensor | None = None,
    name: str | None = None,
) -> QuantizedTensor:
    """Codes and scales of a float32 weight [N, K], each block's scale from the best of ``shares`` (and 1) of its
    largest magnitude. The global scale is that of the whole weight, or the given one. Where a search would not help
    (:func:`searchable`), rounded to nearest."""
    if fmt.has_global_scale and global_scale is None:
        global_scale = global_scale_for(weight_NK, fmt, name=name)
    if not searchable(fmt):
        return quantize(weight_NK, fmt, global_scale=global_scale, name=name)
    blocks = weight_NK.shape[-1] // (fmt.block or weight_NK.shape[-1])
    best = torch.ones(len(weight_NK), blocks, device=weight_NK.device)
    least = torch.full_like(best, torch.inf)
    for share in sorted({1.0, *shares}, reverse=True):
        cut = weight_NK if share == 1 else clipped(weight_NK, weight_NK.new_tensor([share, share]), fmt)
        rounded = quantize_dequantize(cut, fmt, global_scale=global_scale, name=name)
        error = (rounded - weight_NK).abs().pow(norm).unflatten(-1, (blocks, -1)).sum(-1)
        better = error < least
        best, least = torch.where(better, share, best), torch.where(better, error, least)
    chosen = clipped(weight_NK, torch.stack([best, best], -1), fmt)
    return quantize(chosen, fmt, global_scale=global_scale, name=name)
