"""Attention-output distillation (KD for QAT of Transformer encoders, EMNLP 2022, arXiv 2211.11014).

    sum over layers of  MSE of the self-attention block's output, after output projection, residual and norm

over all positions, padding too, as the released code has it. Large encoders quantize better by it than by their
attention maps, since it also corrects what the maps multiply.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from reqat.methods.terms._mse import layer_mse

if TYPE_CHECKING:
    from reqat.training.objective import TermContext


@dataclass(frozen=True)
class AttentionOutputMSE:
    """Mean squared difference to the outputs of the teacher's attention blocks as a term of the objective.

    ``over``: the positions, ``all``, ``tokens`` (without padding) or ``responses``.
    """

    weight: float = 1.0
    over: str = "all"
    name: str = "attention_output_mse"
    needs: ClassVar[frozenset[str]] = frozenset({"attention_outputs", "teacher.attention_outputs"})

    def __call__(self, ctx: TermContext) -> Tensor:
        """Raises ``ReqatError`` where the models' layers or widths differ, and for unknown positions."""
        return layer_mse(ctx, "attention_outputs", self.over)


TERM = AttentionOutputMSE
