"""What is said of a distribution, against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from reqat.decoding.distributions import entropy_nats, token_statistics


def reference(logits_NV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy, tail mass and probabilities in float64; the tail summed over all but the most likely."""
    p_NV = logits_NV.double().softmax(dim=-1)
    others_NV = p_NV.scatter(1, p_NV.argmax(dim=-1, keepdim=True), 0.0)
    tail_N = others_NV.sum(dim=-1)
    # log of the largest from the tail: of a p that rounds to 1 it would be 0, in float64 too
    entropy_N = torch.special.entr(others_NV).sum(dim=-1) - (1 - tail_N) * torch.log1p(-tail_N)
    return entropy_N, tail_N, p_NV


@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0, 40.0])
@pytest.mark.parametrize("size", [3, 41, 3000])
def test_statistics_equal_float64_in_relative_terms(scale: float, size: int) -> None:
    torch.manual_seed(size)
    logits = torch.randn(64, size) * scale
    found = token_statistics(logits, k=2)
    entropy, tail, p = reference(logits)
    # Every term of tail and entropy is positive or summed alike, so relative errors are a few float32 roundings of the
    # exponents' arguments: 2^-24 of up to 8 * 40, times a factor for the sum.
    bound = 16 * 2.0**-24 * max(1.0, 8 * scale)
    torch.testing.assert_close(found.tail_N.double(), tail, rtol=bound, atol=1e-37)
    torch.testing.assert_close(found.entropy_N.double(), entropy, rtol=bound, atol=1e-37)
    top = p.topk(2, dim=-1)
    assert torch.equal(found.top_NK, top.indices)
    torch.testing.assert_close(found.top_prob_NK.double(), top.values, rtol=bound, atol=1e-37)
    tokens = torch.randint(size, (64,))
    expected = p.gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(found.prob(logits, tokens).double(), expected, rtol=bound, atol=1e-37)


def test_a_tail_far_below_float32_resolution_of_one_is_kept() -> None:
    logits = torch.tensor([[30.0, 0.0, 0.0]])
    found = token_statistics(logits)
    tail = 2 * math.exp(-30)
    assert found.tail_N.item() == pytest.approx(tail, rel=1e-5)
    assert found.entropy_N.item() == pytest.approx(tail * 31, rel=1e-5)  # r + r * 30, to first order in r
    assert found.top_prob_NK.shape == (1, 3)  # no more than there are


def test_forbidden_tokens_are_no_fault_and_broken_rows_are_nan() -> None:
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor([[1.0, -inf, 0.0], [nan, 0.0, 0.0], [inf, 0.0, 0.0], [-inf, -inf, -inf], [0.0, 0.0, 0.0]])
    found = token_statistics(logits).entropy_N
    assert torch.isnan(found).tolist() == [False, True, True, True, False]
    expected, _, _ = reference(torch.tensor([[1.0, 0.0]]))
    assert found[0].item() == pytest.approx(expected.item(), rel=1e-6)
    assert found[4].item() == pytest.approx(math.log(3), rel=1e-6)


@pytest.mark.parametrize("vocabulary", [2, 260, 5000])
def test_entropy(vocabulary: int) -> None:
    logits_BV = (
        torch.randn(50, vocabulary, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 3, 50)[:, None]
    )
    p_BV = logits_BV.double().softmax(-1)
    expected_B = -torch.special.xlogy(p_BV, p_BV).sum(-1)
    # Sums of V float32 numbers of at most log V: a few ulps of it.
    bound = 16 * 2.0**-24 * max(1.0, np.log(vocabulary))
    assert (entropy_nats(logits_BV).double() - expected_B).abs().max() < bound
    masked_BV = logits_BV.clone()
    masked_BV[:, 0] = -torch.inf
    p_BV = masked_BV.double().softmax(-1)
    assert (entropy_nats(masked_BV) + torch.special.xlogy(p_BV, p_BV).sum(-1)).abs().max() < bound
    assert (entropy_nats(logits_BV) >= 0).all()
    # A sure row: float64 needs the same care, log(1 + r) + r * gap / (1 + r) for one other token.
    gap, r = 30.0, float(np.exp(-30.0))
    exact = np.log1p(r) + r * gap / (1 + r)
    assert float(entropy_nats(torch.tensor([[gap, 0.0]]))[0]) == pytest.approx(exact, rel=2.0**-20)
    assert entropy_nats(torch.zeros(1, vocabulary))[0] == pytest.approx(np.log(vocabulary), abs=bound)
    assert entropy_nats(torch.tensor([[torch.nan, 0.0], [torch.inf, 0.0], [-torch.inf, -torch.inf]])).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_is_one_entropy(dtype: torch.dtype) -> None:
    logits = (torch.randn(40, 300, generator=torch.Generator().manual_seed(1)) * 9).to(dtype)
    logits[:, ::3] = -torch.inf
    assert torch.equal(entropy_nats(logits), token_statistics(logits, k=3).entropy_N)
