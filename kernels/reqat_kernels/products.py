"""Matrix products of bfloat16 and float16 tensors that are fast on every CPU.

Where the processor has no instruction for such products (x86 with AVX2 alone), torch's own take a reference path that
is five to ten times slower than float32. There the operands are converted to float32, multiplied, and the result is
rounded to their dtype: what hardware with such instructions does, up to the order of the sum.

Shapes: M rows, K inner size, N columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

# Float32 copies of the operands and of the result are made for tiles of at most this size.
_TILE_BYTES = 32 * 2**20


@cache
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of ``dtype`` at least as fast as float32 ones."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


def mm(a_MK: Tensor, b_KN: Tensor, out_MN: Tensor | None = None) -> Tensor:
    """``a @ b``, rounded once to their common dtype; into ``out_MN`` (any strides) where it is given.

    Raises:
        RuntimeError: shapes, dtypes or devices that ``torch.mm`` refuses.
    """
    if a_MK.device.type != "cpu" or cpu_multiplies(a_MK.dtype) or a_MK.dtype != b_KN.dtype:
        return torch.mm(a_MK, b_KN) if out_MN is None else torch.mm(a_MK, b_KN, out=out_MN)
    M, K = a_MK.shape
    N = b_KN.shape[1]
    if out_MN is None:
        out_MN = torch.empty(M, N, dtype=a_MK.dtype, device=a_MK.device)
    # The inner size is never cut: a sum stays one float32 sum, rounded once.
    for columns in _tiles(N, K):
        b = b_KN[:, columns].float()
        for rows in _tiles(M, max(K, b.shape[1])):
            out_MN[rows, columns] = torch.mm(a_MK[rows].float(), b)
    return out_MN


def _tiles(size: int, width: int) -> Iterator[slice]:
    """Slices of ``range(size)``, each of as many rows of ``width`` float32 values as a tile holds."""
    step = max(1, _TILE_BYTES // max(1, 4 * width))
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))
