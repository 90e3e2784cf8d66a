"""Cross-entropy plus selective entropy minimization, from hidden states, without ever holding all logits.

The loss over N response tokens is ``sum_n nll_n + lambda * sum_n w_n H_n`` (:mod:`reqat.methods.terms.sem` says why).
At 25k tokens and a vocabulary of 152k one float32 copy of the logits is 15 GB, and autograd wants several. Here the
head's matrix product is part of the loss: logits exist for one chunk of tokens at a time, and the gradients of the
hidden states and of the head's weight are summed chunk by chunk, in the forward pass, while the chunk's logits are
there. With p = softmax(z) and constants w, the gradient of a row of logits is::

    dL/dz = nll * (p - onehot(label)) - lambda * w * p * (log p + H)

The weights need the entropies of the whole minibatch first, so there are two sweeps: logits -> nll and H (no gradient),
then logits again -> gradients. What that costs, in matrix products of N x V x D: a chunked cross-entropy needs three
(logits, gradient of hidden, gradient of weight), two sweeps need four. Some of the fourth is saved: the last chunk of
the first sweep opens the second, its logits still at hand. A chunk is therefore as large as the memory budget allows,
and a minibatch of one chunk pays nothing. Without an entropy term one sweep is enough. Within a chunk the elementwise
work goes over tiles of a few rows that fit the cache.

Trade-offs. Recomputing the logits is the price of not holding them. Under autocast the products run in its dtype and
logits are rounded to it, as the head's own forward pass would; the weight is cast block by block, because a whole cast
copy can be larger than all the rest. Everything else, the sums over vocabulary and tokens included, is at least
float32. Gradients are made in the forward pass, so one backward pass is all that a loss value is good for.

Source: SEM is arXiv 2606.15682, section 3.3; gradients in the forward sweep are common practice for large vocabularies.

Shapes: N tokens, C tokens of a chunk, R rows of a tile, V vocabulary, D hidden size; B columns of a block of V.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from reqat_kernels.products import cpu_multiplies, mm

#: Logits held at once, in bytes: almost all the memory that the loss takes beside its gradients.
CHUNK_BYTES = 320 * 2**20
# A block of the weight, cast to the dtype of the products or as a gradient not yet added up.
_BLOCK_BYTES = 32 * 2**20
# A tile of rows, per thread: with its two scratch copies it stays in a second-level cache of 1 MiB.
_TILE_BYTES = 256 * 2**10
#: Where SEM's tau comes from, see :func:`sem_bounds`.
TAUS = ("minibatch", "released")
_LOG2_E = math.log2(math.e)


def fused_sem_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    lam: float = 0.1,
    percentile: float = 0.75,
    binary: bool = False,
    eps: float = 1e-12,
    tau: str = "minibatch",
    bounds: tuple[float, float] | None = None,
    nll: float = 1.0,
    chunk: int | None = None,
    rows: ModuleType | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """``nll * sum_n nll_n + lam * sum_n w_n H_n`` in nats, with gradients to hidden states and the head's weight.

    Args:
        hidden_ND: ``[N, D]`` hidden states that the head sees, any strides.
        weight_VD: ``[V, D]`` the head's weight. Where it takes no gradient (frozen), the product for it is saved.
        labels_N: ``[N]`` int64 in ``[0, V)``; drop ignored positions first.
        lam: factor of the entropy term (lambda); 0 leaves the cross-entropy, in one sweep.
        percentile, binary, eps, tau, bounds: of the weights, see :func:`sem_weights`.
        nll: factor of the negative log-likelihood.
        chunk: tokens whose logits are held at once; by default what :data:`CHUNK_BYTES` hold.
        rows: the module that does the elementwise work (``row_statistics``, ``row_gradient_``); by default Triton's
            for tensors on a GPU, this one for others.

    Returns:
        The loss, a scalar of at least float32, to be passed backward at most once; and the unweighted sums of its
        parts, ``{"nll": ..., "sem": ...}``. Under autocast the matrix products run in its dtype, otherwise both
        inputs must have one dtype. The weight's gradient has the weight's dtype, and is summed in it.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a label out of range, an option out of range; NaN or
            infinity in ``hidden`` (named) or in the logits.
    """
    dtype = _check(hidden_ND, weight_VD, labels_N)
    if not (0 <= percentile <= 1 and eps > 0 and lam >= 0):
        raise ValueError(
            f"lam must be 0 or more, percentile in [0, 1] and eps above 0, got {lam}, {percentile} and {eps}"
        )
    _check_tau(tau)
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}; leave it out to fit it to the memory budget")
    if rows is None:
        rows = _rows_for(hidden_ND)
    grad = torch.is_grad_enabled()
    plan = _Plan(
        dtype=dtype,
        lam=float(lam),
        nll=float(nll),
        weights={"percentile": percentile, "binary": binary, "eps": eps, "tau": tau, "bounds": bounds},
        chunk=chunk or max(1, CHUNK_BYTES // max(1, weight_VD.shape[0] * dtype.itemsize)),
        rows=rows,
        hidden_grad=grad and hidden_ND.requires_grad,
        weight_grad=grad and weight_VD.requires_grad,
    )
    loss, sums_2 = _FusedSEMLoss.apply(hidden_ND, weight_VD, labels_N, plan)
    nll_sum, sem_sum = sums_2.tolist()
    return loss, {"nll": nll_sum, "sem": sem_sum}


@torch.no_grad()
def entropies_from_hidden(hidden_ND: Tensor, weight_VD: Tensor, *, chunk: int | None = None) -> Tensor:
    """Shannon entropy in nats of each token's distribution, ``[N]`` of at least float32, without gradient.

    Logits are ``hidden @ weight.T`` as in :func:`fused_sem_loss`, held for ``chunk`` tokens at a time. Raises its
    errors.
    """
    dtype = _check(hidden_ND, weight_VD, torch.zeros(len(hidden_ND), dtype=torch.int64, device=hidden_ND.device))
    N, V = len(hidden_ND), len(weight_VD)
    step = min(chunk or max(1, CHUNK_BYTES // max(1, V * dtype.itemsize)), max(1, N))
    rows = _rows_for(hidden_ND)
    plan = _Plan(dtype, 1.0, 0.0, {}, step, rows, hidden_grad=False, weight_grad=False)
    buffer_CV = torch.empty(step, V, dtype=dtype, device=hidden_ND.device)
    entropy_N = torch.empty(N, dtype=_wide(dtype), device=hidden_ND.device)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        head = _Head(hidden_ND, weight_VD, plan)
        for start in range(0, N, step):
            c = slice(start, min(start + step, N))
            lse_C, entropy_N[c] = rows.row_statistics(head.logits(c, buffer_CV[: c.stop - c.start]), entropy=True)
            _check_finite(lse_C)
    return entropy_N


def sem_bounds(entropies_N: Tensor, *, percentile: float = 0.75, tau: str = "minibatch") -> tuple[float, float]:
    """``H_min`` and ``tau`` of entropies in nats, of which there is at least one.

    ``tau``: ``minibatch`` is the percentile of the paper's text, between order statistics by linear interpolation;
    ``released`` is the ``floor(percentile * N)``-th smallest entropy (at least the first), as in the code that the
    paper released. Raises ValueError if an entropy is not finite (the model has diverged), or ``tau`` is neither.
    """
    _check_tau(tau)
    entropies = entropies_N.detach()
    _check_entropies(entropies)
    if tau == "released":
        rank = max(1, math.floor(percentile * entropies.numel()))
        return float(entropies.min()), float(entropies.sort().values[rank - 1])
    return float(entropies.min()), float(_quantile(entropies, percentile))


def sem_weights(
    entropies_N: Tensor,
    *,
    percentile: float = 0.75,
    binary: bool = False,
    eps: float = 1e-12,
    tau: str = "minibatch",
    bounds: tuple[float, float] | None = None,
) -> Tensor:
    """SEM's token weights ``[N]`` in [0, 1] from entropies in nats, without gradient.

    ``w = max(0, 1 - (H - H_min) / (tau - H_min + eps))`` with ``H_min`` and ``tau`` those of :func:`sem_bounds`, or
    ``bounds`` where the entropies are a part of a larger batch. ``binary`` is the paper's ablation ``w = 1[H < tau]``.
    Where all entropies are equal (one token, say), ``tau = H_min``: the formula gives every token weight 1, the binary
    mask weight 0. No tokens give no weights.

    Raises:
        ValueError: an entropy is not finite (the model has diverged), or ``tau`` is neither of the two.
    """
    entropies = entropies_N.detach()
    if entropies.numel() == 0:
        return torch.zeros_like(entropies)
    _check_entropies(entropies)
    lowest, threshold = map(entropies.new_tensor, bounds or sem_bounds(entropies, percentile=percentile, tau=tau))
    if binary:
        return (entropies < threshold).to(entropies.dtype)
    # Above 1 only where a bound of the larger batch was rounded differently.
    return (1 - (entropies - lowest) / (threshold - lowest + eps)).clamp_(0, 1)


def _check_tau(tau: str) -> None:
    if tau not in TAUS:
        raise ValueError(f"tau is {' or '.join(TAUS)}, got {tau!r}")


def _check_entropies(entropies: Tensor) -> None:
    if not torch.isfinite(entropies).all():
        bad = int((~torch.isfinite(entropies)).sum())
        raise ValueError(
            f"SEM: {bad} of {entropies.numel()} token entropies are not finite: the logits hold NaN or infinity; "
            "lower the learning rate, or start from another checkpoint"
        )


def _quantile(x_N: Tensor, q: float) -> Tensor:
    """``torch.quantile(x, q)``, which refuses more than 16M elements, by the two order statistics around it."""
    ordered = x_N.sort().values
    position = q * (x_N.numel() - 1)
    low = min(int(position), x_N.numel() - 1)
    high = min(low + 1, x_N.numel() - 1)
    return torch.lerp(ordered[low], ordered[high], position - low)


def row_statistics(logits_CV: Tensor, *, entropy: bool = True) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and Shannon entropy of each row ``[C, V]``: two ``[C]`` tensors of at least float32.

    ``H = log S - sum_v e^(z_v - m) (z_v - m) / S`` with m the row's maximum and S the sum of ``e^(z_v - m)``: both
    summands are positive, nothing cancels. Without ``entropy`` the second tensor is zeros. The logits are not changed.
    """
    wide = _wide(logits_CV.dtype)
    lse_C = torch.empty(len(logits_CV), dtype=wide, device=logits_CV.device)
    entropy_C = torch.zeros_like(lse_C)
    for tile, shifted_RV, exp_RV in _tiles(logits_CV, wide):
        # A copy first: torch.sub of two bf16 would round the difference to bf16, and bf16 reductions are slow.
        top_R1 = shifted_RV.copy_(logits_CV[tile]).amax(-1, keepdim=True)
        shifted_RV.sub_(top_R1)
        _exp(shifted_RV, exp_RV)
        sum_R = exp_RV.sum(-1)
        log_R = sum_R.log()
        torch.add(top_R1[:, 0], log_R, out=lse_C[tile])
        if entropy:
            torch.sub(log_R, exp_RV.mul_(shifted_RV).sum(-1).div_(sum_R), out=entropy_C[tile])
    return lse_C, entropy_C


