"""Calibration of NN-LUT: networks learn on from what their inputs really are.

A table that was trained over the whole range of a function spends entries on inputs that a model never has. Unlabeled
activations are enough to mend that: the exact function says what the value should be. Each place in the model gets a
table of its own. Inferred: places of their own, the number of steps, and a tenth of the learning rate of training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

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
    """Name of a lookup -> its own table, for ``Replacement.set``.

    Args:
        networks: function -> its trained network, which all places of the function begin from.
        seen: of :func:`observe`; places that saw nothing, or whose function has no network, are left out.
        version: of :data:`VERSIONS`.
        steps, batch, lr: of :func:`.nn_lut.train`.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Evaluate] = {}
    for name, at in seen.items():
        function = at.function
        if function.name in networks and len(at.samples):
            start = networks[function.name]
            network = train(function, start, at.samples, generator, steps=steps, batch=batch, lr=lr, last_lr=lr / 100)
            found[name] = version(network.table(), function)
    return found
