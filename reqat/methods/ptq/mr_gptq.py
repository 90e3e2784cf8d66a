"""MR-GPTQ (arXiv 2509.23202): GPTQ for FP4, with block Hadamard rotation, searched scales and static act-order.

1. Inputs and weights of every linear layer are rotated in Hadamard blocks of the format's own size (16, 32), which the
   model also does at run time; a rotation that the precision names already stays.
2. Scales are searched before GPTQ moves anything: per block, the best of 100 shares of its largest magnitude (error
   norm 2.4; :mod:`reqat.methods.ptq._grid`). q, k and v share one global scale, gate and up one. Scales of MXFP4 are
   powers of two, of which none is searched; MXFP4-4/3 has the paper's static factor.
3. GPTQ visits the columns by falling second moment with the scales of their original blocks (static act-order), so the
   blocks stay where they were in memory.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.config.ptq import MRGPTQOptions, rotation_of
from reqat.formats import QuantizedTensor
from reqat.methods.layerwise import WeightProblem, solve_weights
from reqat.methods.ptq._grid import searched
from reqat.methods.ptq._method import Method
from reqat.methods.ptq.gptq import gptq_codes, summary
from reqat.methods.scaling import check_unmeasured
from reqat.methods.transform import Transform
from reqat.models import share_global_scales
from reqat.quant import Precision

DEFAULTS = MRGPTQOptions()
_SHRINK = 0.8


def rotated(precision: Precision) -> Precision:
    """``precision`` with a rotation in blocks of its weights' format, unless it names one."""
    if precision.rotation is not None or precision.weights is None:
        return precision
    return precision.replace(rotation=rotation_of("mr_gptq", precision.weights.block))


def mr_gptq(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    damp: float = DEFAULTS.damp,
    grid: int = DEFAULTS.grid,
    norm: float = DEFAULTS.norm,
    progress: bool = True,
) -> dict[str, Any]:
    """Quantize the weights of a prepared ``model``, in place; it is frozen then.

    Args:
        model, input_ids, damp, progress: of :func:`reqat.methods.ptq.gptq.gptq`.
        grid: the shares searched are 1 - 0.8 i / grid.
        norm: of the error that the search makes least.

    Raises ReqatError as GPTQ does, and for a grid or a norm that is not positive.
    """
    if grid < 1 or not norm > 0:
        raise ReqatError(f"MR-GPTQ searches {grid} scales by an error of norm {norm}: both must be positive")
    check_unmeasured(model, "MR-GPTQ", "clips")  # its search would replace them
    share_global_scales(model)
    shares = [1 - _SHRINK * i / grid for i in range(grid)]

    def solver(problem: WeightProblem) -> QuantizedTensor:
        nearest = problem.nearest
        scaled = searched(
            problem.weight,
            nearest.format,
            shares,
            norm=norm,
            global_scale=nearest.global_scale,
            name=problem.name,
        )
        return gptq_codes(problem.with_scales(scaled), act_order=True, damp=damp)

    solved = solve_weights(model, input_ids, solver, label="MR-GPTQ", progress=progress)
    return {"method": "mr_gptq", "grid": grid, "norm": norm, "damp": damp, **summary(solved, input_ids)}


METHOD = Method(
    mr_gptq,
    transforms=(Transform(prepared_for=rotated, online="the rotation of each linear layer's input"),),
    settings=MRGPTQOptions,
    solver_needs_data=True,
)
