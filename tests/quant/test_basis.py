"""A basis: products stay, weights come back, and what is no basis is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reqat.config.errors import ReqatError
from reqat.quant import Basis, kronecker


def factors(a: int, b: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(a * 100 + b)
    return torch.randn(a, a, generator=g) + 3 * torch.eye(a), torch.randn(b, b, generator=g) + 3 * torch.eye(b)


@pytest.mark.parametrize("which", ["both", "left", "right"])
def test_it_is_the_kronecker_product_and_keeps_products(which: str) -> None:
    left, right = factors(4, 6)
    basis = Basis(24, "x")
    x, w = torch.randn(5, 7, 24, dtype=torch.float64), torch.randn(3, 24, dtype=torch.float64)
    assert not basis.changes and basis.of_weight(w) is w
    basis.set(left if which != "right" else None, right if which != "left" else None)
    first, second = (left if which != "right" else torch.eye(4)), (right if which != "left" else torch.eye(6))
    P = torch.kron(first.double(), second.double())
    torch.testing.assert_close(basis(x), x @ P)
    torch.testing.assert_close(basis.of_weight(w), w @ torch.linalg.inv(P).T)
    torch.testing.assert_close(basis(x) @ basis.of_weight(w).T, x @ w.T)
    torch.testing.assert_close(basis.back(basis.of_weight(w)), w)


def test_gradients_and_narrow_types_pass() -> None:
    left, right = factors(4, 6)
    x = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: kronecker(t, left.double(), right.double()), x)
    assert kronecker(torch.randn(2, 24).bfloat16(), left, right).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kronecker(torch.randn(2, 24), left, right).dtype == torch.float32


def test_factors_stay_float32_and_travel_with_the_state() -> None:
    left, right = factors(4, 6)
    basis, other = Basis(24, "x"), Basis(24, "y")
    basis.set(left, right)
    basis.half()
    assert basis.left is not None and basis.left.dtype == torch.float32
    other.load_state_dict(basis.state_dict())
    assert torch.equal(other.left, left) and torch.equal(other.right, right)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (torch.eye(5), None),
        (torch.ones(4, 6), None),
        (torch.zeros(4, 4), None),
        (torch.eye(4) * torch.nan, None),
        (torch.eye(4), torch.eye(4)),
        (torch.eye(24), torch.eye(24)),
    ],
)
def test_what_is_no_basis_is_refused(left: Tensor, right: Tensor | None) -> None:
    with pytest.raises(ReqatError, match="q_proj"):
        Basis(24, "q_proj input").set(left, right)
