"""Sampling against transformers' warpers, token by token, and its random numbers against known values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from reqat.generation import sampling
from reqat.generation.sampling import greedy_tokens, random_bits, row_state, sample_tokens, uniforms


def states(n: int) -> np.ndarray:
    return np.array([row_state(seed=7, row_key=f"row {i}") for i in range(n)], dtype=np.uint64)


def transformers_probabilities(logits_BV: Tensor, temperature: float, top_p: float) -> Tensor:
    """What transformers would sample from, float64 [B, V]; exactly 0 outside the support."""
    ids = torch.zeros(len(logits_BV), 1, dtype=torch.long)
    scores = TemperatureLogitsWarper(temperature)(ids, logits_BV)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(ids, scores)
    return scores.double().softmax(-1)


def test_splitmix64_known_values() -> None:
    # The published first outputs of SplitMix64 for the states 1234567 and 0.
    bits = random_bits(np.array([1234567, 0], dtype=np.uint64), 0, 5)
    assert bits[:, 0].tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert bits[0, 1] == 0xE220A8397B1DCDAF


def test_random_numbers_belong_to_row_and_step() -> None:
    some = states(40)
    whole = uniforms(some, 0, 30)
    assert torch.equal(uniforms(some[[5, 31]], 12, 9), whole[12:21][:, [5, 31]])
    assert float(whole.min()) >= 0 and float(whole.max()) < 1
    assert row_state(1, "a") != row_state(2, "a") != row_state(2, "b")


def test_random_numbers_are_uniform_and_uncorrelated() -> None:
    u = uniforms(states(300), 0, 300).double().numpy()
    assert stats.kstest(u.ravel(), "uniform").pvalue > 1e-3
    limit = 4.5 / np.sqrt(u[1:].size)
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < limit


LOGITS = {
    "peaked": (lambda g: torch.randn(20, 50, generator=g) * 4),
    "flat": (lambda g: torch.randn(20, 50, generator=g) * 0.2),
    "ties": (lambda g: (torch.randn(20, 50, generator=g) * 2).round()),
    "forbidden": (
        lambda g: torch.randn(20, 50, generator=g).masked_fill(torch.rand(20, 50, generator=g) < 0.8, -torch.inf)
    ),
    "one allowed": (lambda g: torch.full((3, 50), -torch.inf).scatter(1, torch.tensor([[0], [49], [20]]), 1.5)),
    "large vocabulary": (lambda g: torch.randn(8, 3000, generator=g) * 4),
    "large vocabulary, flat": (lambda g: torch.randn(8, 3000, generator=g) * 0.1),
    "large vocabulary, ties": (lambda g: (torch.randn(8, 3000, generator=g) * 4).round()),
    "large vocabulary, forbidden": (
        lambda g: torch.randn(8, 3000, generator=g).masked_fill(torch.rand(8, 3000, generator=g) < 0.995, -torch.inf)
    ),
    "large vocabulary, mixed": (lambda g: torch.randn(8, 3000, generator=g) * torch.linspace(0.1, 6, 8)[:, None]),
}


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize(("temperature", "top_p"), [(0.6, 0.95), (1.0, 0.5), (1.3, 0.999), (0.7, 1.0)])
def test_inverse_cdf_of_transformers_distribution(kind: str, temperature: float, top_p: float) -> None:
    """The uniform in the middle of a token's share gives that token: support, probabilities and order all at once."""
    logits = LOGITS[kind](torch.Generator().manual_seed(5))
    # Which of equal logits fall outside top-p, transformers leaves to an unstable sort. A slope far below float32's
    # resolution makes it keep the higher ids, as we do.
    slope = 1e-10 * torch.arange(logits.shape[1]).double() if "ties" in kind else 0
    expected = transformers_probabilities(logits + slope, temperature, top_p)
    rows, middles, tokens = [], [], []
    for row, probability in enumerate(expected):
        # Ascending scores, ties by ascending id; the natural order where nothing has to be cut off.
        order = torch.sort(logits[row], stable=True).indices if top_p < 1 else torch.arange(len(probability))
        share = probability[order]
        middle = share.cumsum(0) - share / 2
        wide = (share > 2e-6).nonzero()[:, 0]  # not narrower than what a float32 sum can tell apart
        assert len(wide) > 0
        checked = torch.cat([wide[:20], wide[-20:]]).unique()  # the edge of the support, and its likeliest tokens
        rows += [row] * len(checked)
        middles.append(middle[checked])
        tokens.append(order[checked])
    found = sample_tokens(logits[rows], torch.cat(middles).float(), temperature, top_p)
    assert torch.equal(found, torch.cat(tokens))
    # And no uniform, however extreme, leaves the support.
    for extreme in (0.0, 2.0**-24, 1 - 2.0**-24):
        edge = sample_tokens(logits, torch.full((len(logits),), extreme), temperature, top_p)
        assert (expected.gather(1, edge[:, None]) > 0).all()


@pytest.mark.parametrize(("vocabulary", "top_p"), [(30, 0.9), (30, 1.0), (800, 0.6)])
def test_frequencies_match_transformers(vocabulary: int, top_p: float) -> None:
    logits = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(1)) * 1.5
    n = 20_000
    found = sample_tokens(logits.expand(n, -1), uniforms(states(n), 3, 1)[0], 0.8, top_p)
    expected = transformers_probabilities(logits, 0.8, top_p)[0].numpy() * n
    counts = np.bincount(found.numpy(), minlength=vocabulary)
    assert counts[expected == 0].sum() == 0
    often = expected >= 5
    rest = [[counts[~often].sum()], [expected[~often].sum()]] if expected[~often].sum() > 0 else [[], []]
    assert stats.chisquare(np.r_[counts[often], rest[0]], np.r_[expected[often], rest[1]]).pvalue > 1e-3


@pytest.mark.parametrize("vocabulary", [50, 3000])
def test_a_row_depends_on_no_other_row(vocabulary: int) -> None:
    """Also where some rows are settled by their best token, some by candidates and some by a full sort."""
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(60, vocabulary, generator=g) * torch.linspace(0.1, 8, 60)[:, None]
    u = torch.rand(60, generator=g)
    together = sample_tokens(logits, u, 0.6, 0.95)
    for row in range(60):
        assert sample_tokens(logits[row : row + 1], u[row : row + 1], 0.6, 0.95)[0] == together[row]


def test_candidates_agree_with_the_full_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(4)
    logits = torch.randn(400, 700, generator=g) * 3
    u = torch.rand(400, generator=g)
    with_candidates = sample_tokens(logits, u, 0.6, 0.95)
    monkeypatch.setattr(sampling, "_SORT_ALL_UP_TO", 10_000)
    assert torch.equal(with_candidates, sample_tokens(logits, u, 0.6, 0.95))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite(bad: float) -> None:
    logits = torch.zeros(3, 8)
    logits[1, 2] = bad
    for choose in (greedy_tokens, lambda x: sample_tokens(x, torch.rand(3), 0.6, 0.95)):
        with pytest.raises(ValueError, match=r"1 of 3 rows.*(nan|inf).*row 1"):
            choose(logits)
    with pytest.raises(ValueError, match="-inf"):
        greedy_tokens(torch.full((2, 4), -torch.inf))
