"""Running models in evaluation mode for a while."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

_LOCK = threading.Lock()
# Of each model that is being evaluated: by how many, and whether each of its modules was in training mode before.
_EVALUATED: WeakKeyDictionary[nn.Module, tuple[int, list[tuple[nn.Module, bool]]]] = WeakKeyDictionary()


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Within this block ``models`` are in evaluation mode; afterwards each module is in its own mode of before.

    Several threads may evaluate one model at the same time: the last of them puts it back.
    """
    with _LOCK:
        for model in models:
            _begin(model)
    try:
        yield
    finally:
        with _LOCK:
            _end(models)


def _begin(model: nn.Module) -> None:
    count, modes = _EVALUATED.get(model, (0, []))
    if count == 0:
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
    _EVALUATED[model] = (count + 1, modes)


def _end(models: Iterable[nn.Module]) -> None:
    for model in models:
        count, modes = _EVALUATED.pop(model)
        if count > 1:
            _EVALUATED[model] = (count - 1, modes)
        else:
            for module, training in modes:
                module.training = training
