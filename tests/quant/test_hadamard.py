"""Block Hadamard rotation, against scipy's matrix."""

from __future__ import annotations

import random

import pytest
import torch
from scipy.linalg import hadamard as scipy_hadamard

from reqat.config.errors import ReqatError
from reqat.quant import block_hadamard, hadamard, hadamard_factors, signs, with_signs


@pytest.mark.parametrize("n", [1, 2, 16, 32, 128])
def test_matrix_is_sylvesters_normalized(n: int) -> None:
    expected = torch.from_numpy(scipy_hadamard(n)).double() / n**0.5
    assert torch.equal(hadamard(n, torch.float64), expected)


def test_rotating_both_operands_keeps_their_product() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(5, 96, dtype=torch.float64), torch.randn(7, 96, dtype=torch.float64)
    rotated = block_hadamard(x, 32) @ block_hadamard(w, 32).T
    torch.testing.assert_close(rotated, x @ w.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(block_hadamard(block_hadamard(x, 32), 32), x, rtol=1e-12, atol=1e-12)


def test_blocks_do_not_mix() -> None:
    x = torch.zeros(64)
    x[40] = 1.0
    rotated = block_hadamard(x, 32)
    assert torch.equal(rotated[:32], torch.zeros(32))
    assert torch.allclose(rotated[32:].abs(), torch.full((32,), 32**-0.5))


def test_autocast_does_not_lower_its_precision() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        inside = block_hadamard(x, 32)
    assert torch.equal(inside, block_hadamard(x, 32))


def test_signs_then_hadamard_is_orthogonal_and_keeps_the_product() -> None:
    identity = torch.eye(64, dtype=torch.float64)
    rotation = block_hadamard(with_signs(identity, 3), 16)
    torch.testing.assert_close(rotation @ rotation.T, identity, rtol=0, atol=1e-12)
    assert not torch.allclose(rotation, block_hadamard(identity, 16))
    torch.manual_seed(0)
    q, k = torch.randn(5, 64, dtype=torch.float64), torch.randn(7, 64, dtype=torch.float64)
    torch.testing.assert_close((q @ rotation) @ (k @ rotation).T, q @ k.T, rtol=1e-12, atol=1e-12)


def test_a_seed_names_the_same_signs_everywhere_and_flips_are_exact() -> None:
    # Of Python's generator, which is the same on every platform; another draw would be another matrix.
    assert signs(8, 0).tolist() == [rng < 0.5 for rng in _draws("signs|8|0", 8)]
    assert 0.3 < signs(4096, 1).double().mean() < 0.7 and not torch.equal(signs(64, 0), signs(64, 1))
    x = torch.tensor([1e-45, -0.0, float("inf"), 3.0]).repeat(4)
    assert torch.equal(with_signs(with_signs(x, 0), 0), x) and torch.equal(with_signs(x, 0).abs(), x.abs())
    assert with_signs(x, None) is x


def _draws(seed: str, n: int) -> list[float]:
    rng = random.Random(seed)
    return [rng.random() for _ in range(n)]


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="power of two, not 24"):
        hadamard(24)
    with pytest.raises(ValueError, match=r"block 32 does not divide.*\(3, 48\)"):
        block_hadamard(torch.zeros(3, 48), 32)


@pytest.mark.parametrize("n", [1, 2, 12, 20, 28, 36, 44, 96, 108, 148, 384, 576])
def test_factors_of_any_constructible_size_make_a_hadamard_matrix(n: int) -> None:
    left, right = hadamard_factors(n)
    H = torch.kron(left, right)
    assert H.shape == (n, n)
    torch.testing.assert_close(H.abs(), torch.full_like(H, n**-0.5))
    torch.testing.assert_close(H @ H.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [0, 9, 11, 92, 1001])
def test_a_size_without_a_construction_is_named(n: int) -> None:
    with pytest.raises(ReqatError, match=f"size {n} "):
        hadamard_factors(n)
