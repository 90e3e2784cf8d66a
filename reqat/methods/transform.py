"""What a transform is: a rewrite of a model that is easier to quantize and computes the same.

A transform has two parts, of which it may lack one: weights are rewritten before the model is prepared (``rewrite``),
and the precision that it is prepared for is changed (``prepared_for``), where something must be computed at run time.
One test holds all transforms to their promise, in float64: the model gives the same logits before and after, also
prepared for the precision with everything of it but the rounding (:func:`reqat.quant.without_rounding`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.quant import Precision


@dataclass(frozen=True)
class Transform:
    """A function-preserving rewrite.

    ``rewrite(model, precision, input_ids, *, progress, **options)`` changes a full-precision model in place, looking at
    what flows through it for ``input_ids`` ``[n, T]``, and returns JSON-ready metrics. ``prepared_for(precision)`` is
    the precision with what the transform computes online. ``online`` says what that is; empty: all is in the weights.
    """

    rewrite: Callable[..., dict[str, Any]] | None = None
    prepared_for: Callable[[Precision], Precision] = lambda precision: precision
    online: str = ""

    @property
    def needs_data(self) -> bool:
        """Whether it looks at calibration sequences."""
        return self.rewrite is not None

    def apply(
        self,
        model: PreTrainedModel,
        precision: Precision,
        input_ids: Tensor | None,
        *,
        progress: bool = True,
        **options: Any,
    ) -> tuple[Precision, dict[str, Any]]:
        """Rewrite ``model`` in place; returns the precision to prepare it for, and metrics.

        Raises ReqatError where the transform looks at data and has none, and for what it refuses.
        """
        wanted = self.prepared_for(precision)
        if self.rewrite is None:
            return wanted, {}
        if input_ids is None:
            raise ReqatError("the transform looks at what flows through the model: give it calibration input_ids")
        return wanted, self.rewrite(model, wanted, input_ids, progress=progress, **options)
