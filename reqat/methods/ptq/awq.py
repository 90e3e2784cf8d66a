"""AWQ (arXiv 2306.00978): scale up the input channels of a weight that matter most, so that rounding hurts them less.

For a group of layers that share an input x, with a_c = mean_t |x[t, c]|, the scales are a power of the activations'
size, and the power is searched::

    s(r) = a ** r / sqrt(max(a ** r) min(a ** r)),    r in {0, 1/20, ..., 19/20}
    E(r) = MSE(f(x; W), f(x / s; Q(W s)))

f is the module that the group is part of: the whole attention for q, k and v, the whole MLP for gate and up, the layer
itself for o and down. r = 0 scales nothing and wins ties, so no group's error grows. W s is folded into the weights,
1/s into the norm (or v_proj, up_proj) before them; weights are then rounded to nearest. Where the precision quantizes
inputs the candidates quantize x / s, too.

Then weights are clipped: for each block, of 10 bounds from its largest magnitude down to 0.55 of it the one with the
least error of the block's share of the layer's output, ``d^T H d`` with d the error of its weights and H the second
moments of its inputs. Not in q and k; and unless ``clip`` says otherwise not in FP4: a scale of MXFP4 is a power of
two, so that a clipped block loses whole bits (ReQAT runs AWQ without it, too).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.config.progress import bar
from reqat.config.ptq import AWQOptions
from reqat.formats import QuantizedTensor, quantize, quantize_dequantize
from reqat.methods.layerwise import Step, WeightProblem, hooked, solve_weights, walk
from reqat.methods.ptq._method import Method
from reqat.methods.ptq.gptq import summary
from reqat.methods.ptq.rtn import rtn
from reqat.methods.scaling import FoldableGroup, check_full_precision, groups_of, magnitudes, unchanged
from reqat.methods.transform import Transform
from reqat.models import precision_of
from reqat.models.adapters import KEY, QUERY, blocks_of
from reqat.quant import Precision, block_hadamard, dynamic, fake_quantize

DEFAULTS = AWQOptions()
_FLOOR = 1e-4
_BOUNDS = 10
_UNCLIPPED = (QUERY, KEY)


@torch.no_grad()
def scale(
    model: PreTrainedModel,
    precision: Precision,
    input_ids: Tensor,
    *,
    grid: int = DEFAULTS.grid,
    progress: bool = True,
) -> dict[str, Any]:
    """Search and fold the scales of every group of a full-precision ``model``, in place.

    Args:
        model: as loaded, not quantized.
        precision: what weights (and inputs) will be quantized to.
        input_ids: ``[n, T]`` int64 calibration sequences without padding.
        grid: r is 0, 1/grid, ..., (grid-1)/grid.
        progress: show a bar.

    Returns the relative error of each group before and after, and the chosen r.

    Raises ReqatError for a precision that keeps weights, a quantized model, or bad ``input_ids``.
    """
    if precision.weights is None:
        raise ReqatError(f"AWQ scales weights to be quantized, but {precision} keeps them: take a precision with W4")
    check_full_precision(model, "AWQ")
    found = []
    with bar("AWQ", len(blocks_of(model)), "layers", enabled=progress) as shown:
        for step in walk(model, input_ids):
            groups = [group for group in groups_of(step) if group.divide is not None]
            sizes = magnitudes(step, groups)  # folding one group changes no other's input
            with unchanged(step, "AWQ"):
                found += [_search(step, g, x.mean_K, precision, grid) for g, x in zip(groups, sizes, strict=True)]
            shown.update()
    size = max(1, len(found))
    return {
        "grid": grid,
        "groups": found,
        "group_error_nearest": sum(f["error_nearest"] for f in found) / size,
        "group_error": sum(f["error"] for f in found) / size,
    }


def _search(step: Step, group: FoldableGroup, mean_K: Tensor, precision: Precision, grid: int) -> dict[str, Any]:
    """Choose r for one group and fold its scales."""
    module = _inspected(group)
    calls, reference = _calls(step, module)
    size = sum(float(y.double().square().sum()) for y in reference) or 1.0
    errors = []
    for i in range(grid):
        with _candidate(group, _scales(mean_K, i / grid), precision):
            outputs = [_first(module(*args, **kwargs)) for args, kwargs in calls]
        pairs = zip(outputs, reference, strict=True)
        errors.append(sum(float((y.double() - z.double()).square().sum()) for y, z in pairs) / size)
    best = min(range(grid), key=lambda i: (errors[i], i))
    if best:
        group.fold(_scales(mean_K, best / grid))
    return {"layer": group.name, "r": best / grid, "error_nearest": errors[0], "error": errors[best]}


def _scales(mean_K: Tensor, r: float) -> Tensor:
    """s(r) [K] float64, all ones at r = 0."""
    s = mean_K.clamp(min=_FLOOR**2).pow(r).clamp(min=_FLOOR)
    return s / (s.max() * s.min()).sqrt()


def _inspected(group: FoldableGroup) -> nn.Module:
    """The module whose output the error is measured on."""
    if len(group.sites) == 1:
        return group.linears[0]
    return group.sites[0].parent


def _calls(step: Step, module: nn.Module) -> tuple[list[tuple[tuple[Any, ...], dict[str, Any]]], list[Tensor]]:
    """The arguments that ``module`` is called with on the step's batches, and what it returns."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    outputs: list[Tensor] = []

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append((args, kwargs))
        outputs.append(_first(output))

    with hooked([module.register_forward_hook(note, with_kwargs=True)]):
        step.run()
    return calls, outputs


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