def row_gradient_(logits_CV: Tensor, lse_C: Tensor, entropy_C: Tensor, pull_C: Tensor | None, nll: float) -> Tensor:
    """Logits ``[C, V]`` become ``p * (nll - pull * (log p + H))``, in place: their gradient but for the label's column.

    ``pull_C`` is ``lambda * w``; None stands for zeros.
    """
    wide = _wide(logits_CV.dtype)
    slope_C = base_C = None
    pulled: list[bool] = []
    if pull_C is not None:
        slope_C, base_C = -pull_C, nll - pull_C * entropy_C
        pulled = (pull_C != 0).tolist()
    for tile, log_p_RV, p_RV in _tiles(logits_CV, wide):
        log_p_RV.copy_(logits_CV[tile]).sub_(lse_C[tile, None])
        _exp(log_p_RV, p_RV)
        if slope_C is not None and base_C is not None and any(pulled[tile]):
            p_RV.mul_(log_p_RV.mul_(slope_C[tile, None]).add_(base_C[tile, None]))
        elif nll != 1:
            p_RV.mul_(nll)
        logits_CV[tile] = p_RV
    return logits_CV


def _label_gradient(log_p_C: Tensor, entropy_C: Tensor, pull_C: Tensor | None, nll: float) -> Tensor:
    """The gradient at the label's logit, ``nll * (p - 1) - pull * p * (log p + H)``, ``[C]``.

    Made apart from the rest and before it is rounded to the logits' dtype, by expm1: where p is nearly 1, p - 1 has no
    correct digit left.
    """
    grad_C = log_p_C.expm1().mul_(nll)
    if pull_C is not None:
        grad_C -= pull_C * log_p_C.exp() * (log_p_C + entropy_C)
    return grad_C


