"""SEM's weights, value and gradient against naive float64 autograd, numpy's percentile and finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from reqat.config.errors import ReqatError
from reqat.methods.terms.sem import SEM, sem_weights, token_entropies, weighted_entropy_sum
from reqat.training.objective import NLL, Objective, TermContext


def naive(logits: torch.Tensor, percentile: float = 0.75, eps: float = 1e-12, binary: bool = False) -> torch.Tensor:
    """The formula as it is written, in float64, differentiated by autograd."""
    p = logits.double().softmax(-1)
    H = -(p * p.log()).sum(-1)
    constants = H.detach().numpy()
    tau, H_min = float(np.quantile(constants, percentile)), float(constants.min())
    if binary:
        w = torch.from_numpy((constants < tau).astype(float))
    else:
        w = torch.from_numpy(np.maximum(0, 1 - (constants - H_min) / (tau - H_min + eps)))
    return (w * H).sum()


def context(logits: torch.Tensor) -> TermContext:
    return TermContext(logits=logits, labels=torch.zeros(logits.shape[0], dtype=torch.long))


@pytest.fixture
def logits() -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    spread = torch.linspace(0.1, 6, 41)[torch.randperm(41, generator=g)]
    return torch.randn(41, 97, generator=g) * spread[:, None]


@pytest.mark.parametrize("percentile", [0.0, 0.3, 0.75, 1.0])
@pytest.mark.parametrize("binary", [False, True])
def test_value_and_gradient_match_naive_float64(logits, percentile, binary):
    ours = logits.clone().requires_grad_()
    reference = logits.double().requires_grad_()
    value = SEM(percentile=percentile, binary=binary)(context(ours))
    expected = naive(reference, percentile=percentile, binary=binary)
    value.backward()
    if expected.requires_grad and float(expected.detach()) != 0:
        expected.backward()
        torch.testing.assert_close(ours.grad, reference.grad.float(), rtol=2e-5, atol=2e-7)
    else:
        assert not ours.grad.any()
    torch.testing.assert_close(value, expected.float(), rtol=1e-5, atol=1e-6)


def test_gradient_matches_finite_differences_with_weights_held():
    z = torch.randn(7, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3
    weights = sem_weights(token_entropies(z.log_softmax(-1)))

    def f(x):
        return weighted_entropy_sum(x.log_softmax(-1), weights)

    assert torch.autograd.gradcheck(f, z.requires_grad_(), eps=1e-6, atol=1e-8)


def test_weights_are_one_at_the_minimum_zero_from_tau_on_and_linear_between():
    H = torch.tensor([0.0, 0.5, 1.0, 2.0, 4.0], dtype=torch.float64)  # type-7 quantile: tau = 2.0
    torch.testing.assert_close(sem_weights(H), torch.tensor([1, 0.75, 0.5, 0, 0], dtype=torch.float64))
    assert sem_weights(H, binary=True).tolist() == [1, 1, 1, 0, 0]


def test_percentile_interpolates_linearly():
    H = torch.tensor([0.0, 1.0, 3.0, 10.0], dtype=torch.float64)  # position 2.25: tau = 3 + 0.25 * 7
    tau = float(np.quantile(H.numpy(), 0.75))
    assert tau == 4.75
    torch.testing.assert_close(sem_weights(H)[2], torch.tensor(1 - 3 / 4.75, dtype=torch.float64))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 41])
@pytest.mark.parametrize("percentile", [0.0, 0.3, 0.75, 1.0])
def test_released_tau_is_an_order_statistic(n, percentile):
    H = torch.rand(n, generator=torch.Generator().manual_seed(n)).double()
    ordered = sorted(H.tolist())
    tau = ordered[max(1, math.floor(percentile * n)) - 1]
    expected = [max(0, 1 - (h - ordered[0]) / (tau - ordered[0] + 1e-12)) for h in H.tolist()]
    found = sem_weights(H, percentile=percentile, tau="released")
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert sem_weights(H, percentile=percentile, tau="released", binary=True).tolist() == [h < tau for h in H.tolist()]


def test_parts_of_a_minibatch_sum_to_the_whole(logits):
    whole = SEM().within(token_entropies(logits.log_softmax(-1)))
    parts = sum(whole(context(part)) for part in logits.split(10))
    torch.testing.assert_close(parts, SEM()(context(logits)))
    assert whole.within(torch.zeros(0)) is whole
    with pytest.raises(ReqatError, match="released"):
        SEM(tau="text")


def test_no_gradient_through_weights():
    """Were w differentiated there would be dw/dH terms; held, the gradient is w_t times that of H_t alone."""
    z = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    weighted_entropy_sum(z.log_softmax(-1), sem_weights(token_entropies(z.log_softmax(-1)))).backward()
    p = z.detach().softmax(-1)
    H = -(p * p.log()).sum(-1, keepdim=True)
    w = sem_weights(H[:, 0])[:, None]
    torch.testing.assert_close(z.grad, -w * p * (p.log() + H))


def test_equal_entropies_one_token_and_none():
    flat = torch.zeros(6, 8)
    value = SEM()(context(flat.requires_grad_()))
    assert math.isclose(float(value.detach()), 6 * math.log(8), rel_tol=1e-6)  # tau = H_min: every weight is 1
    assert SEM(binary=True)(context(flat)).item() == 0
    one = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
    torch.testing.assert_close(SEM()(context(one)), naive(one).float())
    empty = torch.zeros(0, 8, requires_grad=True)
    nothing = SEM()(context(empty))
    nothing.backward()
    assert nothing.item() == 0 and empty.grad.shape == (0, 8)


def test_extreme_and_excluded_logits_stay_finite():
    z = torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, -math.inf], [300.0, 299.0, -300.0]], requires_grad=True)
    H = token_entropies(z.log_softmax(-1))
    sigmoid = 1 / (1 + math.exp(-1))
    binary = -(sigmoid * math.log(sigmoid) + (1 - sigmoid) * math.log(1 - sigmoid))
    torch.testing.assert_close(H, torch.tensor([0.0, math.log(2), binary]))
    SEM(percentile=1.0)(context(z)).backward()
    assert torch.isfinite(z.grad).all()


def test_two_chunked_sweeps_equal_one(logits):
    log_probs = logits.log_softmax(-1)
    chunks = log_probs.split(10)
    weights = sem_weights(torch.cat([token_entropies(c) for c in chunks]))
    total = sum(weighted_entropy_sum(c, w) for c, w in zip(chunks, weights.split(10), strict=True))
    torch.testing.assert_close(total, SEM()(context(logits)))


def test_diverged_model_and_bad_options_are_refused():
    with pytest.raises(ValueError, match="1 of 2 .*not finite"):
        SEM()(context(torch.tensor([[0.0, math.nan], [0.0, 1.0]])))
    for options in ({"percentile": 1.5}, {"percentile": math.nan}, {"weight": -1.0}, {"eps": 0.0}):
        with pytest.raises(ValueError, match="SEM"):
            SEM(**options)


def test_objective_adds_it_to_the_likelihood(logits):
    total, sums = Objective((NLL(), SEM(weight=0.5)))(context(logits))
    assert list(sums) == ["nll", "sem"]
    torch.testing.assert_close(total.item(), sums["nll"] + 0.5 * sums["sem"], rtol=1e-6, atol=0)
