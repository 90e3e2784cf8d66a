"""Tagging of the Brown corpus: the class of each word, of eleven, in its sentence.

The corpus has some 180 tags, with inflection (``nns``), place (``-tl`` in titles) and contractions (``vbd*``). Here a
tag is its part before ``-`` and ``+``, and joins one of the classes below; marks of punctuation have none, because
every model knows them. Many words are of several classes (*that*, *saw*, *to*), so the sentence has to be attended to.
Texts whose number ends in 0 are the test split.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from reqat.config.errors import ReqatError
from reqat.tasks.labelled._task import NO_CLASS, LabelledTask, Tagged

_SHORTEST, _LONGEST = 5, 40
"""Words of a sentence: longer ones would make batches long, shorter ones are titles."""

# Class -> beginnings of its tags, in the order in which they are tried: the first that fits decides.
_PREFIXES = {
    "noun": ("nn", "np", "nr"),
    "verb": ("vb", "be", "do", "hv", "md"),
    "adjective": ("jj",),
    "adverb": ("rb", "rn", "wrb", "ql", "wql"),
    "pronoun": ("pn", "pp", "wp", "ex"),
    "determiner": ("at", "dt", "ap", "ab", "wdt"),
    "preposition": ("in",),
    "conjunction": ("cc", "cs"),
    "number": ("cd", "od"),
    "particle": ("to", "rp", "*"),
}
CLASSES = (*_PREFIXES, "other")


def class_of(tag: str) -> int:
    """The number of a tag's class, or -100 for a mark of punctuation. Raises ``ReqatError`` for an empty tag."""
    tag = tag.lower()
    if not tag:
        raise ReqatError("a word of the Brown corpus has an empty tag; prepare the source again")
    # Before the split: the dash has the tag "--", which would be empty, and in titles "---tl".
    if not re.search(r"[a-z*]", re.sub(r"-(tl|hl|nc)", "", tag)):
        return NO_CLASS
    base = re.split(r"[-+]", tag)[0]
    for number, prefixes in enumerate(_PREFIXES.values()):
        if base.startswith(prefixes):
            return number
    return len(_PREFIXES)


def _make(texts: Sequence[dict[str, Any]], split: str) -> list[Tagged]:
    found = []
    for text in texts:
        if text["id"].endswith("0") != (split == "test"):
            continue
        for sentence in text["sentences"]:
            labels = [class_of(tag) for _, tag in sentence]
            if _SHORTEST <= len(sentence) <= _LONGEST and any(label != NO_CLASS for label in labels):
                found.append(([word for word, _ in sentence], labels))
    return found


TASK = LabelledTask(CLASSES, True, _make)
