"""Calibrate Q-FIT on a model, and fold what was found into it."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reqat.config.errors import ReqatError, unknown
from reqat.config.progress import bar
from reqat.methods.layerwise import walk
from reqat.methods.qfit.activations import capture, check_full_precision
from reqat.methods.qfit.result import QFitResult, QKNorm, Variant
from reqat.methods.qfit.search import search
from reqat.methods.scaling import check_unmeasured
from reqat.models import precision_of, prepare
from reqat.models.adapters import Attention, Block, cached_attentions
from reqat.quant import Precision


def calibrate(
    model: PreTrainedModel,
    precision: Precision | str,
    input_ids: Tensor,
    *,
    grid: int = 20,
    scale: bool = True,
    shift: bool = True,
    variant: Variant = "paper",
    qk_norm: QKNorm = "shared",
    queries: int | None = None,
    progress: bool = True,
) -> QFitResult:
    """Search scale and shift of every layer on the full-precision ``model``, which is left as it is.

    Args:
        model: a decoder whose linear layers and KV cache are not quantized.
        precision: how keys and values will be quantized (a static global scale is taken from the calibration data).
        input_ids: ``[n, T]`` int64, whole sequences without padding.
        grid: the exponents a and shares b are 0, 1/grid, ..., (grid-1)/grid.
        scale, shift: False holds a (or b) at 0: the paper's ablations.
        variant: ``"paper"``; or ``"released"``, where the authors' code differs: the shift starts from the mean of the
            keys *before* RoPE, and the attention of the calibration is neither causal nor scaled by 1/sqrt(D).
        qk_norm: for models with QK norm, see the module's docstring; ignored for others.
        queries: compare the attention outputs of this many query positions a sequence, evenly spread, instead of all
            (None: exact). Keys and values are always all there; time falls in proportion.
        progress: show a bar.

    Raises:
        ValueError: no quantized keys, a model that is quantized already or not supported, bad ``input_ids`` or options.
    """
    precision = Precision.parse(precision)
    if precision.keys is None:
        raise ReqatError(f"precision {precision} does not quantize keys, so there is nothing for Q-FIT to fit")
    if grid < 1:
        raise ReqatError(f"Q-FIT's grid must have at least 1 point a side, got {grid}")
    if variant not in ("paper", "released"):
        raise unknown("Q-FIT variant", variant, ("paper", "released"))
    if qk_norm not in ("shared", "widened"):
        raise unknown("qk_norm", qk_norm, ("shared", "widened"))
    if queries is not None and queries < 1:
        raise ReqatError(f"Q-FIT needs at least 1 query position a sequence, got queries={queries}")
    layers = _layers(model)
    check_full_precision(layers)
    check_unmeasured(model, "Q-FIT")
    points = tuple(i / grid for i in range(grid))
    alphas, betas = points if scale else (0.0,), points if shift else (0.0,)
    where = qk_norm if all(attention.norms is not None for _, attention in layers) else "none"
    found, seconds = [], []
    with bar("Q-FIT", len(layers) * len(alphas), "scales", enabled=progress) as shown:
        for step in walk(model, input_ids):
            activations = capture(step)
            began = time.perf_counter()
            found.append(
                search(
                    activations,
                    precision,
                    alphas,
                    betas,
                    causal=variant == "paper",
                    scaling=step.block.attention.scaling if variant == "paper" and step.block.attention else 1.0,
                    mean_before_rope=variant == "released",
                    share_heads=where == "shared",
                    queries=queries,
                    name=step.block.name,
                    advance=shown.update,
                )
            )
            seconds.append(time.perf_counter() - began)
    return QFitResult(
        precision=str(precision),
        variant=variant,
        qk_norm=where,
        alphas=alphas,
        betas=betas,
        errors=torch.stack([f.errors for f in found]),
        choice=tuple(f.choice for f in found),
        scale=torch.stack([f.scale for f in found]),
        shift=torch.stack([f.shift for f in found]),
        seconds=tuple(seconds),
    )


@torch.no_grad()
def fold(model: PreTrainedModel, result: QFitResult) -> PreTrainedModel:
    """Put scale and shift into ``model``, in place, and return it; what it computes in full precision stays the same.

    The scale multiplies the rows of Wq and bq and divides those of Wk and bk (with QK norm: the norms' weights). The
    shift becomes ``attention.reqat_kv.shift``, which takes effect where keys are quantized; a model that was not
    prepared is prepared for BF16 to have the place. Computed in float64, rounded once to the weights' type.

    Raises ReqatError for a result of another model, and for frozen weights.
    """
    layers = _layers(model)
    heads = layers[0][1].heads
    expected = (len(layers), heads.kv_heads, heads.head_dim)
    if tuple(result.scale.shape) != expected:
        raise ReqatError(
            f"the Q-FIT result is of another model: it has layers, KV heads and head_dim {tuple(result.scale.shape)}, "
            f"this model has {expected}"
        )
    normed = all(attention.norms is not None for _, attention in layers)
    if normed != (result.qk_norm != "none"):
        raise ReqatError(
            f"the Q-FIT result is of another model: it was calibrated with qk_norm={result.qk_norm!r}, and this model "
            f"{'has' if normed else 'has no'} QK norm"
        )
    check_full_precision(layers, frozen_only=True)
    check_unmeasured(model, "Q-FIT")
    if precision_of(model) is None:
        prepare(model, "BF16")
    repeat = heads.query_heads // heads.kv_heads
    for (_, attention), scale_GD, shift_GD in zip(layers, result.scale.double(), result.shift, strict=True):
        scale_HD = scale_GD.repeat_interleave(repeat, dim=0)
        if result.qk_norm == "none":
            _multiply_rows(attention.query, scale_HD.reshape(-1))
            _multiply_rows(attention.key, scale_GD.reciprocal().reshape(-1))
        else:
            widen = result.qk_norm == "widened"
            _multiply_norm(attention.query_norm, scale_HD, widen)
            _multiply_norm(attention.key_norm, scale_GD.reciprocal(), widen)
        attention.module.reqat_kv.set_shift(shift_GD.to(attention.key.weight.device))
    return model


def _layers(model: PreTrainedModel) -> list[tuple[Block, Attention]]:
    """Raises ReqatError for a model that keeps no keys."""
    layers = cached_attentions(model)
    if not layers:
        raise ReqatError(f"Q-FIT fits cached keys, and model type {model.config.model_type!r} keeps none")
    return layers


def _multiply_rows(linear: nn.Linear, factors: Tensor) -> None:
    weight, bias = linear.weight, linear.bias
    factors = factors.to(weight.device)
    weight.copy_(weight.double() * factors[:, None])
    if bias is not None:
        bias.copy_(bias.double() * factors)


def _multiply_norm(norm: Any, factors_HD: Tensor, widen: bool) -> None:
    weight = norm.weight
    factors_HD = factors_HD.to(weight.device)
    if weight.numel() == factors_HD.numel():  # one norm over all heads (OLMo2), or widened before
        weight.copy_(weight.double() * factors_HD.reshape(weight.shape))
    elif not widen and weight.ndim == 1:
        assert (factors_HD == factors_HD[0]).all(), "one norm weight serves all heads"
        weight.copy_(weight.double() * factors_HD[0])
    else:
        # [D] or [heads, D]; the norm's own code multiplies [..., heads, D] by it either way.
        wide = (weight.double() * factors_HD).to(weight)
        norm.weight = nn.Parameter(wide, requires_grad=weight.requires_grad)
