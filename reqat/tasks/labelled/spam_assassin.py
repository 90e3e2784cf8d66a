"""Spam of the SpamAssassin corpus: mails without headers, spam or not. Near its ceiling for any encoder: it shows that
nothing breaks, and separates methods little. A fifth of the mails, by a hash of their name, is the test split."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from reqat.tasks.labelled._task import Classified, LabelledTask

_LETTERS = 2000
"""Letters of a mail that are kept: more than any encoder here reads of it."""


def _make(mails: Sequence[dict[str, Any]], split: str) -> list[Classified]:
    def in_test(id: str) -> bool:
        return hashlib.sha256(id.encode()).digest()[0] % 5 == 0

    return [
        (mail["text"][:_LETTERS], None, int(mail["label"]))
        for mail in mails
        if in_test(mail["id"]) == (split == "test")
    ]


TASK = LabelledTask(("ham", "spam"), False, _make)
