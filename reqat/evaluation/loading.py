"""A model as it is measured: at a precision, weights quantized once, on the accelerator where there is one.

Evaluations, studies and the verbs that intervene in decoding all load models here, so that a number of one and a number
of another are of the same arithmetic on the same device: the one that a record's `hardware.device` names.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from reqat.models import freeze, load_model, prepare
from reqat.models.sidecar import Sidecar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The numbers that `autocast` of a tier's decoding stands for.
AUTOCAST: dict[str, torch.dtype | None] = {"none": None, "bf16": torch.bfloat16}


def load_at(
    folder: str | Path,
    precision: str | None,
    *,
    override: bool = False,
    dtype: torch.dtype = torch.float32,
    gpu: bool = True,
    **options: Any,
) -> PreTrainedModel:
    """The model in ``folder``, prepared at ``precision`` and frozen.

    It lies on the GPU if torch sees one (and ``gpu`` does not say otherwise), and is there before its weights are
    quantized: kernels of the GPU do that, too.

    Args:
        folder: of the model.
        precision: a name; the options that ``folder`` was saved with count if it was saved at it. None: the precision
            that it was saved at, or, where it says none, BF16.
        override: take ``precision`` and ``options`` as they are, as a plan does, which gives all of them.
        dtype: of the weights before they are quantized, and of what is computed with.
        options: of ``prepare``.

    Raises `ReqatError` as ``load_model`` and ``prepare`` do.
    """
    model = load_model(folder, dtype=dtype)
    if precision is None:  # of the loaded model: a folder of the hub, or one released by ReQAT's authors, says it, too
        precision = Sidecar.of(model).precision.name
    prepare(model, precision, override=override, **options)
    if gpu and torch.cuda.is_available():
        torch.nn.Module.cuda(model)
    return freeze(model)
