"""What the figures of evaluations share: methods in their order, entries by budget, the footer."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from analysis.report import style
from analysis.report.cells import Entry, Results
from analysis.report.lines import Line
from analysis.report.names import BF16, REFERENCE_PRECISION
from reqat.config.errors import ReqatError

METHODS = ("PTQ", "FT+PTQ", "QAT", "ReQAT-T", "ReQAT-TQ", "ReQAT-TQS")  # quantized methods of Figure 1, in this order
PAPER_AXIS = "AIME-120 accuracy (%)"
MODEL_OF_PAPER = "R1-Qwen-14B"


def reference_precision(entries: Sequence[Entry]) -> str:
    """NVFP4-W4A4KV4 if the tier has it, else its last quantized precision."""
    quantized = list(dict.fromkeys(e.precision for e in entries if e.precision != BF16))
    if not quantized:
        raise ReqatError("no quantized cell to draw; add a precision to the tier's `only.precisions`")
    return REFERENCE_PRECISION if REFERENCE_PRECISION in quantized else quantized[-1]


def entry_at(all_lines: Sequence[Line], precision: str, method: str, multiple: int | None) -> Entry | None:
    """The entry of a method at a budget; a method that trains nothing stands at every budget."""
    for li in all_lines:
        if li.precision == precision and li.method == method:
            return li.by.get(multiple, li.by.get(None))
    return None


def percent_of(results: Results, entry: Entry) -> tuple[float, float, float]:
    """Accuracy of an entry and the ends of its 95% interval, in percent."""
    e = results.estimate(entry)
    return 100 * e.value, 100 * e.lo, 100 * e.hi


def finish(fig: Figure, results: Results, used: Sequence[Entry], *more: str, intervals: bool = True) -> Figure:
    """Put the footer under a figure."""
    made = results.provenance(used)
    notes = list(made.notes())
    if intervals:
        one = "; of one training run they say nothing about another" if made.training_seeds[0] == 1 else ""
        notes.append(f"Bars and bands: 95% intervals clustered by problem{one}.")
    style.footer(fig, [*notes, *more])
    return fig


def dash(precision: str) -> str:
    """Line style: BF16 is dashed."""
    return "--" if precision == BF16 else "-"
