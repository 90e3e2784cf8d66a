"""What a figure needs of a plan, beyond cells of its artifact. Reads plans alone, so that the DAG can ask it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.report.names import REFERENCE_PRECISION

if TYPE_CHECKING:
    from reqat.config.plan import Cell, Plan


def qfit_cell(plan: Plan, model: str) -> tuple[str, Cell] | None:
    """The Q-FIT stage (scale and shift) whose map stands for the tier, and a cell that it serves: ReQAT at the claim
    budget if there is one.
    """
    claim = plan.tier.budget.claim_total
    cells = sorted(
        (c for c in plan.cells if c.model == model and c.multiple is not None),
        key=lambda c: (
            c.multiple != claim,
            c.precision != REFERENCE_PRECISION,
            c.method not in ("ReQAT-TQ", "ReQAT-TQS"),
            c.training_seed,
        ),
    )
    for cell in cells:
        for stage in plan.lineage(plan.evaluation(cell.evaluation).stage):
            s = stage.settings
            if s.kind == "qfit" and s.scale and s.shift and s.variant == "paper":
                return stage.id, cell
    return None
