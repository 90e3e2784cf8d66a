"""Calibration of NN-LUT: networks learn on from what their inputs really are.

A table that was trained over the whole range of a function spends entries on inputs that a model never has. Unlabeled
activations are enough to mend that: the exact function says what the value should be. Each place in the model gets a
table of its own. Inferred: places of their own, the number of steps, a tenth of the learning rate of training, and what
a place learns from: half of it inputs as often as they occur, half numbers spread over the range that occurs.

Without that second half calibration does harm to decoders. The mean absolute error hardly sees an input that is one in
some hundred, so a network gives it up to be a little better elsewhere; but such are the mean squares at a text's first
token, which most heads attend to (docs/companions/nnlut.md has numbers).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from reqat.methods.nonlinear._function import Evaluate, Function
from reqat.methods.nonlinear._replace import Seen
from reqat.methods.nonlinear._table import Table
from reqat.methods.nonlinear.nn_lut import BATCH, LR, Network, train

STEPS = 300


def calibrated(
    networks: Mapping[str, Network],
    seen: Mapping[str, Seen],
    version: Callable[[Table, Function], Evaluate],
    *,
    steps: int = STEPS,
    batch: int = BATCH // 4,
    lr: float = LR / 10,
    seed: int = 0,
) -> dict[str, Evaluate]:
    """Name of a lookup -> its own table, for ``Replacement.set``. A place whose mean absolute error over
    :func:`learned_from` did not fall keeps the table that it began with.

    Args:
        networks: function -> its trained network, which all places of the function begin from.
        seen: of one call of :func:`observe`; places that saw nothing, or whose function has no network, are left out.
        version: of :data:`VERSIONS`.
        steps, batch, lr: of :func:`.nn_lut.train`.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Evaluate] = {}
    for name, start in networks.items():
        places = {place: at for place, at in seen.items() if at.function.name == name and len(at.samples)}
        if not places:
            continue
        function = next(iter(places.values())).function
        x_PS = torch.stack([learned_from(at) for at in places.values()])
        before = Network(*(w.float().repeat(len(places), 1) for w in (start.inner, start.bias, start.outer)))
        after = train(function, before, x_PS, generator, steps=steps, batch=batch, lr=lr, last_lr=lr / 100)
        for i, place in enumerate(places):
            own = Network(after.inner[i], after.bias[i], after.outer[i])
            better = _error(own, function, x_PS[i]) < _error(start, function, x_PS[i])
            found[place] = version((own if better else start).table(), function)
    return found


def learned_from(at: Seen) -> Tensor:
    """What the table of a place learns from, [2 S] float32: its S samples, and S numbers between the lowest and the
    highest input, spread as the function's training has them."""
    function = replace(at.function, low=at.low, high=at.high)
    ends = torch.tensor([at.low, at.high], dtype=torch.float64)
    x = torch.cat([ends[:1], function.samples(len(at.samples)), ends[1:]])  # there may be no FP16 number between them
    picked = torch.linspace(0, len(x) - 1, len(at.samples)).round().long()
    return torch.cat([at.samples, x[picked].float()])


def _error(network: Network, function: Function, x: Tensor) -> float:
    return float((network(x) - function(x)).abs().mean())
