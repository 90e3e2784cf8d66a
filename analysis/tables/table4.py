"""Table 4: QAT on the traces of fine-tuning, or on others."""

from __future__ import annotations

from analysis.report import paper
from analysis.report.cells import Results
from analysis.report.document import EMPTY, Column, Table
from analysis.report.lines import where
from analysis.tables._columns import BOLD, METHOD, PRECISION, SAME_BUDGET
from analysis.tables._grid import grid, paper_heads, paper_lookup

NAME = "table4"


def build(results: Results, artifact: str = NAME) -> Table:
    """Paper Table 4: QAT alone, QAT after FT on other traces, QAT after FT on the same traces."""
    says = {"na": EMPTY, "no": "different", "yes": "same"}
    return grid(
        results,
        artifact,
        reference=where("aligned=no"),
        reference_name="Difference to different traces (points)",
        stub=(PRECISION, METHOD, Column("QAT's traces", align="l")),
        labels=lambda li: (li.precision, li.method, says[paper.parse_condition(li.condition)["aligned"]]),
        reported=paper_lookup("table4"),
        reported_name="Paper: R1-Qwen-14B, AIME-120 (%)",
        reported_columns=paper_heads("table4", untrained=False),
        reported_rows=paper.select("table4"),
        caption="Does it matter that QAT sees the very traces of fine-tuning? Both FT+QAT lines have the same first "
        "stage and the same number of QAT tokens; only the choice of traces differs. QAT alone spends the whole budget "
        "on QAT.",
        notes=(BOLD, SAME_BUDGET),
    )
