"""Table 1: precisions x methods x total budgets."""

from __future__ import annotations

from analysis.report import paper
from analysis.report.cells import Results
from analysis.report.document import Table, tokens
from analysis.report.lines import bf16_at_budget
from analysis.report.names import BF16
from analysis.tables._columns import BOLD, METHOD, PRECISION, SAME_BUDGET
from analysis.tables._grid import grid, paper_heads, paper_lookup

NAME = "table1"


def build(results: Results, artifact: str = NAME) -> Table:
    """Paper Table 1: three precisions x methods x total budgets, the distance to BF16, and the paper's own block."""
    source = "table1"
    return grid(
        results,
        artifact,
        reference=bf16_at_budget,
        reference_name=f"Difference to {BF16} (points)",
        stub=(PRECISION, METHOD),
        labels=lambda li: (li.precision, li.method),
        reported=paper_lookup(source),
        reported_name="Paper: R1-Qwen-14B, AIME-120 (%)",
        reported_columns=paper_heads(source, untrained=True),
        reported_rows=paper.select(source),
        caption="Accuracy with 95% interval, by total training budget (fine-tuning and QAT together). "
        "Differences are to BF16 fine-tuning with the same total budget, where nothing is trained to the BF16 base; p "
        "from a paired test on the same problems and sampling seeds. The right block is what the paper reports on its "
        "own model and benchmark, where the QAT budget is 70M tokens; here it is "
        f"{tokens(results.plan.tier.budget.qat_tokens)}.",
        notes=(BOLD, SAME_BUDGET),
    )
