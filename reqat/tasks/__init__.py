"""Problems with verifiers, and the chains of thought that solve them.

A *family* is a generator of problems, in most of them that of `reasoning-gym` (which also grades the answers), plus a
writer of verified traces: correct arithmetic among varied discourse, so that a model trained on them has both
low-entropy tokens (digits, operators) and high-entropy ones (how to go on). A family may instead name options, of
which the model chooses one by likelihood. Splits are by construction: a keyed hash of the canonical question decides
between train, validation and test, so no problem can be in two.
"""

from __future__ import annotations

from reqat.tasks.family import (
    FAMILIES,
    SPLITS,
    Family,
    Problem,
    get_family,
    malformed,
    options_of,
    problems,
    verify,
    write_trace,
)

__all__ = [
    "FAMILIES",
    "SPLITS",
    "Family",
    "Problem",
    "get_family",
    "malformed",
    "options_of",
    "problems",
    "verify",
    "write_trace",
]
