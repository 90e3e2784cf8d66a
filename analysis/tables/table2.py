"""Table 2: task families in place of the paper's benchmarks."""

from __future__ import annotations

from analysis.report import paper
from analysis.report.cells import Results
from analysis.report.document import Column, Table, tokens
from analysis.report.lines import bf16_at_budget, grouped, lines
from analysis.report.names import BF16
from analysis.tables._columns import BOLD, METHOD, PRECISION
from analysis.tables._families import by_family

NAME = "table2"


def build(results: Results, artifact: str = NAME) -> Table:
    """Paper Table 2: task families in place of GSM8K, MATH-500 and AIME."""
    groups = grouped(lines(results.of(artifact)), lambda li: (li.model, li.precision))
    return by_family(
        results,
        artifact,
        sections=[[e for li in group for e in li.by.values()] for _, group in groups],
        stub=(PRECISION, METHOD, Column("Tokens")),
        labels=lambda e: (e.precision, e.method, tokens(e.total_tokens)),
        whole="all",
        reference=bf16_at_budget,
        compared=Column("all families", f"Difference to {BF16} (points)"),
        metrics=("GSM8K", "MATH-500", "AIME-120"),
        reported=lambda e, m: paper.value("table2", precision=e.precision, method=e.method, metric=m),
        reported_name="Paper: R1-Llama-8B, 350M tokens (%)",
        bold=lambda e: e.precision != BF16,
        caption="Accuracy with 95% interval on each family of problems, all methods at one total budget (untrained "
        "ones at none). The difference is to BF16 fine-tuning with the same budget (to the BF16 base where nothing is "
        "trained), over all families.",
        notes=(BOLD,),
    )
