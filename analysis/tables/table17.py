"""Table 17: Hadamard rotations of queries and keys in place of Q-FIT."""

from __future__ import annotations

from analysis.report import paper
from analysis.report.cells import Results
from analysis.report.document import Column, Table
from analysis.report.lines import Line, where
from analysis.tables._columns import SAME_BUDGET
from analysis.tables._grid import grid, paper_heads

NAME = "table17"

_SAYS = {"none": "none", "block-hadamard": "Hadamard", "qfit": "Q-FIT"}
# The paper states no element and no block; Q-FIT is with E1M2 there, the others are its TAQ with E2M1.
_OF_PAPER = {("none", "E2M1"), ("block-hadamard", "E2M1"), ("qfit", "E1M2")}


def build(results: Results, artifact: str = NAME) -> Table:
    """Paper Table 17: no transform, randomized Hadamard rotations of two block sizes, and Q-FIT; E2M1 and E1M2."""

    def labels(li: Line) -> tuple[str, str]:
        given = paper.parse_condition(li.condition)
        block = {"16": ", blocks of 16", "head_dim": ", whole heads"}.get(given.get("block", ""), "")
        return _SAYS[given["transform"]] + block, given["kv_element"]

    def reported(li: Line, multiple: int | None) -> float | None:
        given = paper.parse_condition(li.condition)
        if (given["transform"], given["kv_element"]) not in _OF_PAPER or given.get("block") == "head_dim":
            return None
        found = paper.by_budget("table17", precision=li.precision, method=li.method, transform=given["transform"])
        return {paper.multiple(total): value for total, value in found.items()}.get(multiple)

    return grid(
        results,
        artifact,
        reference=where("transform=none;kv_element=E2M1"),
        reference_name="Difference to none, E2M1 (points)",
        stub=(Column("Transform of Q and K", align="l"), Column("KV element", align="c")),
        labels=labels,
        reported=reported,
        reported_name="Paper: R1-Qwen-14B, AIME-120 (%)",
        reported_columns=paper_heads("table17", untrained=False),
        reported_rows=paper.select("table17"),
        caption="Trace-aligned QAT without SEM at NVFP4-W4A4KV4. Hadamard: queries and keys are multiplied after RoPE "
        "with the same fixed random signs and then a Hadamard matrix, in blocks of 16 (those that share a scale) or "
        "over whole heads; their product is unchanged. The paper names neither block nor element: its rotation stands "
        "beside blocks of 16 with E2M1, its Q-FIT beside E1M2. Values and inputs of linear layers are not rotated.",
        notes=(SAME_BUDGET, "Bold: best of a column, as printed."),
    )
