"""Block Hadamard rotation: spread an outlier over its block before quantizing.

A normalized Hadamard matrix H is symmetric and its own inverse, so rotating blocks of both the input and the weight
along the reduced axis leaves their product as it was: (x H)(w H)^T = x H H^T w^T = x w^T. Each rotated element is a
signed sum of its whole block, which turns one large element into 32 moderate ones; power-of-two scales (MXFP4) gain
most. ReQAT section 1; the matrix is Sylvester's construction, made on demand.

Queries and keys may be multiplied with fixed random signs first, the "randomized" Hadamard rotation of QuaRot: S H is
orthogonal like H, and does not send an outlier that all channels share to one element.
"""

from __future__ import annotations

import functools
import random

import torch
from torch import Tensor

from reqat.config.errors import ReqatError
from reqat.formats.subnormals import subnormals_kept


@functools.lru_cache(maxsize=32)
def hadamard(n: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """The normalized Sylvester Hadamard matrix [n, n]: symmetric, orthogonal, entries +-1/sqrt(n).

    Cached: do not write to it. Raises ValueError unless ``n`` is a power of two.
    """
    if n < 1 or n & (n - 1):
        raise ReqatError(f"Hadamard size must be a power of two, not {n}")
    with torch.inference_mode(False):  # kept for all callers: an ordinary tensor, whatever the mode of the first
        matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")
        while matrix.shape[0] < n:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
        return (matrix / n**0.5).to(dtype=dtype, device=device)


def block_hadamard(x: Tensor, block: int) -> Tensor:
    """Rotate each block of ``block`` consecutive elements of the last axis of ``x``; same shape and dtype.

    Computed in float32 (float64 for float64 inputs) even under autocast, so that training and frozen weights agree.
    Applying it twice gives ``x`` back. Raises ValueError if ``block`` does not divide the last axis.
    """
    if x.shape[-1] % block:
        raise ReqatError(f"the Hadamard block {block} does not divide the last axis of shape {tuple(x.shape)}")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False), subnormals_kept(x):
        rotated = torch.matmul(x.to(dtype).reshape(-1, block), hadamard(block, dtype, x.device))
    return rotated.reshape(x.shape).to(x.dtype)


@functools.lru_cache(maxsize=32)
def signs(n: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Which of ``n`` channels change their sign: bool [n], drawn from ``seed`` by Python's own generator, so that the
    seed names the same matrix everywhere. Cached: do not write to it."""
    rng = random.Random(f"signs|{n}|{seed}")
    with torch.inference_mode(False):
        return torch.tensor([rng.random() < 0.5 for _ in range(n)], device=device)


def with_signs(x: Tensor, seed: int | None) -> Tensor:
    """The last axis of ``x`` with the :func:`signs` of ``seed``; ``x`` itself for None. Exact, and its own inverse."""
    return x if seed is None else torch.where(signs(x.shape[-1], seed, x.device), -x, x)
