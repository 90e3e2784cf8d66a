"""The elementwise work of :mod:`reqat_kernels.sem_loss` on a GPU: one pass for statistics, one for gradients.

The matrix products stay with the vendor's library; what remains is bound by memory, so a pass over the logits is what
counts. Torch's own operations read or write a chunk about twelve times; here the first sweep reads it once (a running
maximum rescales the sums seen so far, so maximum, normalizer and entropy come out together) and the second reads and
writes it once, in place.

With m the maximum so far, S = sum e^(z - m) and A = sum e^(z - m) (z - m), a new maximum m' turns them into
``A' = r (A + S (m - m'))`` and ``S' = r S`` with ``r = e^(m - m')``; at the end ``H = log S - A / S``.

The torch twin of each function has its name in :mod:`reqat_kernels.sem_loss`; they agree up to the order of summation
and the GPU's exponential. The running maximum is published as online softmax (arXiv 1805.02867).

Shapes: C tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reqat_kernels.native.check import exactly
from reqat_kernels.triton.launches import launch
from reqat_kernels.triton.runtime import capability, require, tl, triton


@triton.jit
def statistics_kernel(logits, lse, entropy, size, stride, ENTROPY: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row of ``size`` logits: their log-sum-exp and, with ``ENTROPY``, their entropy."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    columns = tl.arange(0, BLOCK)
    # The first block stands before the loop: no sum has to be rescaled from a maximum of minus infinity.
    z = tl.load(logits + columns, mask=columns < size, other=-float("inf")).to(tl.float32)
    top = tl.max(z, axis=0)
    shifted = tl.where(columns < size, z - top, 0.0)
    e = tl.where(columns < size, tl.exp(shifted), 0.0)
    total = tl.sum(e, axis=0)
    moment = tl.sum(e * shifted, axis=0)
    for start in range(BLOCK, size, BLOCK):
        inside = start + columns < size
        z = tl.load(logits + start + columns, mask=inside, other=-float("inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(z, axis=0))
        shifted = tl.where(inside, z - new_top, 0.0)
        e = tl.where(inside, tl.exp(shifted), 0.0)
        rescale = tl.exp(top - new_top)
        if ENTROPY:
            moment = rescale * (moment + total * (top - new_top)) + tl.sum(e * shifted, axis=0)
        total = rescale * total + tl.sum(e, axis=0)
        top = new_top
    log_total = tl.log(total)
    tl.store(lse + row, top + log_total)
    if ENTROPY:
        tl.store(entropy + row, log_total - moment / total)


@triton.jit
def gradient_kernel(logits, lse, entropy, pull, nll, size, stride, PULL: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row and block of columns: logits become ``p * (nll - pull * (log p + H))``."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    logits += row * stride
    log_p = tl.load(logits + columns, mask=inside, other=0.0).to(tl.float32) - tl.load(lse + row)
    factor = nll
    if PULL:
        factor = nll - tl.load(pull + row) * (log_p + tl.load(entropy + row))
    grad = tl.exp(log_p) * factor
    tl.store(logits + columns, grad.to(logits.dtype.element_ty), mask=inside)


def row_statistics(logits_CV: Tensor, *, entropy: bool = True) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and entropy of each row of logits ``[C, V]`` (float32, bf16, fp16): two ``[C]`` float32 tensors.

    Without ``entropy`` the second is zeros. Rows must be contiguous.
    """
    require(logits_CV)
    C, V = _shape(logits_CV)
    lse_C = torch.empty(C, dtype=torch.float32, device=logits_CV.device)
    entropy_C = torch.zeros_like(lse_C)
    if C:
        statistics_kernel[(C,)](
            logits_CV, lse_C, entropy_C, V, logits_CV.stride(0), ENTROPY=entropy, **_tile(V, logits_CV)
        )
    return lse_C, entropy_C


def row_gradient_(logits_CV: Tensor, lse_C: Tensor, entropy_C: Tensor, pull_C: Tensor | None, nll: float) -> Tensor:
    """Logits ``[C, V]`` become ``p * (nll - pull * (log p + H))``, in place; a pull of None stands for zeros."""
    require(logits_CV, lse_C, entropy_C, pull_C)
    C, V = _shape(logits_CV)
    for name, row in (("lse", lse_C), ("entropy", entropy_C), ("pull", pull_C)):
        if row is not None:
            exactly(name, row, torch.float32, (C,), logits_CV.device)
    tile = _tile(V, logits_CV)
    if C:
        gradient_kernel[(C, triton.cdiv(V, tile["BLOCK"]))](
            logits_CV,
            lse_C,
            entropy_C,
            lse_C if pull_C is None else pull_C,
            nll,
            V,
            logits_CV.stride(0),
            PULL=pull_C is not None,
            **tile,
        )
    return logits_CV


def _shape(logits_CV: Tensor) -> tuple[int, int]:
    if logits_CV.ndim != 2 or not logits_CV.shape[1]:
        raise ValueError(f"logits must be [C, V] with V above 0, got {list(logits_CV.shape)}")
    if logits_CV.dtype not in (torch.float32, torch.bfloat16, torch.float16) or logits_CV.stride(-1) != 1:
        raise ValueError(
            f"the Triton kernels take contiguous rows of float32, bfloat16 or float16, got {logits_CV.dtype} with "
            f"strides {logits_CV.stride()}; use the torch twin in reqat_kernels.sem_loss"
        )
    return logits_CV.shape[0], logits_CV.shape[1]


def _tile(size: int, logits_CV: Tensor) -> dict[str, int]:
    """Logits a program holds at once (long rows keep the memory busy with few programs) and its warps."""
    chosen = launch("loss", capability(logits_CV))
    return {**chosen, "BLOCK": max(16, min(chosen["BLOCK"], triton.next_power_of_2(size)))}
