"""The channel search: costs by brute force, its parts by torch's own, and that a budget is kept."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reqat.config.channels import ChannelSearch, ImageTraining
from reqat.config.errors import ReqatError
from reqat.data.images import digits
from reqat.methods.channels.search import Layer, SuperNet, cost_loss, options_of, search_channels, select_two, stretch
from reqat.methods.channels.widths import (
    budget_of,
    expected_cost,
    preferred,
    random_widths,
    uniform_widths,
    within,
)
from reqat.methods.pact_sawb import put_in_bits
from reqat.models.resnet import Cost, ResNet, ResNetConfig, cost

CONFIG = ResNetConfig(8, (8,), side=8)


def settings(**more: object) -> ChannelSearch:
    given = {
        "weights": ImageTraining(epochs=1, rows_per_batch=16, lr=0.05),
        "shares": (0.5, 0.75, 1.0),
        "most": 1.5,
        "step": 0.25,
    }
    return ChannelSearch(**{**given, **more})


def unquantized(model: ResNet) -> None:
    """The search in full precision."""


def test_expected_costs_are_the_mean_over_all_networks() -> None:
    """Every choice of every layer, weighted by its probability; the third block's input is the widest of two layers."""
    rng = np.random.default_rng(0)
    config = ResNetConfig(8, (3, 4, 5, 4, 6, 3, 4), side=4)
    options = [[2, 5], [1, 4], [3, 4, 7], [2, 3], [6], [1, 2], [3, 8]]
    p = [rng.dirichlet(np.ones(len(widths))) for widths in options]
    macs = parameters = 0.0
    for choice in itertools.product(*(range(len(widths)) for widths in options)):
        share = math.prod(p[layer][i] for layer, i in enumerate(choice))
        found = cost(config, [options[layer][i] for layer, i in enumerate(choice)])
        macs, parameters = macs + share * found.macs, parameters + share * found.parameters
    widths = [torch.tensor(w, dtype=torch.float64) for w in options]
    mean = expected_cost(config, widths, [torch.tensor(q) for q in p])
    assert float(mean.macs) == pytest.approx(macs, rel=1e-9)
    assert float(mean.parameters) == pytest.approx(parameters, rel=1e-9)
    logits = [torch.tensor(np.log(q), requires_grad=True) for q in p if len(q) > 1][:3]

    def of(*three: torch.Tensor) -> torch.Tensor:
        given = iter(three)
        return expected_cost(
            config, widths, [torch.softmax(next(given, torch.zeros(len(w), dtype=torch.float64)), -1) for w in widths]
        ).macs

    assert torch.autograd.gradcheck(of, logits)


@pytest.mark.parametrize(("old", "new"), [(2, 2), (2, 5), (3, 4), (5, 8), (7, 16), (1, 6)])
def test_stretching_is_adaptive_average_pooling_along_channels(old: int, new: int) -> None:
    x = torch.randn(2, old, 3, 4)
    expected = F.adaptive_avg_pool1d(x.permute(0, 2, 3, 1).flatten(1, 2), new).unflatten(1, (3, 4)).permute(0, 3, 1, 2)
    torch.testing.assert_close(stretch(x, new), expected)


def test_a_layer_is_the_weighted_sum_of_its_options() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3, padding=1, bias=False)
    layer, x, weights = Layer(conv, [2, 3, 6, 8]), torch.randn(5, 3, 4, 4), torch.tensor([0.3, 0.7])
    small = nn.Conv2d(3, 6, 3, padding=1, bias=False)
    with torch.no_grad():
        small.weight.copy_(conv.weight[:6, :3])
    y = small(x)
    wide, narrow = nn.BatchNorm2d(6)(y), nn.BatchNorm2d(2)(y[:, :2])
    expected = 0.3 * narrow[:, [0, 0, 0, 1, 1, 1]] + 0.7 * wide
    torch.testing.assert_close(layer(x, [0, 2], weights), expected, rtol=1e-5, atol=1e-5)


