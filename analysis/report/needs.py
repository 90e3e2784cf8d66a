"""What a table or figure can need of the cells of a plan that it is made of.

Reads plans alone and imports neither pandas nor matplotlib, so that the DAG can ask it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from analysis.report.claims import has_claims
from analysis.report.names import BF16, REFERENCE_PRECISION

if TYPE_CHECKING:
    from reqat.config.plan import Cell, Plan


def qfit_cell(plan: Plan, model: str) -> tuple[str, Cell] | None:
    """The Q-FIT stage (scale and shift) whose map stands for the tier, and a cell that it serves: ReQAT at the claim
    budget if there is one.
    """
    claim = plan.tier.claim_total(model)
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


def _qfit(plan: Plan, cells: Sequence[Cell]) -> bool:
    return any(qfit_cell(plan, model) is not None for model in {cell.model for cell in cells})


def _regime(plan: Plan, cells: Sequence[Cell]) -> bool:
    trained = {(c.model, c.multiple, c.recipe) for c in cells if (c.recipe == "ft") == (c.precision == BF16)}
    totals = {label: plan.tier.claim_total(label) for label in plan.tier.models}
    return any({(label, total, "ft"), (label, total, "qat")} <= trained for label, total in totals.items())


# Word -> whether cells of a plan (of one artifact and model, where these are given) hold it. Never asked of no cells.
NEEDS: dict[str, Callable[[Plan, Sequence[Cell]], bool]] = {
    "cells": lambda plan, cells: True,
    "quantized": lambda plan, cells: any(c.precision != BF16 for c in cells),
    "reference": lambda plan, cells: any(c.precision == REFERENCE_PRECISION for c in cells),
    "trained": lambda plan, cells: any(c.precision != BF16 and c.multiple is not None for c in cells),
    "qfit": _qfit,
    "regime": _regime,
    "claims": lambda plan, cells: has_claims(plan),
}
