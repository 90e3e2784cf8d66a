"""A basis: products stay, weights come back, and what is no basis is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from reqat.config.errors import ReqatError
from reqat.quant import Basis, inverse_transposed, kronecker, signs


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


def test_what_is_refused_changes_nothing() -> None:
    left, right = factors(4, 6)
    basis = Basis(24, "q_proj input")
    basis.set(left, right)
    for bad in (
        (torch.eye(4), torch.zeros(6, 6)),
        (torch.eye(4), torch.eye(4)),
        (torch.eye(4, dtype=torch.int64), None),
    ):
        with pytest.raises(ReqatError, match="q_proj input"):
            basis.set(*bad)
        with pytest.raises(ReqatError, match="q_proj input"):
            basis.load_state_dict({name: f for name, f in zip(("left", "right"), bad, strict=True) if f is not None})
        assert torch.equal(basis.left, left) and torch.equal(basis.right, right)  # type: ignore[arg-type]


def test_a_state_dict_of_factors_of_another_size_is_refused_by_a_fresh_basis() -> None:
    basis = Basis(24, "q_proj input")
    with pytest.raises(ReqatError, match="q_proj input.*4 x 4.*24"):
        basis.load_state_dict({"left": torch.eye(4), "right": torch.eye(4)})
    assert basis.left is None and basis.right is None


def test_signs_are_part_of_the_basis() -> None:
    left, right = factors(2, 8)
    x, w = torch.randn(5, 16, dtype=torch.float64), torch.randn(3, 16, dtype=torch.float64)
    for given in ((None, None), (left, right)):
        basis = Basis(16, "k", signs=3)
        basis.set(*given)
        P = torch.kron(
            *(torch.eye(n).double() if f is None else f.double() for n, f in zip((2, 8), given, strict=True))
        )
        P = P @ torch.diag(torch.where(signs(16, 3), -1.0, 1.0).double())
        assert basis.changes and basis.factored == (given[0] is not None)
        torch.testing.assert_close(basis(x), x @ P)
        torch.testing.assert_close(basis.of_weight(w), w @ torch.linalg.inv(P).T)
        torch.testing.assert_close(basis.back(basis.of_weight(w)), w)


def test_a_factor_is_inverted_once_and_again_when_it_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = factors(4, 6)
    basis, w = Basis(24, "x"), torch.randn(3, 24, dtype=torch.float64)
    basis.set(left, right)
    calls: list[int] = []

    def counting(factor: Tensor) -> Tensor:
        calls.append(len(factor))
        return inverse_transposed(factor)

    monkeypatch.setattr("reqat.quant.basis.inverse_transposed", counting)

    def check(inverted: list[int]) -> None:
        assert basis.left is not None and basis.right is not None
        P = torch.kron(basis.left.detach().double(), basis.right.detach().double())
        calls.clear()
        for _ in range(3):
            torch.testing.assert_close(basis.of_weight(w), w @ torch.linalg.inv(P).T)
        assert calls == inverted

    check([4, 6])
    check([])
    basis.set(left + torch.eye(4), right)
    check([4, 6])
    # A training step writes into the factor that is there.
    factor = basis.left
    assert factor is not None
    factor.requires_grad_()
    optimizer = torch.optim.AdamW([factor], lr=0.1)
    basis.of_weight(w).square().sum().backward()
    assert factor.grad is not None and float(factor.grad.abs().sum()) > 0
    optimizer.step()
    factor.requires_grad_(False)
    check([4])
    basis.load_state_dict({"left": left, "right": right})
    check([4, 6])
    copied = copy.deepcopy(basis)
    copied.set(right[:4, :4] + 3 * torch.eye(4), None)
    check([])