def test_draws_follow_the_preferences_and_carry_their_gradient() -> None:
    """Cold, the heavier of the two drawn is Gumbel's maximum, which has the softmax's distribution."""
    generator = torch.Generator().manual_seed(0)
    logits, n = torch.tensor([0.0, 1.0, -1.0, 0.5]), 1000
    counts = torch.zeros(4)
    for _ in range(n):
        drawn, weights = select_two(logits, 0.05, generator)
        assert len(set(drawn)) == 2 and float(weights.sum()) == pytest.approx(1)
        counts[drawn[int(weights.argmax())]] += 1
    p = torch.softmax(logits, -1)
    assert ((counts / n - p).abs() < 4 * (p * (1 - p) / n).sqrt()).all()
    leaf = logits.clone().requires_grad_()
    drawn, weights = select_two(leaf, 1.0, generator)
    weights[0].backward()
    assert leaf.grad[drawn[0]] > 0 > leaf.grad[drawn[1]]
    assert select_two(torch.zeros(1), 1.0, generator)[0] == [0]


def test_with_one_option_a_layer_the_supernet_is_that_network() -> None:
    net = SuperNet(CONFIG, settings(), unquantized, seed=0)
    net.open = [1] * len(net.open)
    narrow = ResNetConfig(8, [widths[0] for widths in net.options], side=8)
    model, x = ResNet(narrow), torch.randn(6, 1, 8, 8)
    places = [model.stem, *(conv for block in model.blocks for conv in (block.conv1, block.conv2))]
    with torch.no_grad():
        shortcuts = [(s.conv, b.shortcut) for s, b in zip(net.shortcuts, model.blocks, strict=True) if b.shortcut]
        for wide, conv in [*((layer.conv, conv) for layer, conv in zip(net.layers, places, strict=True)), *shortcuts]:
            conv.weight.copy_(wide.weight[: conv.out_channels, : conv.in_channels])
        model.head.weight.copy_(net.head.weight[:, : model.head.in_features])
        model.head.bias.copy_(net.head.bias)
    model.train()
    torch.testing.assert_close(net(x, 1.0), model(x).logits, rtol=1e-4, atol=1e-5)


def test_a_layer_grows_when_its_widest_option_is_preferred_and_only_then() -> None:
    net = SuperNet(CONFIG, settings(threshold=0.6), put_in_bits, seed=0)
    assert [widths[n - 1] for widths, n in zip(net.options, net.open, strict=True)] == CONFIG.widths
    before = net.probabilities()
    with torch.no_grad():
        net.alphas[2][net.open[2] - 1] = 3.0
        net.alphas[3][0] = 9.0  # sure, of its narrowest
    assert net.expand(0.6) == [2]
    assert net.open_options()[2][-1] > CONFIG.widths[2] and len(net.probabilities()[2]) == len(before[2]) + 1
    assert net.alphas[2][net.open[2] - 1] == 3.0
    assert net(torch.randn(16, 1, 8, 8), 1.0).shape == (16, 10)
    with torch.no_grad():
        for _ in range(20):  # never beyond the most
            net.alphas[2][net.open[2] - 1] += 9
            net.expand(0.6)
    assert net.open_options()[2][-1] == net.options[2][-1] <= 1.5 * CONFIG.widths[2]
    assert SuperNet(CONFIG, settings(threshold=None), unquantized, seed=0).options == [
        options_of(width, (0.5, 0.75, 1.0)) for width in CONFIG.widths
    ]


def test_the_cost_loss_pushes_towards_the_budget() -> None:
    net = SuperNet(CONFIG, settings(), unquantized, seed=0)

    def after_a_step(budget: Cost) -> tuple[float, float]:
        before = float(net.expected().macs.detach())
        gradients = torch.autograd.grad(cost_loss(net, budget), net.alphas)
        with torch.no_grad():
            for alpha, gradient in zip(net.alphas, gradients, strict=True):
                alpha -= 0.1 * gradient
        return before, float(net.expected().macs.detach())

    own = cost(CONFIG, net.widths())
    before, after = after_a_step(Cost(0.5 * own.macs, own.parameters))
    assert after < before
    own = cost(CONFIG, net.widths())
    before, after = after_a_step(Cost(2 * own.macs, own.parameters))
    assert after > before
    own = cost(CONFIG, net.widths())
    assert float(cost_loss(net, Cost(own.macs * 1.01, own.parameters * 1.01)).detach()) == 0


