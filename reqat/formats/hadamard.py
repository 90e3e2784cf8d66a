"""Block Hadamard rotation: spread an outlier over its block before quantizing.

A normalized Hadamard matrix H is symmetric and its own inverse, so rotating blocks of both the input and the weight
along the reduced axis leaves their product as it was: (x H)(w H)^T = x H H^T w^T = x w^T. Each rotated element is a
signed sum of its whole block, which turns one large element into 32 moderate ones; power-of-two scales (MXFP4) gain
most. ReQAT section 1; the matrix is Sylvester's construction, made on demand.

Queries and keys may be multiplied with fixed random signs first, the "randomized" Hadamard rotation of QuaRot: S H is
orthogonal like H, and does not send an outlier that all channels share to one element.

Whole-vector rotations (QuaRot) need a Hadamard matrix of the vector's own size n = m 2^k, which is that of order m
(Paley's constructions: 12, 20, 28, 36, 44, ...) times Sylvester's: :func:`hadamard_factors`. It is orthogonal but not
symmetric.
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


def hadamard_factors(n: int) -> tuple[Tensor, Tensor]:
    """Normalized Hadamard matrices L [m, m] and R [2^k, 2^k], float64, with m 2^k = n: L (x) R is one of order n.

    m is the smallest order that :func:`paley` constructs or 1. Raises ReqatError, naming n, if there is none.
    """
    power = n & -n if n > 0 else 0
    while power:
        m = n // power
        matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu") if m == 1 else paley(m)
        if matrix is not None:
            return matrix / m**0.5, hadamard(power, torch.float64)
        power //= 2
    raise ReqatError(
        f"no Hadamard matrix of size {n} is constructed here: it must be a power of two, or that times an order of "
        "Paley's, q + 1 for a prime q = 3 mod 4 or 2 (q + 1) for a prime q = 1 mod 4 (12, 20, 28, 36, 44, ...)"
    )


@functools.lru_cache(maxsize=32)
def paley(m: int) -> Tensor | None:
    """A Hadamard matrix [m, m] of entries +-1, float64, by Paley's constructions over a prime field; None if neither
    has order m.

    With Q_ij = 1 where i - j is a square modulo the prime q, -1 where it is none and 0 on the diagonal: for q = 3 mod 4
    Q is antisymmetric and I + [[0, 1], [-1, Q]] has order q + 1; for q = 1 mod 4 it is symmetric, C = [[0, 1], [1, Q]]
    and C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]] has order 2 (q + 1). Cached: do not write to it.
    """
    if _is_prime(m - 1) and (m - 1) % 4 == 3:
        return _bordered(m - 1, -1.0) + torch.eye(m, dtype=torch.float64, device="cpu")
    q = m // 2 - 1
    if m % 4 == 0 and _is_prime(q) and q % 4 == 1:
        two, other = (
            torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device="cpu"),
            torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64, device="cpu"),
        )
        return torch.kron(_bordered(q, 1.0), two) + torch.kron(
            torch.eye(q + 1, dtype=torch.float64, device="cpu"), other
        )
    return None


def _bordered(q: int, sign: float) -> Tensor:
    """[[0, 1], [sign, Q]] [q + 1, q + 1] with Q of the squares modulo q."""
    character = torch.full((q,), -1.0, dtype=torch.float64, device="cpu")
    character[torch.arange(1, q, dtype=torch.int64, device="cpu") ** 2 % q] = 1.0
    character[0] = 0.0
    matrix = torch.ones(q + 1, q + 1, dtype=torch.float64, device="cpu")
    matrix[0, 0] = 0.0
    matrix[1:, 0] = sign
    index = torch.arange(q, dtype=torch.int64, device="cpu")
    matrix[1:, 1:] = character[(index[:, None] - index) % q]
    return matrix


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


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
        return torch.tensor([rng.random() < 0.5 for _ in range(n)], dtype=torch.bool, device=device)


def with_signs(x: Tensor, seed: int | None) -> Tensor:
    """The last axis of ``x`` with the :func:`signs` of ``seed``; ``x`` itself for None. Exact, and its own inverse."""
    return x if seed is None else torch.where(signs(x.shape[-1], seed, x.device), -x, x)
