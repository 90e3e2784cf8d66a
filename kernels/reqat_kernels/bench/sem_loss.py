"""The fused SEM loss and its competitors in float32; :mod:`reqat_kernels.bench.loss` puts them on the clock.

    naive           full logits and autograd, the formula of :mod:`reqat.methods.terms.sem` as it is written
    ce-forward      chunked cross-entropy that computes its gradient in the forward sweep: 3 matrix products, no SEM
    ce-recompute    chunked cross-entropy that recomputes the logits in backward: 4 matrix products, no SEM
    reqat-ce        ours without the entropy term
    reqat           ours with it: 4 products less what the chunk kept between the sweeps saves

The peers are plain PyTorch, written apart from our code, and given the same memory for logits; their elementwise work
goes over tiles of rows that fit the cache, as ours does.

Peak extra memory is the process's high-water mark over one call (loss and backward) less what it held before and
less the two gradients, which are output. It needs Linux's ``clear_refs`` or a GPU; elsewhere it is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reqat_kernels.sem_loss import fused_sem_loss

TILE_BYTES = 512 * 2**10
LAM = 0.1


@dataclass(frozen=True)
class Shape:
    """N tokens, D hidden size, V vocabulary, and the memory for logits in MiB."""

    N: int
    D: int
    V: int
    chunk_mib: int = 320


SHAPES = {
    "a": Shape(8192, 576, 49152),
    "b": Shape(2048, 4096, 151936),
    "small": Shape(1024, 576, 49152, chunk_mib=40),  # an eighth of a, in as many chunks
    "tiny": Shape(64, 32, 512, chunk_mib=1),
}

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def naive(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """All logits at once; autograd keeps what it wants."""
    log_p = F.log_softmax(F.linear(hidden, weight).float(), -1)
    H = -(log_p.exp() * log_p).sum(-1)
    held = H.detach()
    lowest = held.min()
    w = (1 - (held - lowest) / (torch.quantile(held, 0.75) - lowest + 1e-12)).clamp(min=0)
    return F.nll_loss(log_p, labels, reduction="sum") + LAM * (w * H).sum()


def _probabilities_(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits become ``p - onehot`` in place, by tiles of rows; the sum of nll comes back."""
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for z, y in zip(*(x.split(max(1, TILE_BYTES // (4 * logits.shape[1]))) for x in (logits, labels)), strict=True):
        log_p = torch.log_softmax(z, -1)
        total -= log_p.gather(1, y[:, None]).sum()
        p = log_p.exp_()
        p[torch.arange(len(y), device=y.device), y] -= 1
        z.copy_(p)
    return total


def _nll(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of nll, by tiles of rows."""
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for z, y in zip(*(x.split(max(1, TILE_BYTES // (4 * logits.shape[1]))) for x in (logits, labels)), strict=True):
        total += (torch.logsumexp(z, -1) - z.gather(1, y[:, None])[:, 0]).sum()
    return total


class _ForwardCE(torch.autograd.Function):
    """Chunked cross-entropy with its gradient from the forward sweep."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, W: Tensor, labels: Tensor, chunk: int) -> Tensor:
        loss = torch.zeros((), dtype=torch.float64, device=h.device)
        grad_h, grad_W = torch.empty_like(h), torch.zeros_like(W)
        logits = torch.empty(min(chunk, len(h)), len(W), dtype=torch.float32, device=h.device)
        for start in range(0, len(h), chunk):
            c = slice(start, min(start + chunk, len(h)))
            g = torch.mm(h[c], W.T, out=logits[: c.stop - c.start])
            loss += _probabilities_(g, labels[c])
            grad_h[c] = g @ W
            grad_W.addmm_(g.T, h[c])
        ctx.grads = grad_h, grad_W
        return loss.float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_h, grad_W = ctx.grads
        del ctx.grads
        return grad_h.mul_(grads[0]), grad_W.mul_(grads[0]), None, None


class _RecomputeCE(torch.autograd.Function):
    """Chunked cross-entropy that keeps nothing and makes the logits again in backward."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, W: Tensor, labels: Tensor, chunk: int) -> Tensor:
        ctx.save_for_backward(h, W, labels)
        ctx.chunk = chunk
        loss = torch.zeros((), dtype=torch.float64, device=h.device)
        logits = torch.empty(min(chunk, len(h)), len(W), dtype=torch.float32, device=h.device)
        for start in range(0, len(h), chunk):
            c = slice(start, min(start + chunk, len(h)))
            loss += _nll(torch.mm(h[c], W.T, out=logits[: c.stop - c.start]), labels[c])
        return loss.float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h, W, labels = ctx.saved_tensors
        grad_h, grad_W = torch.empty_like(h), torch.zeros_like(W)
        logits = torch.empty(min(ctx.chunk, len(h)), len(W), dtype=torch.float32, device=h.device)
        for start in range(0, len(h), ctx.chunk):
            c = slice(start, min(start + ctx.chunk, len(h)))
            g = torch.mm(h[c], W.T, out=logits[: c.stop - c.start])
            _probabilities_(g, labels[c])
            grad_h[c] = g @ W
            grad_W.addmm_(g.T, h[c])
        return grad_h.mul_(grads[0]), grad_W.mul_(grads[0]), None, None


def providers(shape: Shape) -> dict[str, Loss]:
    """Name -> function to the loss; all with the shape's memory for logits."""
    rows = max(1, shape.chunk_mib * 2**20 // (4 * shape.V))

    def ours(lam: float) -> Loss:
        return lambda h, W, y: fused_sem_loss(h, W, y, lam=lam, chunk=rows)[0]

    def peer(function: type[torch.autograd.Function]) -> Loss:
        return lambda h, W, y: function.apply(h, W, y, rows)

    return {
        "naive": naive,
        "ce-forward": peer(_ForwardCE),
        "ce-recompute": peer(_RecomputeCE),
        "reqat-ce": ours(0.0),
        "reqat": ours(LAM),
    }


def operands(shape: Shape, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 hidden states from undecided to certain tokens, a weight, labels; hidden and weight take gradients."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(shape.N, shape.D, generator=g) * torch.linspace(0.2, 6, shape.N)[:, None]
    weight = torch.randn(shape.V, shape.D, generator=g).mul_(shape.D**-0.5)
    labels = torch.randint(shape.V, (shape.N,), generator=g)
    return hidden.to(device).requires_grad_(), weight.to(device).requires_grad_(), labels.to(device)


def step(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor]) -> float:
    """One call: loss, and the gradients into ``.grad``, which are freed first. Returns the loss."""
    hidden, weight, _ = inputs
    hidden.grad = weight.grad = None
    value = loss(*inputs)
    value.backward()
    return float(value.detach())


def peak_extra_mib(call: Callable[[], Any], inputs: tuple[Tensor, Tensor, Tensor]) -> float:
    """High-water mark of one call, less what was held before and less the gradients of ``inputs``, in MiB."""
    inputs[0].grad = inputs[1].grad = None
    output = sum(t.nbytes for t in inputs[:2])
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before - output) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from what is held now
        held = _status_bytes("VmRSS")
        call()
        return (_status_bytes("VmHWM") - held - output) / 2**20
    except OSError:
        return math.nan


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


_BESIDES = 1.2e9  # bytes: Python, torch, the operands of the largest shape


def naive_bytes(shape: Shape) -> int:
    """What the naive loss takes beyond its inputs: about five float32 copies of the logits, and two of the weight."""
    return 4 * (5 * shape.N * shape.V + 2 * shape.V * shape.D)


def fits(shape: Shape, memory: float = math.inf, device: str = "cpu") -> bool:
    """Whether the naive loss has room on a device, in a process that may take ``memory`` bytes of the host's."""
    need = naive_bytes(shape)
    if need + _BESIDES > memory:
        return False
    if device == "cuda":
        return need < torch.cuda.mem_get_info()[0]
    try:
        text = Path("/proc/meminfo").read_text()
        return need < int(text.split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return False