def test_the_preferred_widths_are_kept_where_they_fit_and_else_brought_to_the_budget() -> None:
    rng = np.random.default_rng(1)
    options = [options_of(width, (0.25, 0.5, 0.75, 1.0, 1.25)) for width in CONFIG.widths]
    for share in (0.3, 0.6, 0.9, 2.0):
        budget = budget_of(CONFIG, share, share)
        log_p = [np.log(rng.dirichlet(np.ones(len(widths)))) for widths in options]
        best = [widths[int(p.argmax())] for widths, p in zip(options, log_p, strict=True)]
        found = preferred(CONFIG, options, log_p, budget)
        spent, wanted = cost(CONFIG, found), cost(CONFIG, best)
        assert within(spent, budget)
        assert found == best or not (within(wanted, budget) and wanted.macs >= 0.95 * budget.macs)
        wider = [
            [*found[:layer], width, *found[layer + 1 :]]
            for layer, widths in enumerate(options)
            for width in widths
            if width > found[layer]
        ]
        assert spent.macs >= 0.95 * budget.macs or not any(within(cost(CONFIG, one), budget) for one in wider)
    # Sure of all but one layer, that one gives way.
    sure = [np.log([0.01] * (len(widths) - 1) + [0.96]) for widths in options]
    sure[3] = np.log(np.full(len(options[3]), 1 / len(options[3])) + np.arange(len(options[3])) * 1e-6)
    widest = [widths[-1] for widths in options]
    budget = Cost(0.95 * cost(CONFIG, widest).macs, cost(CONFIG, widest).parameters)
    found = preferred(CONFIG, options, sure, budget)
    assert [new < old for new, old in zip(found, widest, strict=True)] == [layer == 3 for layer in range(7)]


def test_uniform_and_random_widths_use_the_budget_up() -> None:
    config = ResNetConfig(20, (16,), side=28)
    budget = budget_of(config, 0.7, 0.8)
    uniform = uniform_widths(config, budget)
    assert within(cost(config, uniform), budget) and cost(config, uniform).macs > 0.9 * budget.macs
    drawn = [random_widths(config, budget, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for widths in drawn:
        assert within(cost(config, widths), budget) and cost(config, widths).macs > 0.95 * budget.macs


def test_a_constraint_that_nothing_meets_is_refused() -> None:
    images = digits()
    for more, says in (({"macs": 0.05}, "multiplications"), ({"parameters": 0.05}, "parameters")):
        with pytest.raises(ReqatError, match=f"{says}.*narrowest"):
            search_channels(CONFIG, images, settings(**more), unquantized, seed=0)
    with pytest.raises(ReqatError, match="multiplications"):
        uniform_widths(CONFIG, Cost(10, 10**9))
    with pytest.raises(ReqatError, match="parameters"):
        random_widths(CONFIG, budget_of(CONFIG, 2.0, 0.2), seed=0)
    with pytest.raises(ReqatError, match="too few"):
        search_channels(CONFIG, images.take(torch.arange(20)), settings(), unquantized, seed=0)


def test_a_search_is_a_function_of_its_seed_and_keeps_to_its_budget() -> None:
    images = digits().take(torch.arange(96))
    weights = ImageTraining(epochs=2, rows_per_batch=16)
    asked = settings(weights=weights, macs=0.8, parameters=0.8, alpha_lr=0.1, threshold=0.34)
    found = [search_channels(CONFIG, images, asked, put_in_bits, seed=3) for _ in range(2)]
    assert found[0] == found[1] and len(found[0].history) == 2
    assert within(cost(CONFIG, found[0].widths), budget_of(CONFIG, 0.8, 0.8))
    assert all(width in widths for width, widths in zip(found[0].widths, found[0].options, strict=True))
