"""Succession in the Brown corpus: does the second sentence follow the first, or come from elsewhere in the text?

Both kinds are equally many, and words of the topic alone do not tell them apart, since both sentences are of one text.
Stands for tasks of sentence pairs (RTE, MRPC). Texts whose number ends in 0 are the test split.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from reqat.tasks.labelled._task import Classified, LabelledTask

_SHORTEST, _LONGEST = 5, 30
"""Words of each sentence."""
_APART = 5
"""Sentences between the first one and one from elsewhere, at least."""


def _make(texts: Sequence[dict[str, Any]], split: str) -> list[Classified]:
    found: list[Classified] = []
    for text in texts:
        if text["id"].endswith("0") != (split == "test"):
            continue
        rng = random.Random(text["id"])
        words = [[word for word, _ in sentence] for sentence in text["sentences"]]
        usable = [i for i, sentence in enumerate(words) if _SHORTEST <= len(sentence) <= _LONGEST]
        pairs = [(i, i + 1) for i in usable if i + 1 in set(usable)]
        for number, (first, second) in enumerate(pairs):
            label = number % 2
            if not label:
                elsewhere = [i for i in usable if abs(i - first) > _APART]
                if not elsewhere:
                    continue
                second = rng.choice(elsewhere)
            found.append((" ".join(words[first]), " ".join(words[second]), label))
    return found


TASK = LabelledTask(("elsewhere", "follows"), False, _make)
