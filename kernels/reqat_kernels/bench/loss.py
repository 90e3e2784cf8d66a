"""The SEM loss on the common clock: one call is the loss and its gradients, providers are those of ``sem_loss``.

Losses of the same kernel (with the entropy term or without) are held against each other before the clock starts; the
first of each is written apart from our code. Bytes moved are what any implementation must touch: hidden states, the
output matrix, and the gradients of both, once. These are matrix products, so their share of the read roofline is low.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

from reqat_kernels.bench import sem_loss
from reqat_kernels.bench.measure import Absent, Case, Kernel, Needs, Work, Wrong

_TOLERANCE = 1e-5  # relative: losses are sums of rounded numbers, and float32's rounding of a logit is far below
_OURS = ("reqat", "reqat-ce")


def _needs(case: Case) -> Needs:
    """Inputs and their gradients stay as long as a provider's turn; besides, the logits of a chunk and its gradient, or
    of all tokens where the naive loss is computed."""
    shape = sem_loss.Shape(case.tokens, case.D, case.V, case.MiB)
    inputs = 4 * case.D * (case.tokens + case.V)
    naive = sem_loss.naive_bytes(shape) if sem_loss.fits(shape, case.memory_bytes) else 0  # of the host's
    return Needs(held=2 * inputs, passing=max(naive - 2 * inputs, 3 * case.MiB * 2**20 + inputs))


# A provider at a time in memory: operands are gigabytes at the sizes of real models.
SEM_LOSS = Kernel("sem_loss", _needs, resident=False)


def cases(shape: str, *, device: str = "cpu") -> list[Case]:
    """The case of a name in ``sem_loss.SHAPES``. Raises ValueError for another."""
    if shape not in sem_loss.SHAPES:
        raise ValueError(f"no shape {shape!r} of the SEM loss; there are {', '.join(sem_loss.SHAPES)}")
    s = sem_loss.SHAPES[shape]
    return [Case("sem_loss", (("tokens", s.N), ("D", s.D), ("V", s.V), ("MiB", s.chunk_mib)), device)]


@lru_cache(maxsize=1)
def _inputs(shape: sem_loss.Shape, device: str) -> Any:
    return sem_loss.operands(shape, device)


@lru_cache(maxsize=8)
def _expected(shape: sem_loss.Shape, device: str, name: str) -> float:
    """The loss by a peer."""
    loss = sem_loss.providers(shape)[name]
    return float(sem_loss.step(loss, _inputs(shape, device)))


def _make(case: Case, name: str) -> Work:
    shape = sem_loss.Shape(case.tokens, case.D, case.V, case.MiB)
    loss = sem_loss.providers(shape)[name]
    with_entropy = name in ("naive", "reqat")
    if with_entropy and not sem_loss.fits(shape, case.memory_bytes, case.device):
        if name == "naive":
            raise Absent("its logits do not fit in the memory that is free, or that the benchmark may take.")
        with_entropy = False
    inputs = _inputs(shape, case.device)
    call = partial(sem_loss.step, loss, inputs)

    def check() -> None:
        if name == "reqat" and not with_entropy:  # nobody is left to hold it against; its tests do
            return
        peer = "naive" if with_entropy else "ce-forward"
        wanted = _expected(shape, case.device, peer)
        found = wanted if name == peer else float(call())
        if not abs(found - wanted) <= _TOLERANCE * abs(wanted):
            raise Wrong(f"the loss is {found}, should be {wanted}")

    moved = 2 * 4 * case.D * (case.tokens + case.V)
    return Work(
        run=lambda i: call(),
        copies=1,
        bytes_moved=moved,
        check=check,
        peak_bytes=lambda: sem_loss.peak_extra_mib(call, inputs) * 2**20,
    )


def _register() -> None:
    for name in ("naive", "ce-forward", "ce-recompute", *_OURS):

        def make(case: Case, name: str = name) -> Work:
            return _make(case, name)

        SEM_LOSS.provider(name, format="FP32", devices=("cpu", "cuda"), ours=name in _OURS)(make)


_register()
