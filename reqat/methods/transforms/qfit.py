"""Q-FIT's scale and shift of keys (ReQAT section 3.4): :mod:`reqat.methods.qfit` searches and folds them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from reqat.methods.qfit import calibrate, fold
from reqat.methods.transform import Transform
from reqat.quant import Precision


def fit(
    model: PreTrainedModel, precision: Precision, input_ids: Tensor, *, progress: bool = True, **options: Any
) -> dict[str, Any]:
    """Calibrate on the full-precision ``model`` and fold, in place; arguments and errors are those of
    :func:`reqat.methods.qfit.calibrate`. Returns the result's metrics."""
    result = calibrate(model, precision, input_ids, progress=progress, **options)
    fold(model, result)
    return result.metrics()


TRANSFORM = Transform(fit, online="the shift, subtracted from keys after RoPE")
