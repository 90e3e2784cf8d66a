"""Two-bit networks by PACT and SAWB (arXiv 1805.06085, 1807.06964): quantizers whose ranges follow the loss and the
moments.

Weights take the range that two moments of the layer's weights say (format SAWB2-tensor), with no gradient beyond it;
inputs of convolutions, which a ReLU has made non-negative, the range ``[0, a]`` with ``a`` trained (format
AINT2-tensor, gradient rule pact). First and last layer stay as they are (inferred; the papers keep them at full
precision or 8 bits).
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reqat.models import prepare, set_gradient
from reqat.quant.gradients.pact import measuring

PRECISION = "SAWB2-tensor-W2+AINT2-tensor-A2"


def put_in_bits(model: PreTrainedModel, precision: str = PRECISION) -> None:
    """Prepare ``model`` for ``precision``, in place, with these gradient rules. Raises ReqatError as
    :func:`reqat.models.prepare` and :func:`reqat.models.set_gradient` do."""
    prepare(model, precision)
    set_gradient(model, "clipped", roles=("weights",))
    set_gradient(model, "pact", roles=("inputs",))


@torch.no_grad()
def start_ranges(model: PreTrainedModel, images: Tensor) -> None:
    """Set the ranges of the inputs from a batch of images [B, C, H, W], before a training of few steps."""
    with measuring(model):
        model(images)
