"""Figure 11(b): training loss at MXFP4-W4A4 with down_proj quantized, left in BF16, or rotated in blocks."""

from __future__ import annotations

from matplotlib.figure import Figure

from analysis.figures._conditions import losses_by_condition
from analysis.report.cells import Results

NAME = "figure11b"
ARTIFACT = "figure11"
NEEDS = "trained"

# In the order of the rows read off the paper's figure.
WORDS = {"down_proj=FP4": "TAQ", "down_proj=BF16": "down_proj BF16", "down_proj=rotated": "block rotation"}


def build(results: Results, model: str) -> Figure:
    """Figure 11(b): three QAT runs on the same traces at MXFP4-W4A4."""
    return losses_by_condition(results, model, "figure11", WORDS, "b", "figure11b")
