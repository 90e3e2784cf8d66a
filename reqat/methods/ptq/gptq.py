"""GPTQ (arXiv 2210.17323): round a weight column by column, and let the columns to come make up for each error.

For inputs with second moments H, rounding W to W^ costs ``tr((W - W^) H (W - W^)^T)``. GPTQ rounds one column at a time
and moves the columns not yet rounded to where they minimize what remains (optimal brain surgeon)::

    e_i = (w_i - round(w_i)) / U_ii,     w_j -= e_i U_ij  for j > i,     U^T U = H^-1, U upper triangular

*Block scales held*: a 4-bit block format shares one scale among 16 or 32 columns. The scales are those of the original
weight, chosen before any column moves, so columns may be visited in any order, whatever block they are in; a column
that moved out of its block's range saturates. *Act-order* visits columns by falling H_ii: those that matter most are
rounded while the most columns are left to correct them.

Columns are handled in batches: inside a batch one by one, the rest of the matrix once a batch, as one matrix product. U
comes from one Cholesky factor of H with rows and columns reversed and one triangular inverse, in float64; H is damped
by a share of its mean diagonal. Rounding itself is the arithmetic of :mod:`reqat.formats`, in float32: with H = 1 the
result is the rounding to nearest, bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.config.ptq import GPTQOptions
from reqat.formats import QuantizedTensor, clamp_affine_
from reqat.methods.layerwise import WeightProblem, few_tokens, solve_weights
from reqat.methods.ptq._method import Method

DEFAULTS = GPTQOptions()
# Columns between two updates of the whole matrix.
_BATCH = 128


def gptq(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    act_order: bool = DEFAULTS.act_order,
    damp: float = DEFAULTS.damp,
    progress: bool = True,
) -> dict[str, Any]:
    """Quantize the weights of a prepared ``model`` by GPTQ, in place; it is frozen then.

    Args:
        model: prepared for a precision that quantizes weights (any format), not frozen.
        input_ids: ``[n, T]`` int64 calibration sequences without padding.
        act_order: visit columns by falling second moment of their input.
        damp: this share of the mean diagonal of H is added to its diagonal.
        progress: show a bar.

    Returns metrics: the relative output error of each linear layer, rounded to nearest and by GPTQ, and their means.

    Raises ValueError as :func:`reqat.methods.layerwise.solve_weights` does.
    """
    solved = solve_weights(
        model,
        input_ids,
        lambda problem: gptq_codes(problem, act_order=act_order, damp=damp),
        label="GPTQ",
        progress=progress,
    )
    return {"method": "gptq", "act_order": act_order, "damp": damp, **summary(solved, input_ids)}


def summary(solved: list[dict[str, Any]], input_ids: Tensor) -> dict[str, Any]:
    """Metrics of what :func:`reqat.methods.layerwise.solve_weights` returned."""
    return {
        "tokens": input_ids.numel(),
        "error_nearest": sum(s["error_nearest"] for s in solved) / len(solved),
        "error": sum(s["error"] for s in solved) / len(solved),
        **few_tokens(solved),
        "layers": solved,
    }


@torch.no_grad()
def gptq_codes(
    problem: WeightProblem, *, act_order: bool = DEFAULTS.act_order, damp: float = DEFAULTS.damp, drift: float = 0.0
) -> QuantizedTensor:
    """The codes that GPTQ chooses for one weight, with the scales of ``problem.nearest``.

    ``drift`` is GPTAQ's share of the input drift that is made up for (:mod:`reqat.methods.ptq.gptaq`); it needs
    ``problem.drift``. Raises ReqatError where the damped H is not positive definite.
    """
    if not damp > 0:
        raise ReqatError(f"GPTQ's damp must be positive, got {damp} (0.01 is usual)")
    N, K = problem.weight.shape
    diagonal = problem.hessian.diagonal()
    order = (
        torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(K, device=diagonal.device)
    )
    U = _inverse_factor(problem.hessian[order][:, order], damp, problem.name)
    P = None
    if drift and problem.drift is not None:
        C = problem.drift[order][:, order]
        C = torch.where(diagonal[order] > 0, C, 0)  # of inputs that never move
        P = drift * (C @ U.T).triu(1) @ U
    W = problem.weight[:, order].double()
    rounding, element = _column_rounding(problem.nearest), problem.nearest.format.element_type
    codes = torch.empty_like(problem.nearest.codes)
    columns = order.tolist()
    for start in range(0, K, _BATCH):
        end = min(start + _BATCH, K)
        batch, U_batch = W[:, start:end], U[start:end, start:end]
        errors = torch.empty_like(batch)
        values = torch.empty(batch.shape, dtype=torch.float32, device=batch.device)  # of the element, before scaling
        for i in range(end - start):
            # Rounding is in float32 like everywhere; the error it leaves is not.
            values[:, i], rounded = rounding(batch[:, i].float(), columns[start + i])
            errors[:, i] = (batch[:, i] - rounded) / U_batch[i, i]
            batch[:, i + 1 :] -= errors[:, i, None] * U_batch[i, i + 1 :]
            if P is not None:
                batch[:, i + 1 :] += batch[:, i, None] * P[start + i, start + i + 1 : end]
        # Columns are not touched after their turn, so `batch` still holds what was rounded.
        codes[:, order[start:end]] = element.encode(values, torch.signbit(batch))
        W[:, end:] -= errors @ U[start:end, end:]
        if P is not None:
            W[:, end:] += batch @ P[start:end, end:]
    return dataclasses.replace(problem.nearest, codes=codes)


def _inverse_factor(hessian: Tensor, damp: float, name: str) -> Tensor:
    """Upper triangular U [K, K] with U^T U = (H + damping)^-1, in float64."""
    damped = hessian.double().clone()
    diagonal = damped.diagonal()
    # An input that never moved has a zero row in H: any positive diagonal leaves its column to itself.
    diagonal += damp * diagonal.mean() if diagonal.mean() > 0 else 1.0
    # H = R R^T with R upper triangular is the Cholesky factorization of H read from the other end, and U = R^-1.
    factor, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if failed:
        raise ReqatError(f"{name}: the second moments of its inputs are not positive definite; use a damp above {damp}")
    identity = torch.eye(len(damped), dtype=torch.float64, device=damped.device)
    return torch.linalg.solve_triangular(factor.flip(0, 1), identity, upper=True)


def _column_rounding(quantized: QuantizedTensor) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    """A function of (float32 column [N], its index): the values to encode, and what they stand for with the scales (and
    zero points) of ``quantized``."""
    fmt = quantized.format
    element = fmt.element_type
    S = quantized.block_scales()  # [N, blocks], or [N, blocks, 2] of positive and negative numbers
    width = quantized.codes.shape[-1] // S.shape[1]
    zero_points = quantized.zero_points() if fmt.zero_point else None

    def rounding(w: Tensor, column: int) -> tuple[Tensor, Tensor]:
        s = S[:, column // width]
        if fmt.asymmetric:
            s = torch.where(w < 0, s[:, 1], s[:, 0])
        values = element.round_(w / s, torch.empty_like(w), rounding=fmt.rounding)
        if zero_points is None:
            return values, values * s
        z = zero_points[:, column // width]
        clamp_affine_(values, z, fmt.element_type.emax)
        return values + z, values * s

    return rounding


METHOD = Method(gptq, settings=GPTQOptions, solver_needs_data=True)