def _exp(x: Tensor, out: Tensor) -> None:
    """``out = e^x`` as ``2^(x log2 e)``: on CPUs torch.exp2 takes a third of torch.exp's time, which was the longest.

    The product costs ``|x|`` more half ulps, as many as the subtraction that made x has cost already.
    """
    torch.mul(x, _LOG2_E, out=out).exp2_()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _tiles(logits_CV: Tensor, wide: torch.dtype) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Slices of a few rows, each with two scratch tensors of its shape."""
    n, size = logits_CV.shape
    threads = torch.get_num_threads() if logits_CV.device.type == "cpu" else 64
    step = min(max(1, threads * _TILE_BYTES // max(1, size * wide.itemsize)), max(1, n))
    scratch = torch.empty(2, step, size, dtype=wide, device=logits_CV.device)
    for start in range(0, n, step):
        stop = min(start + step, n)
        yield slice(start, stop), scratch[0, : stop - start], scratch[1, : stop - start]


@dataclass(frozen=True)
class _Plan:
    """What stays the same over all chunks of one loss."""

    dtype: torch.dtype  # of the matrix products, and of the logits
    lam: float
    nll: float
    weights: dict[str, Any]
    chunk: int
    rows: ModuleType
    hidden_grad: bool
    weight_grad: bool

    @property
    def two_sweeps(self) -> bool:
        return self.lam != 0


class _FusedSEMLoss(torch.autograd.Function):
    """Loss and sums; the gradients wait in ``ctx`` for the factor that backward brings."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, plan: _Plan) -> tuple[Tensor, Tensor]:
        with torch.autocast(hidden_ND.device.type, enabled=False):
            sums_2, ctx.hidden_grad, ctx.weight_grad = _sweeps(hidden_ND, weight_VD, labels_N, plan)
        ctx.spent = False
        factors_2 = torch.tensor([plan.nll, plan.lam], dtype=torch.float64, device=sums_2.device)
        # A term that is left out must not turn an infinite sum into NaN: 0 * inf.
        loss = torch.where(factors_2 == 0, 0.0, factors_2 * sums_2).sum().to(_wide(plan.dtype))
        ctx.mark_non_differentiable(sums_2)
        return loss, sums_2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        if ctx.spent:
            raise RuntimeError(
                "this SEM loss was passed backward before: its gradients, made in the forward pass, were handed out; "
                "compute the loss again"
            )
        ctx.spent = True
        # Handed out, not kept: autograd may then adopt the tensors as .grad instead of copying them.
        hidden_grad, weight_grad = ctx.hidden_grad, ctx.weight_grad
        ctx.hidden_grad = ctx.weight_grad = None
        for grad in (hidden_grad, weight_grad):
            if grad is not None:
                grad.mul_(grads[0])
        return hidden_grad, weight_grad, None, None


