"""What a labelled task is."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from reqat.config.errors import ReqatError

SPLITS = ("train", "test")
NO_CLASS = -100
"""In place of a class: the word has none (torch's losses pass over it)."""

Tagged = tuple[list[str], list[int]]
"""Words and the class of each, or :data:`NO_CLASS`."""
Classified = tuple[str, str | None, int]
"""A text, or two, and the class."""


@dataclass(frozen=True)
class LabelledTask:
    """``make(records, split)`` gives all examples of a split, in the corpus's order: :data:`Tagged` where each word has
    a class (``per_word``), else :data:`Classified`. ``records``: the corpus as its source's ``load`` gives it."""

    classes: tuple[str, ...]
    per_word: bool
    make: Callable[[Sequence[dict[str, Any]], str], list[Any]]


def chosen(task: LabelledTask, records: Sequence[dict[str, Any]], split: str, n: int, seed: int) -> list[Any]:
    """``n`` examples of a split, drawn without replacement. Raises ``ReqatError`` where there are fewer."""
    found = task.make(records, split)
    if len(found) < n:
        raise ReqatError(f"the {split} split has {len(found)} examples, {n} are asked for: ask for fewer")
    return random.Random(f"{split} {seed}").sample(found, n)
