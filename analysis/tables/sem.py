"""The weight of selective entropy minimization, and its mask."""

from __future__ import annotations

from analysis.report.cells import Results
from analysis.report.document import Table
from analysis.tables import _generic

NAME = "sem"


def build(results: Results, artifact: str = NAME) -> Table:
    """The generic table under a caption of its own, against lambda none."""
    caption = (
        "Selective entropy minimization: its weight lambda, and a binary mask (at lambda 0.1) in place of the soft one."
    )
    return _generic.build(results, artifact, caption=caption, first="sem_lambda=none")
