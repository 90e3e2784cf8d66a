"""Hidden-state distillation (TinyBERT, arXiv 1909.10351; KD for QAT of encoders): MSE between all hidden states.

The states are the embeddings and the output of every layer, the last one after the final norm. The error is a mean over
channels and positions, summed over states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from reqat.methods.terms._mse import layer_mse

if TYPE_CHECKING:
    from reqat.training.objective import TermContext


@dataclass(frozen=True)
class HiddenMSE:
    """Mean squared difference to the teacher's hidden states as a term of the objective.

    ``over``: the positions, ``responses``, ``tokens`` (all but padding) or ``all``, as ternary BERT has it.
    """

    weight: float = 1.0
    over: str = "responses"
    name: str = "hidden_mse"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden_states", "teacher.hidden_states"})

    def __call__(self, ctx: TermContext) -> Tensor:
        """Raises ``ReqatError`` where the models' layers or widths differ, and for unknown positions."""
        return layer_mse(ctx, "hidden_states", self.over)


TERM = HiddenMSE