@contextmanager
def _candidate(group: FoldableGroup, s_K: Tensor, precision: Precision) -> Iterator[None]:
    """Within the block the group's layers compute ``Q(x / s) Q(W s)``, both rotated if the precision rotates."""
    weights, inputs, rotation = dynamic(precision.weights), dynamic(precision.inputs), precision.rotation

    def divided(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0] / s_K.to(args[0])
        if inputs is not None:
            x = fake_quantize(x, inputs, rotation=rotation)
        elif rotation is not None:
            x = block_hadamard(x, rotation)
        return (x, *args[1:])

    linears = group.linears
    kept = [linear.weight.detach().clone() for linear in linears]
    try:
        for linear, weight in zip(linears, kept, strict=True):
            assert weights is not None
            linear.weight.copy_(fake_quantize(weight * s_K.to(weight), weights, rotation=rotation))
        with hooked([linear.register_forward_pre_hook(divided) for linear in linears]):
            yield
    finally:
        for linear, weight in zip(linears, kept, strict=True):
            linear.weight.copy_(weight)


def solve(
    model: PreTrainedModel, input_ids: Tensor, *, clip: bool | None = DEFAULTS.clip, progress: bool = True
) -> dict[str, Any]:
    """Round the weights of a prepared ``model``, in place; clipped first if ``clip`` says so (None: where they
    are integers, which is what the method does unless it is told otherwise)."""
    precision = precision_of(model)
    fmt = precision.weights if precision is not None else None
    if not (clip if clip is not None else fmt is not None and fmt.element_type.integer):
        return {**rtn(model), "clip": False}
    solved = solve_weights(model, input_ids, _clipped, label="AWQ clipping", progress=progress)
    return {"method": "awq", "clip": True, **summary(solved, input_ids)}


@torch.no_grad()
def _clipped(problem: WeightProblem) -> QuantizedTensor:
    """The weight of one layer, each block cut off at the best of the bounds and rounded to nearest."""
    if problem.name.rpartition(".")[2] in _UNCLIPPED:
        return problem.nearest
    fmt, weight, g = problem.nearest.format, problem.weight, problem.nearest.global_scale
    blocks_NBK = weight.unflatten(-1, (-1, fmt.block or weight.shape[-1]))
    size = blocks_NBK.shape[-1]
    # [B, K, K]: second moments within each block of inputs.
    within = torch.stack([problem.hessian[i : i + size, i : i + size] for i in range(0, weight.shape[-1], size)])
    largest = blocks_NBK.abs().amax(-1, keepdim=True)
    least = torch.full(blocks_NBK.shape[:-1], torch.inf, dtype=torch.float64, device=weight.device)
    best = blocks_NBK.clone()
    for i in range(_BOUNDS):
        bound = largest * (1 - i / (2 * _BOUNDS))
        cut = torch.minimum(torch.maximum(blocks_NBK, -bound), bound)
        delta = (quantize_dequantize(cut.flatten(-2), fmt, global_scale=g).view_as(cut) - blocks_NBK).double()
        error = torch.einsum("nbk,bkl,nbl->nb", delta, within, delta)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better[..., None], cut, best)
    return quantize(best.flatten(-2), fmt, global_scale=g, name=problem.name)


METHOD = Method(
    solve,
    transforms=(Transform(scale),),
    settings=AWQOptions,
    solver_needs_data=True,
)
