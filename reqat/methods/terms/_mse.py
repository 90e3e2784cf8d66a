"""What the terms that compare states layer by layer share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from reqat.training.objective import TermContext


def layer_mse(ctx: TermContext, output: str, over: str) -> Tensor:
    """Sum over layers of the mean squared difference of states [B, T, D] at the positions ``over``, times the N
    response positions, by which the objective divides."""
    where_BT = ctx.positions(over)
    total = ctx.logits.new_zeros((), dtype=torch.float32)
    for student_BTD, teacher_BTD in ctx.pairs(output):
        error_ND = student_BTD[where_BT].float() - teacher_BTD[where_BT].float()
        total = total + error_ND.square().mean(-1).sum()
    # Times N over their number: exactly 1 where these are the response positions.
    return total * (len(ctx.labels) / max(1, int(where_BT.sum())))
