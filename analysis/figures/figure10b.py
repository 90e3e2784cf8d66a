"""Figure 10(b): training loss with keys and values in 16 bits, with Q-FIT, and in four bits without it."""

from __future__ import annotations

from matplotlib.figure import Figure

from analysis.figures._conditions import losses_by_condition
from analysis.report.cells import Results

NAME = "figure10b"
ARTIFACT = "figure10"
NEEDS = "trained"

# In the order of the rows read off the paper's figure.
WORDS = {"kv=BF16": "KV 16 bits", "kv=E2M1": "KV4 E2M1", "kv=E1M2": "KV4 E1M2", "kv=Q-FIT": "KV4 Q-FIT"}


def build(results: Results, model: str) -> Figure:
    """Figure 10(b): four QAT runs on the same traces, NVFP4-W4A4 with keys and values in 16 bits or at KV4."""
    return losses_by_condition(results, model, "figure10", WORDS, "b", "figure10b")
