"""The search of Q-FIT: the error of attention at every point of the grid, for one layer.

What makes it affordable is said in :mod:`reqat.methods.qfit`.

Shapes: n sequences, T tokens, H query heads, G key/value heads, D head_dim, R query rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from reqat.formats import Format, quantize_dequantize
from reqat.methods.qfit.activations import Activations, rope
from reqat.quant import Basis, Precision, block_hadamard

# Smallest s0: a channel that calibration never saw move must not blow up when divided by it.
_EPS = 1e-5
# Query rows of a block: small enough to skip most of the causal triangle's empty half, large enough for the products.
_ROWS = 64
_MIN_ROWS = 16
# Logits held at a time: 1 MiB of float32 stays in a core's cache; a GPU wants big launches.
_CPU_LOGITS, _GPU_LOGITS = 2**18, 2**27
# A softmax denominator, relative to the reference's, outside this range may have lost precision: compute it again.
_SAFE = (1e-20, 1e20)


@dataclass(frozen=True)
class Found:
    """The error map of one layer, the best point, and scale and shift there."""

    errors: Tensor  # [A, B] float64
    choice: tuple[int, int]
    scale: Tensor  # [G, D]
    shift: Tensor  # [G, D]


def pair_scale(key: Tensor, *, share_heads: bool = False) -> Tensor:
    """s0 [G, D] from keys before RoPE [n, G, T, D]: the largest magnitude of each pair, the same in both halves."""
    amax_GD = key.abs().amax(dim=(0, 2))
    first, second = amax_GD.chunk(2, dim=-1)
    pair = torch.maximum(first, second).clamp(min=_EPS)
    if share_heads:
        pair = pair.amax(dim=0, keepdim=True).expand_as(pair)
    return torch.cat((pair, pair), dim=-1)


@torch.no_grad()
def search(
    act: Activations,
    precision: Precision,
    alphas: tuple[float, ...],
    betas: tuple[float, ...],
    *,
    causal: bool,
    scaling: float,
    mean_before_rope: bool,
    share_heads: bool,
    queries: int | None,
    name: str,
    advance: Callable[[], None],
) -> Found:
    """Errors over the grid ``alphas`` x ``betas`` for one layer; ``advance`` is called after each alpha."""
    assert precision.keys is not None
    query, key = rope(act.query, act.cos, act.sin), rope(act.key, act.cos, act.sin)
    basis = Basis(key.shape[-1], f"{name} keys", precision.kv_signs)
    s0_GD = pair_scale(act.key, share_heads=share_heads).double()
    mean_GD = (act.key if mean_before_rope else key).double().mean(dim=(0, 2))
    value_hat = act.value if precision.values is None else _quantized(act.value, precision.values, f"{name} values")
    error = AttentionError(
        query, key, act.value, value_hat, mean_GD.float(), causal=causal, scaling=scaling, queries=queries
    )
    errors = torch.zeros(len(alphas), len(betas), dtype=torch.float64)
    scales_AGD = torch.stack([(s0_GD**a).float() for a in alphas])
    # [A, B, G, D]; mean K~ = mean K / s.
    shifts = torch.stack([torch.stack([(b * mean_GD / s).float() for b in betas]) for s in scales_AGD.double()])
    for i in range(len(alphas)):
        scaled = key / scales_AGD[i][:, None]
        for j, b in enumerate(betas):
            shifted = scaled - shifts[i, j][:, None]
            shifted = basis(shifted)
            if precision.kv_rotation is not None:  # back into the queries' basis after quantizing
                shifted = block_hadamard(shifted, precision.kv_rotation)
            key_hat = _quantized(shifted, precision.keys, f"{name} keys")
            if precision.kv_rotation is not None:
                key_hat = block_hadamard(key_hat, precision.kv_rotation)
            key_hat = basis.back(key_hat)
            errors[i, j] = error(key_hat, b, scales_AGD[i])
        advance()
    best = int(errors.argmin())
    # argmin names no winner among equals; the first one is wanted.
    best = int((errors.flatten() == errors.flatten()[best]).nonzero()[0])
    i, j = divmod(best, len(betas))
    return Found(errors, (i, j), scales_AGD[i].cpu(), shifts[i, j].cpu())


def _quantized(x: Tensor, fmt: Format, name: str) -> Tensor:
    if fmt.global_scale == "static":  # calibrated on these very activations
        fmt = fmt.replace(global_scale="dynamic")
    return quantize_dequantize(x, fmt, name=name)


class AttentionError:
    """Mean squared difference of attention outputs from the full-precision ones, for many candidate keys.

    Args:
        query: [n, H, T, D] after RoPE.
        key: [n, G, T, D] after RoPE; ``value`` likewise.
        value_hat: quantized values.
        mean: [G, D]; a candidate's keys are shifted by ``share * mean`` (in the queries' basis, not divided by s).
        causal, scaling: of the attention.
        queries: how many query positions a sequence, evenly spread, are compared; None for all.

    Calling it with ``key_hat`` [n, G, T, D], ``share`` and the ``scale`` [G, D] by which the keys were divided gives
    the error.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        value_hat: Tensor,
        mean: Tensor,
        *,
        causal: bool = True,
        scaling: float,
        queries: int | None = None,
    ) -> None:
        n, H, T, D = query.shape
        G = key.shape[1]
        group = H // G
        self.batch, self.tokens, self.head_dim = n * G, T, D
        positions = torch.arange(T, device=query.device)
        if queries is not None and queries < T:
            # The last of each of `queries` equal stretches, so that the average context is a little over half of T.
            positions = (torch.arange(1, queries + 1, device=query.device) * T) // queries - 1
        self.numel = n * H * len(positions) * D
        grouped = query.reshape(n, G, group, T, D) * scaling
        value_one = _with_columns(value, 1.0).flatten(0, 1)
        self._value_hat = _with_columns(value_hat, 1.0).flatten(0, 1)
        limit = _CPU_LOGITS if query.device.type == "cpu" else _GPU_LOGITS
        key_flat = key.flatten(0, 1)
        self._blocks: list[_QueryBlock] = []
        # Fewer rows are fewer a block, so that a block spans the same stretch and skips as much of the triangle.
        for rows in positions.split(max(_MIN_ROWS, _ROWS * len(positions) // T) if causal else _ROWS):
            end = int(rows[-1]) + 1 if causal else T
            # Keys that every row of the block sees need no mask; [start, end) are the others.
            start = int(rows[0]) + 1 if causal else T
            seen = (torch.arange(start, end, device=query.device) <= rows[:, None]).float()
            q = grouped[:, :, :, rows].reshape(self.batch, group * len(rows), D)
            chunk = max(1, limit // (q.shape[1] * end))
            block = _QueryBlock(q, q, seen.repeat(group, 1) if start < end else None, start, end, chunk)
            columns, reference = [], []
            for part in block.parts(self.batch):
                logits = torch.bmm(q[part], key_flat[part, :end].transpose(1, 2))
                block.hide_(logits)
                lse = logits.logsumexp(-1, keepdim=True)
                weighted = torch.bmm(logits.sub_(lse).exp_(), value_one[part, :end])
                reference.append(weighted[..., :D])
                columns.append(-lse)
            shifted = torch.matmul(q.view(n, G, -1, D), mean[:, :, None]).reshape(self.batch, -1, 1)
            # Q gets the columns [-lse, q . mean], K [1, share]: the product is the logit minus its maximum's stand-in.
            block.query = torch.cat([q, torch.cat(columns), shifted], dim=-1)
            block.reference = torch.cat(reference)
            self._blocks.append(block)
        largest = max(b.query.shape[1] * b.end * min(b.chunk, self.batch) for b in self._blocks)
        self._logits = query.new_empty(largest)
        self._key = query.new_empty(self.batch, T, D + 2)
        self._key[..., D] = 1.0

    def __call__(self, key_hat: Tensor, share: float, scale: Tensor | None = None) -> float:
        """The error of ``key_hat`` [n, G, T, D]."""
        D = self.head_dim
        n, G, T, _ = key_hat.shape
        keys = self._key.view(n, G, T, D + 2)[..., :D]
        if scale is None:
            keys.copy_(key_hat)
        else:
            torch.mul(key_hat, scale[:, None], out=keys)
        self._key[..., D + 1] = share
        error, safe = self._sum(own_maximum=False)
        if not safe:
            error, _ = self._sum(own_maximum=True)
        return error / self.numel

    def _sum(self, own_maximum: bool) -> tuple[float, bool]:
        D = self.head_dim
        total = self._logits.new_zeros((), dtype=torch.float64)
        low, high = [], []
        for block in self._blocks:
            for part in block.parts(self.batch):
                q = block.query[part]
                shape = (q.shape[0], q.shape[1], block.end)
                logits = self._logits[: shape[0] * shape[1] * shape[2]].view(shape)
                torch.bmm(q, self._key[part, : block.end].transpose(1, 2), out=logits)
                if own_maximum:
                    block.hide_(logits)
                    logits.sub_(logits.amax(-1, keepdim=True))
                logits.exp_()
                # Hiding with zeros after exp, not -inf before: exp of what underflows is many times slower. An unseen
                # logit that overflowed makes NaN here, and the candidate is computed again.
                if block.seen is not None:
                    logits[..., block.start :].mul_(block.seen)
                weighted = torch.bmm(logits, self._value_hat[part, : block.end])
                denominator = weighted[..., D:]
                least, most = torch.aminmax(denominator)
                low.append(least)
                high.append(most)
                out = torch.div(weighted[..., :D], denominator).sub_(block.reference[part]).flatten()
                total += torch.dot(out, out)
        safe = bool(torch.stack(low).amin() > _SAFE[0]) and bool(torch.stack(high).amax() < _SAFE[1])
        return float(total), safe


@dataclass
class _QueryBlock:
    """Query rows of all sequences and heads that are handled together.

    ``query`` [n G, group R, D + 2]; ``reference`` [n G, group R, D]; ``seen`` [group R, end - start], 1 where a row may
    see the key and 0 elsewhere, None if it is all 1; ``chunk`` of the n G at a time.
    """

    query: Tensor
    reference: Tensor
    seen: Tensor | None
    start: int
    end: int
    chunk: int

    def parts(self, batch: int) -> list[slice]:
        """Slices of the first axis."""
        return [slice(i, i + self.chunk) for i in range(0, batch, self.chunk)]

    def hide_(self, logits: Tensor) -> None:
        """Set the logits of unseen keys to -inf, in place."""
        if self.seen is not None:
            logits[..., self.start :].masked_fill_(self.seen == 0, -torch.inf)


def _with_columns(x: Tensor, value: float) -> Tensor:
    return torch.cat([x, x.new_full((*x.shape[:-1], 1), value)], dim=-1)
