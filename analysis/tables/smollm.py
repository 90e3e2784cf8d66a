"""A published small model under quantization without training."""

from __future__ import annotations

from analysis.report.cells import Results
from analysis.report.document import Table
from analysis.tables import _generic

NAME = "smollm"


def build(results: Results, artifact: str = NAME) -> Table:
    """The generic table under a caption of its own."""
    caption = (
        "A published small model under quantization without training. Its weights went through 4-bit integers (Q4_1) "
        "before they came here."
    )
    return _generic.build(results, artifact, caption=caption)
