"""Widths of a network within a budget: uniform, random, and the options that a search prefers.

A budget is a most of multiplications and of parameters (:class:`reqat.models.resnet.Cost`). All of these give networks
that keep within it and come near it in multiplications, so that what is compared differs in where channels are, not in
how many operations they cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from reqat.config.errors import ReqatError
from reqat.models.resnet import Cost, Product, ResNetConfig, cost, products, total

# Of the random factors of widths: from half to one and a half times the common one.
_SPREAD = (0.5, 1.5)
_TRIES = 300


def within(found: Cost, budget: Cost) -> bool:
    """Whether a cost keeps to a budget."""
    return bool(found.macs <= budget.macs and found.parameters <= budget.parameters)


def budget_of(config: ResNetConfig, macs: float, parameters: float) -> Cost:
    """The budget that is these shares of the cost of ``config``."""
    own = cost(config)
    return Cost(macs * own.macs, parameters * own.parameters)


def scaled(widths: Sequence[float], factor: float) -> list[int]:
    """Every width times a factor, to the nearest channel, one at least."""
    return [max(1, round(width * factor)) for width in widths]


def uniform_widths(config: ResNetConfig, budget: Cost) -> list[int]:
    """The widths of ``config`` times the largest common factor within the budget. Raises ReqatError if a single channel
    a layer exceeds it."""
    return _largest(config, budget, config.widths)


def random_widths(config: ResNetConfig, budget: Cost, seed: int, tolerance: float = 0.05) -> list[int]:
    """The widths of ``config`` times independent uniform factors, and these times a common one that brings them near
    the budget: within it, and above ``1 - tolerance`` of its multiplications.

    Raises ReqatError if three hundred draws find none (parameters may leave no room for the multiplications).
    """
    rng = np.random.default_rng(seed)
    for _ in range(_TRIES):
        each = [w * f for w, f in zip(config.widths, rng.uniform(*_SPREAD, len(config.widths)), strict=True)]
        widths = _largest(config, budget, each)
        if cost(config, widths).macs >= (1 - tolerance) * budget.macs:
            return widths
    raise ReqatError(
        f"no random widths of {_TRIES} have at most {budget.parameters:,.0f} parameters and nearly {budget.macs:,.0f} "
        "multiplications; allow more parameters, or fewer multiplications."
    )


def _largest(config: ResNetConfig, budget: Cost, widths: Sequence[float]) -> list[int]:
    """The widths times the largest factor whose cost is within the budget, by bisection."""
    low, high = 0.0, 1.0
    check_reachable(config, scaled(widths, low), budget)
    while within(cost(config, scaled(widths, high)), budget):
        low, high = high, 2 * high
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if within(cost(config, scaled(widths, middle)), budget) else (low, middle)
    return scaled(widths, low)


def check_reachable(config: ResNetConfig, narrowest: Sequence[int], budget: Cost) -> None:
    """Raise ReqatError unless the narrowest network keeps to the budget."""
    least = cost(config, narrowest)
    for what, needed, allowed in (
        ("multiplications", least.macs, budget.macs),
        ("parameters", least.parameters, budget.parameters),
    ):
        if needed > allowed:
            raise ReqatError(
                f"no network meets the constraint of {allowed:,.0f} {what}: the narrowest one, {list(narrowest)}, has "
                f"{needed:,.0f}; raise the constraint, or allow narrower options."
            )


def preferred(
    config: ResNetConfig,
    options: Sequence[Sequence[int]],
    log_p: Sequence[np.ndarray],
    budget: Cost,
    tolerance: float = 0.05,
) -> list[int]:
    """The most probable option of each layer, brought to the budget: where these exceed it, narrower ones in the layers
    where that gives up the least log-probability for the cost that it saves; where they leave more than ``tolerance``
    of its multiplications unused, wider ones likewise, as long as one fits (both greedily: inferred).

    ``options``: ascending widths of each layer; ``log_p``: their log-probabilities. Raises ReqatError if the narrowest
    exceed the budget.
    """
    check_reachable(config, [widths[0] for widths in options], budget)
    at = [int(np.argmax(p)) for p in log_p]

    def moved(layer: int, option: int) -> list[int]:
        return [*at[:layer], option, *at[layer + 1 :]]

    def spent(choice: Sequence[int]) -> Cost:
        return cost(config, [widths[i] for widths, i in zip(options, choice, strict=True)])

    def excess(choice: Sequence[int]) -> float:
        found = spent(choice)
        pairs = ((found.macs, budget.macs), (found.parameters, budget.parameters))
        return sum(max(0.0, math.log(value / allowed)) for value, allowed in pairs)

    def given_up(layer: int, option: int) -> float:
        return max(0.0, float(log_p[layer][at[layer]] - log_p[layer][option]))

    while (now := excess(at)) > 0:  # each layer's own product shrinks with it, so something always saves
        moves = [
            (given_up(layer, option) / (now - excess(moved(layer, option))), layer, option)
            for layer, chosen in enumerate(at)
            for option in range(chosen)
        ]
        _, layer, option = min(moves)
        at = moved(layer, option)
    while (now := spent(at).macs) < (1 - tolerance) * budget.macs:
        moves = [
            (given_up(layer, option) / (spent(moved(layer, option)).macs - now), layer, option)
            for layer, chosen in enumerate(at)
            for option in range(chosen + 1, len(options[layer]))
            if within(spent(moved(layer, option)), budget)
        ]
        if not moves:
            break
        _, layer, option = min(moves)
        at = moved(layer, option)
    return [widths[i] for widths, i in zip(options, at, strict=True)]


def expected_cost(
    config: ResNetConfig | Sequence[Product], options: Sequence[Tensor], probabilities: Sequence[Tensor]
) -> Cost:
    """The mean cost of networks whose layers choose among ``options`` (widths, [n] each) with ``probabilities``,
    independently; scalars, differentiable by the probabilities.

    Exact: the two factors of a product belong to different layers, so the mean of the product is that of their means,
    and the widest of several layers has a distribution function that is the product of theirs.
    """
    parts = products(config) if isinstance(config, ResNetConfig) else config

    def mean(layers: tuple[int, ...]) -> Tensor:
        if len(layers) == 1:
            return (options[layers[0]] * probabilities[layers[0]]).sum()
        grid = torch.cat([options[layer] for layer in layers]).unique()
        below = [(options[layer] <= grid[:, None]).to(grid.dtype) @ probabilities[layer] for layer in layers]
        at_most = torch.stack(below).prod(0)
        return (grid * torch.diff(at_most, prepend=at_most.new_zeros(1))).sum()

    return total(parts, mean)
