"""GPTAQ (arXiv 2504.02692): GPTQ whose target is what the full-precision model computes from its own inputs.

Behind quantized layers a layer reads x where the full-precision model reads x~. GPTQ approximates W x; GPTAQ
approximates W x~, so that errors of the layers before are made up for, too. With C = sum (x~ - x) x^T and GPTQ's
U (upper triangular, U^T U = H^-1)::

    P = a triu(C U^T, 1) U
    W[:, i:] -= e_i U[i, i:] - w_i P[i, i:],    e_i = (w_i - round(w_i)) / U_ii

w_i is column i before its rounding. The released code takes a = 0.25, because C is estimated from few samples. Where
the inputs agree (C = 0, as in the first layer at unquantized inputs) this is GPTQ.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.config.ptq import GPTAQOptions
from reqat.methods.layerwise import solve_weights
from reqat.methods.ptq._method import Method
from reqat.methods.ptq.gptq import gptq_codes, summary

DEFAULTS = GPTAQOptions()


def gptaq(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    act_order: bool = DEFAULTS.act_order,
    damp: float = DEFAULTS.damp,
    alpha: float = DEFAULTS.alpha,
    progress: bool = True,
) -> dict[str, Any]:
    """Quantize the weights of a prepared ``model`` by GPTAQ, in place; it is frozen then.

    Args: those of :func:`reqat.methods.ptq.gptq.gptq`, and ``alpha``, the share of the drift that is made up for, in
    [0, 1]. Memory beside GPTQ's: the full-precision inputs of one block for all calibration tokens.

    Raises ReqatError as GPTQ does, and for an ``alpha`` out of range.
    """
    if not 0 <= alpha <= 1:
        raise ReqatError(f"GPTAQ's alpha must lie in [0, 1], got {alpha} (0.25 is usual)")
    solved = solve_weights(
        model,
        input_ids,
        lambda problem: gptq_codes(problem, act_order=act_order, damp=damp, drift=alpha),
        label="GPTAQ",
        drift=True,
        progress=progress,
    )
    return {"method": "gptaq", "act_order": act_order, "damp": damp, "alpha": alpha, **summary(solved, input_ids)}


METHOD = Method(
    gptaq,
    settings=GPTAQOptions,
    solver_needs_data=True,
)
