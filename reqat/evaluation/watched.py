"""A measure of a model taken while it is trained: the training loop's observer.

What is reported is often the best value over a training (TSLD reports the best evaluation perplexity over its epochs).
Values stand in a file, so that a training that was killed and goes on has those from before; taken again they are the
same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reqat.config.errors import ReqatError
from reqat.config.files import read_json, write_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from reqat.data import AnyBatch


class Watched:
    """``measure(model)`` before every ``every``-th step of a training but the first: numbers whose sum is to be small,
    such as nats of each text. ``file`` keeps them by the number of steps done before."""

    def __init__(self, measure: Callable[[PreTrainedModel], Sequence[float]], every: int, file: Path) -> None:
        self.measure, self.every, self.file = measure, every, file
        self.values: dict[int, list[float]] = {}
        if file.is_file():
            stored = read_json(file, "values measured during a training", "delete that file and run again")
            self.values = {int(step): [float(value) for value in values] for step, values in stored.items()}

    def __call__(self, model: PreTrainedModel, batch: AnyBatch, step: int, loss: Callable[[], Tensor]) -> None:
        """See :class:`reqat.training.Observer`."""
        if step and step % self.every == 0:
            self.at(model, step)

    def at(self, model: PreTrainedModel, step: int) -> None:
        """Measure after ``step`` steps, unless that is done. The random state stays as it is."""
        if step in self.values:
            return
        with torch.random.fork_rng([]):
            self.values[step] = [float(value) for value in self.measure(model)]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.file, json.dumps({str(key): values for key, values in self.values.items()}) + "\n")

    @property
    def lowest(self) -> int:
        """The number of steps after which the sum was smallest, the first of several. Raises ReqatError before
        anything was measured."""
        if not self.values:
            raise ReqatError(f"{self.file}: nothing was measured; call at() at the end of the training")
        return min(sorted(self.values), key=lambda step: sum(self.values[step]))
