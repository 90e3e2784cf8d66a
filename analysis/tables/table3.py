"""Table 3: ReQAT beside methods of post-training quantization, distillation and QAT."""

from __future__ import annotations

from analysis.report import paper
from analysis.report.cells import Entry, Results
from analysis.report.document import EMPTY, Column, Table
from analysis.report.lines import Line, bf16_at_budget
from analysis.report.names import BF16
from analysis.tables._columns import BOLD, METHOD, PRECISION
from analysis.tables._grid import grid
from reqat.config.formats import FAMILIES
from reqat.config.precision import resolve

NAME = "table3"

# Whose number of the paper stands beside a precision of ours.
STANDS_FOR = {"AINT4-g32-W4A16": "INT4-g128-W4A16", "INT4-row-W4+AINT4-row-A4KV4": "INT4-row-W4A4KV4"}
# Methods that train on quantized weights: fine-tuning before them is part of their name, not another column.
_TRAINED = ("QAT", "QAD", "ReQAT")

_ANY_TOTAL = 1
"""The paper has one number of a method that trains, at its best budget, whatever total ours has."""


def method(entry: Entry) -> str:
    """The method without the fine-tuning before it, so that a line has both; EMPTY at BF16."""
    if entry.precision == BF16:
        return EMPTY
    if any(name in entry.method for name in _TRAINED):
        return entry.method
    name = entry.method.removeprefix("FT+")
    return name.replace("PTQ", "RTN") if name.startswith("PTQ") else name


def group(precision: str) -> str:
    """How many weights share a scale: a number, or `row`."""
    weights = resolve(precision).families.get("weights")
    return EMPTY if weights is None else str(FAMILIES[weights]["block"][0] or "row")


def of_paper(line: Line, multiple: int | None) -> float | None:
    """The paper's number beside a line, untrained (None) or trained."""
    precision = STANDS_FOR.get(line.precision, line.precision)
    if line.method == EMPTY:
        name = "Baseline" if multiple is None else "FT"
    elif any(word in line.method for word in _TRAINED):
        name = "ReQAT" if line.method.startswith("ReQAT") else line.method
    else:
        name = line.method if multiple is None else f"FT+{line.method}"
    return paper.value("table3", precision=precision, method=name)


def build(results: Results, artifact: str = NAME) -> Table:
    """Paper Table 3: post-training methods of the base model and of the fine-tuned one, and methods that train."""
    return grid(
        results,
        artifact,
        reference=bf16_at_budget,
        reference_name=f"Difference to {BF16} (points)",
        stub=(PRECISION, Column("Group"), METHOD),
        labels=lambda li: (li.precision, group(li.precision), li.method),
        method=method,
        reported=of_paper,
        reported_name="Paper: R1-Qwen-14B, AIME-120 (%)",
        reported_columns=[(None, "untrained"), (_ANY_TOTAL, "trained")],
        reported_rows=paper.select("table3"),
        caption="Quantization of the base model (untrained), after fine-tuning, and by training. RTN rounds to "
        "nearest. QAD distils the base model, FT+QAD the fine-tuned one on the traces of fine-tuning; the paper's QAD "
        "distils the base model. For the paper's INT4 in groups of 128 stand groups of 32 with zero points, for its "
        "INT4 in rows rows with inputs, keys and values that have zero points.",
        notes=(BOLD, "The paper lists each method's best budget; here all spent the same."),
    )