def _sweeps(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, plan: _Plan
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Sums of nll and ``w H`` ``[2]`` in float64, and the gradients that ``plan`` wants."""
    N, V = len(hidden_ND), len(weight_VD)
    wide, device = _wide(plan.dtype), hidden_ND.device
    head = _Head(hidden_ND, weight_VD, plan)
    # The remainder goes first, so that a whole chunk is last, whose logits the second sweep finds still there.
    first = N % plan.chunk
    edges = [0, *range(first or min(plan.chunk, N), N + 1, plan.chunk)] if N else [0]
    chunks = [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]
    buffer_CV = torch.empty(min(plan.chunk, N), V, dtype=plan.dtype, device=device)
    nll_N = torch.empty(N, dtype=wide, device=device)
    lse_N = torch.empty(N, dtype=wide, device=device)
    entropy_N = torch.zeros(N, dtype=wide, device=device)
    wants_grad = plan.hidden_grad or plan.weight_grad

    def gradients(c: slice, logits_CV: Tensor, pull_N: Tensor | None) -> None:
        pull_C = None if pull_N is None else pull_N[c]
        label_C = _label_gradient(-nll_N[c], entropy_N[c], pull_C, plan.nll)
        plan.rows.row_gradient_(logits_CV, lse_N[c], entropy_N[c], pull_C, plan.nll)
        # Not scatter_: of bfloat16 it makes two copies of the whole chunk.
        rows_C = torch.arange(len(label_C), dtype=torch.int64, device=device)
        logits_CV[rows_C, labels_N[c]] = label_C.to(logits_CV.dtype)
        head.add_gradients(c, logits_CV)

    for c in chunks:
        logits_CV = head.logits(c, buffer_CV[: c.stop - c.start])
        lse_N[c], entropy_N[c] = plan.rows.row_statistics(logits_CV, entropy=plan.two_sweeps)
        nll_N[c] = lse_N[c] - logits_CV.gather(1, labels_N[c, None])[:, 0]
        if wants_grad and not plan.two_sweeps:
            gradients(c, logits_CV, None)
    _check_finite(lse_N)
    weights_N = sem_weights(entropy_N, **plan.weights) if plan.two_sweeps else torch.zeros_like(entropy_N)
    if wants_grad and plan.two_sweeps:
        pull_N = weights_N * plan.lam
        for i, c in enumerate(reversed(chunks)):
            logits_CV = buffer_CV[: c.stop - c.start]
            gradients(c, logits_CV if i == 0 else head.logits(c, logits_CV), pull_N)
    sums_2 = torch.stack([nll_N.double().sum(), torch.dot(weights_N.double(), entropy_N.double())])
    return sums_2, head.hidden_grad, head.weight_grad


class _Head:
    """The three matrix products with the head's weight, cast and accumulated block by block where dtypes differ."""

    def __init__(self, hidden_ND: Tensor, weight_VD: Tensor, plan: _Plan):
        self.dtype = plan.dtype
        self.hidden_ND = hidden_ND.detach().to(plan.dtype).contiguous()
        self.weight_VD = weight_VD.detach()
        self.hidden_grad: Tensor | None = None
        if plan.hidden_grad:
            self.hidden_grad = torch.empty(hidden_ND.shape, dtype=hidden_ND.dtype, device=hidden_ND.device)
        self.weight_grad = torch.zeros_like(self.weight_VD) if plan.weight_grad else None
        V, D = weight_VD.shape
        step = V if weight_VD.dtype == plan.dtype else max(1, _BLOCK_BYTES // max(1, D * 4))
        self.blocks = [slice(v, min(v + step, V)) for v in range(0, V, max(1, step))]

    def logits(self, c: slice, out_CV: Tensor) -> Tensor:
        """``hidden[c] @ weight.T`` into ``out_CV``."""
        for b in self.blocks:
            mm(self.hidden_ND[c], self.weight_VD[b].to(self.dtype).t(), out_CV[:, b])
        return out_CV

    def add_gradients(self, c: slice, grad_CV: Tensor) -> None:
        """From the gradient of the logits of ``c`` those of hidden (set) and weight (added to)."""
        if self.hidden_grad is not None:
            if len(self.blocks) == 1:
                self.hidden_grad[c] = mm(grad_CV, self.weight_VD.to(self.dtype))
            else:
                total_CD = torch.zeros_like(self.hidden_ND[c], dtype=_wide(self.dtype))
                for b in self.blocks:
                    total_CD += mm(grad_CV[:, b], self.weight_VD[b].to(self.dtype))
                self.hidden_grad[c] = total_CD
        if self.weight_grad is not None:
            for b in self.blocks:
                if self.weight_grad.dtype == self.dtype and (self.weight_grad.is_cuda or cpu_multiplies(self.dtype)):
                    self.weight_grad[b].addmm_(grad_CV[:, b].t(), self.hidden_ND[c])
                else:
                    self.weight_grad[b] += mm(grad_CV[:, b].t(), self.hidden_ND[c])


def _check(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> torch.dtype:
    """The dtype of the matrix products. Raises ValueError for inputs that do not fit together."""
    shapes = f"hidden {list(hidden_ND.shape)}, weight {list(weight_VD.shape)}, labels {list(labels_N.shape)}"
    if (
        hidden_ND.dim() != 2
        or weight_VD.dim() != 2
        or labels_N.dim() != 1
        or hidden_ND.shape[1] != weight_VD.shape[1]
        or hidden_ND.shape[0] != labels_N.shape[0]
    ):
        raise ValueError(f"the SEM loss takes hidden [N, D], weight [V, D] and labels [N], got {shapes}")
    if not hidden_ND.device == weight_VD.device == labels_N.device:
        raise ValueError(
            f"hidden, weight and labels must be on one device, got {hidden_ND.device}, {weight_VD.device} and "
            f"{labels_N.device}"
        )
    if labels_N.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels_N.dtype}; convert them with .long()")
    if not (hidden_ND.is_floating_point() and weight_VD.is_floating_point()):
        raise ValueError(f"hidden and weight must be floating point, got {hidden_ND.dtype} and {weight_VD.dtype}")
    device = hidden_ND.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden_ND.dtype, weight_VD.dtype):
        dtype = torch.get_autocast_dtype(device)
    elif hidden_ND.dtype == weight_VD.dtype:
        dtype = hidden_ND.dtype
    else:
        raise ValueError(
            f"hidden is {hidden_ND.dtype}, weight {weight_VD.dtype}: convert one of them, or run under torch.autocast"
        )
    if labels_N.numel():
        low, high = (int(x) for x in labels_N.aminmax())
        if low < 0 or high >= len(weight_VD):
            raise ValueError(
                f"labels must lie in [0, {len(weight_VD)}), got {low} to {high}; drop the positions without a target "
                "before the loss"
            )
    bad = int((~torch.isfinite(hidden_ND.detach())).sum())
    if bad:
        raise ValueError(
            f"hidden holds {bad} NaN or infinite values of {hidden_ND.numel()}: the model has diverged; lower the "
            "learning rate, or start from another checkpoint"
        )
    return dtype


def _check_finite(lse_N: Tensor) -> None:
    bad = int((~torch.isfinite(lse_N)).sum())
    if bad:
        raise ValueError(
            f"the logits of {bad} of {lse_N.numel()} tokens hold NaN or infinity though hidden does not: look for them "
            "in the head's weight, or for an overflow of the product"
        )


def _rows_for(x: Tensor) -> ModuleType:
    if x.is_cuda and x.dtype != torch.float64:
        from reqat_kernels.triton import runtime, sem_loss

        if runtime.AVAILABLE:  # without triton torch's own operations do the same, in more passes
            return sem_loss
    return sys.modules[__name__]
