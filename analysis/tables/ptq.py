"""Round-to-nearest and GPTQ, of the base model and after fine-tuning."""

from __future__ import annotations

from analysis.report import paper
from analysis.report.cells import Entry, Results
from analysis.report.document import EMPTY, Column, Table
from analysis.report.lines import Line, bf16_at_budget
from analysis.report.names import BF16
from analysis.tables._columns import BOLD, PRECISION
from analysis.tables._grid import grid, paper_heads

NAME = "ptq"


def build(results: Results, artifact: str = NAME) -> Table:
    """Post-training quantization: rounding (RTN) and GPTQ, of the base model and of the fine-tuned one."""

    def name(e: Entry) -> str:
        if e.precision == BF16:
            return EMPTY
        return (
            e.method.removeprefix("FT+").replace("PTQ", "RTN", 1)
            if "GPTQ" not in e.method
            else e.method.removeprefix("FT+")
        )

    def of_paper(li: Line, m: int | None) -> float | None:
        method = {(EMPTY, False): "Baseline", (EMPTY, True): "FT", ("RTN", False): "PTQ", ("RTN", True): "FT+PTQ"}.get(
            (li.method, m is not None)
        )
        found = paper.by_budget("table1", precision=li.precision, method=method) if method else {}
        return {paper.multiple(total): value for total, value in found.items()}.get(m)

    claim = {results.plan.tier.claim_total(model) for model in results.models(artifact)}
    heads: list[tuple[int | None, str]] = [(None, "untrained")]
    heads += [(m, h) for m, h in paper_heads("table1", untrained=False) if m in claim]
    return grid(
        results,
        artifact,
        reference=bf16_at_budget,
        reference_name=f"Difference to {BF16} (points)",
        stub=(PRECISION, Column("Solver", align="l")),
        labels=lambda li: (li.precision, li.method),
        method=name,
        reported=of_paper,
        reported_name="Paper's PTQ: R1-Qwen-14B, AIME-120 (%)",
        reported_columns=heads,
        reported_rows=[
            r
            for r in paper.select("table1")
            if r.method in ("Baseline", "FT", "PTQ", "FT+PTQ") and paper.multiple(r.total_tokens) in {None, *claim}
        ],
        caption="Quantization without training, of the base model (untrained) and of the fine-tuned one. "
        "RTN rounds to nearest; rotated: a block Hadamard rotation of inputs and weights first. The transcribed "
        "numbers do not name the solver of the paper's PTQ lines; they stand beside RTN.",
        notes=(BOLD,),
    )
