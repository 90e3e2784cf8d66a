"""SmoothQuant (arXiv 2211.10438): move the range of activations into the weights, where it is easier to quantize.

Channels of a layer's input differ in size by orders of magnitude; a block of 16 or 32 that holds a large one spends its
codes on that. For a group of layers that share an input x::

    s_c = max_t |x[t, c]| ** alpha / max_o |W[o, c]| ** (1 - alpha)

x / s is folded into the norm before the group, W s into the weights; q, k and v share s, gate and up do. Inputs of
``o_proj`` and ``down_proj`` are left as they are, as in the reference. Then weights are rounded to nearest. alpha 0.6
is what the MR-GPTQ paper finds best for FP4 with quantized activations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.config.progress import bar
from reqat.config.ptq import SmoothQuantOptions
from reqat.methods.layerwise import walk
from reqat.methods.ptq._method import Method
from reqat.methods.ptq.rtn import rtn
from reqat.methods.scaling import check_full_precision, groups_of, magnitudes, unchanged
from reqat.methods.transform import Transform
from reqat.models.adapters import blocks_of
from reqat.quant import Precision

DEFAULTS = SmoothQuantOptions()
_FLOOR = 1e-5


@torch.no_grad()
def smooth(
    model: PreTrainedModel,
    precision: Precision,
    input_ids: Tensor,
    *,
    alpha: float = DEFAULTS.alpha,
    progress: bool = True,
) -> dict[str, Any]:
    """Smooth the inputs of attention and MLP of every block of a full-precision ``model``, in place.

    Args:
        model: as loaded, not quantized.
        precision: unused: the scales do not depend on the format.
        input_ids: ``[n, T]`` int64 calibration sequences without padding.
        alpha: share of the range that goes from activations to weights, in [0, 1]; 0.5 for the two alike.
        progress: show a bar.

    Raises ReqatError for an alpha out of range, a quantized model, or bad ``input_ids``.
    """
    if not 0 <= alpha <= 1:
        raise ReqatError(f"SmoothQuant's alpha must lie in [0, 1], got {alpha}")
    check_full_precision(model, "SmoothQuant")
    smoothed = []
    with bar("SmoothQuant", len(blocks_of(model)), "layers", enabled=progress) as shown:
        for step in walk(model, input_ids):
            groups = [g for g in groups_of(step) if g.divide is not None and g.after_norm]
            sizes = magnitudes(step, groups)
            with unchanged(step, "SmoothQuant"):
                for group, size in zip(groups, sizes, strict=True):
                    largest_w = torch.stack([w.weight.abs().amax(0).double() for w in group.linears]).amax(0)
                    s = size.largest_K.clamp(min=_FLOOR) ** alpha / largest_w.clamp(min=_FLOOR) ** (1 - alpha)
                    group.fold(s.clamp(min=_FLOOR))
                    smoothed.append(group.name)
            shown.update()
    return {"alpha": alpha, "smoothed": len(smoothed)}


METHOD = Method(rtn, transforms=(Transform(smooth),), settings=SmoothQuantOptions)
