"""Piecewise-linear tables against the functions that they stand for, as libraries compute these: vectorized.

A table takes the same time whatever its function is, so there is one case a size and a provider a function: libmvec is
glibc's vectorized libm (called from C), torch its own and Sleef's. 1/x and 1/sqrt are instructions of the CPU. All
write into memory that is there already, and inputs stay in the cache: in a model they come from the operation before.

Checks: ours must be right to the last bit; the others compute a function to 4 units in the last place of float32, or
to 1e-6 of its largest value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reqat_kernels.bench.measure import Absent, Case, Kernel, Needs, Work, Wrong
from reqat_kernels.native.library import library
from reqat_kernels.native.table import libmvec, piecewise_linear

TABLE = Kernel("table", lambda case: Needs(held=32 * case.n, passing=256 * case.n))
SEED = 9
_CALLS = 64  # in a burst, on the same numbers
_ULPS = 4 * 2.0**-24


def cases(sizes: Iterable[int], *, ring_bytes: int = 0) -> list[Case]:
    """So many float32 numbers, a multiple of 16."""
    return [Case("table", (("n", size),), ring_bytes=ring_bytes) for size in sizes]


def operand(case: Case) -> Tensor:
    """Numbers [n] where every function is defined and none is constant: from 0.1 to 8."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.rand(case.n, generator=generator, dtype=torch.float32, device="cpu") * 7.9 + 0.1


def table(entries: int) -> tuple[Tensor, Tensor, Tensor]:
    """A table whose breakpoints lie among the numbers, so that all entries are used."""
    generator = torch.Generator().manual_seed(SEED)
    slopes, intercepts = torch.randn(2, entries, generator=generator, dtype=torch.float32, device="cpu")
    ends = torch.linspace(0.1, 8.0, entries + 1, dtype=torch.float32, device="cpu")
    return ends[1:-1].contiguous(), slopes, intercepts


def _work(case: Case, call: Callable[[Tensor], Any], check: Callable[[Tensor, Tensor], None]) -> Work:
    x = operand(case)
    return Work(
        run=lambda i: call(x),
        copies=_CALLS,
        bytes_moved=2 * x.nbytes,
        check=lambda: check(x, call(x)),
        ring_bytes=x.nbytes,
        warm=True,
    )


def _room(case: Case) -> Tensor:
    return torch.empty(case.n, dtype=torch.float32, device="cpu")


def _ours(entries: int) -> None:
    @TABLE.provider("reqat", format=f"table of {entries}", ours=True)
    def native(case: Case) -> Work:
        if library() is None:
            raise Absent("the native library is not built, or REQAT_ISA=torch.")
        parts = table(entries)

        def check(x: Tensor, y: Tensor) -> None:
            at = (parts[0] <= x[:, None]).sum(1)
            if not torch.equal(y, parts[1][at] * x + parts[2][at]):
                raise Wrong("its values are not the table's")

        out = _room(case)
        return _work(case, lambda x: piecewise_linear(x, *parts, out=out), check)


def _within(name: str, exact: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], None]:
    def check(x: Tensor, y: Tensor) -> None:
        expected = exact(x.double())
        bound = _ULPS * expected.abs() + 1e-6 * expected.abs().max()
        if not bool(((y.double() - expected).abs() <= bound).all()):
            raise Wrong(f"{name} is off")

    return check


def _libmvec(name: str, exact: Callable[[Tensor], Tensor]) -> None:
    @TABLE.provider("libmvec", format=name)
    def vectorized(case: Case) -> Work:
        out = _room(case)
        if not libmvec(name, operand(case), out):
            raise Absent(f"this machine's C library has no vectorized {name}.")

        def call(x: Tensor) -> Tensor:
            libmvec(name, x, out)
            return out

        return _work(case, call, _within(name, exact))


def _torch(name: str, function: Callable[..., Tensor], exact: Callable[[Tensor], Tensor]) -> None:
    @TABLE.provider("torch", format=name)
    def eager(case: Case) -> Work:
        out = _room(case)
        return _work(case, lambda x: function(x, out=out), _within(name, exact))


for _entries in (16, 32):
    _ours(_entries)
for _name, _exact in (("expf", torch.exp), ("erff", torch.erf), ("tanhf", torch.tanh)):
    _libmvec(_name, _exact)
_ATEN: Any = torch.ops.aten
_torch("exp", torch.exp, torch.exp)
_torch("GELU", _ATEN.gelu.out, F.gelu)
_torch("SiLU", _ATEN.silu.out, F.silu)
_torch("1/x", torch.reciprocal, torch.reciprocal)
_torch("1/sqrt", torch.rsqrt, torch.rsqrt)
