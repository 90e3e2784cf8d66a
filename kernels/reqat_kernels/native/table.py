"""Piecewise-linear tables on a CPU: ``y = slopes[k] x + intercepts[k]``, k the number of breakpoints not above x.

Up to 16 entries a table lives in one vector register, so a number costs a few permutations and comparisons and no load
but its own. The native kernel and PyTorch give the same bits: the product is rounded, then the sum.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from reqat.formats.subnormals import subnormals_kept
from reqat_kernels.native import check
from reqat_kernels.native.library import OPERATORS, library, threads

MOST_ENTRIES = 256
_WORK_PER_THREAD = 1 << 16

OPERATORS.define("piecewise_linear(Tensor x, Tensor breakpoints, Tensor slopes, Tensor intercepts) -> Tensor")


def piecewise_linear(
    x: Tensor, breakpoints: Tensor, slopes: Tensor, intercepts: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """Values of a table at ``x``, in its shape and dtype; computed in float32.

    ``breakpoints`` float32 [E - 1], never falling, ``slopes`` and ``intercepts`` float32 [E], E from 1 to 256. NaN
    gives NaN; so does infinity where the outermost slope is 0. Where ``x`` takes gradients PyTorch computes, with the
    segment's slope as derivative.

    ``out``: where to write, without gradients; both float32, contiguous, on a CPU, of one shape. It may be ``x``.

    Raises ValueError for other shapes, types or devices, TypeError for what is no tensor.
    """
    parts = (breakpoints, slopes, intercepts)
    for name, t in (("x", x), ("breakpoints", breakpoints), ("slopes", slopes), ("intercepts", intercepts)):
        check.tensor(name, t)
    if out is not None:
        _check(check.exactly("x", x, torch.float32, x.shape, torch.device("cpu")), *parts)
        check.exactly("out", out, torch.float32, x.shape, x.device)
        return _write(x, out, *parts)
    if torch.is_grad_enabled() and x.requires_grad:
        _check(x, *parts)
        return _by_torch(x.float(), *parts).to(x.dtype)
    result: Tensor = torch.ops.reqat.piecewise_linear(x, *parts)
    return result


def libmvec(name: str, x: Tensor, out: Tensor) -> bool:
    """Write glibc's vectorized ``name`` (such as ``expf``) of ``x`` float32 [n], n a multiple of 16, into ``out``.

    For the benchmark. False where this machine has no such function, or no native library.
    """
    lib = _library()
    check.exactly("x", x, torch.float32, (x.numel(),), torch.device("cpu"))
    check.exactly("out", out, torch.float32, (x.numel(),), torch.device("cpu"))
    if x.numel() % 16:
        raise ValueError(f"x holds {x.numel()} numbers: give a multiple of 16")
    return lib is not None and bool(lib.reqat_libmvec(name.encode(), x.data_ptr(), out.data_ptr(), x.numel()))


def _check(x: Tensor, breakpoints: Tensor, slopes: Tensor, intercepts: Tensor) -> None:
    check.floats("x", x)
    check.floats("slopes", slopes)
    E = check.size("the number of slopes", slopes.numel(), least=1, most=MOST_ENTRIES)
    for name, t, n in (("breakpoints", breakpoints, E - 1), ("slopes", slopes, E), ("intercepts", intercepts, E)):
        check.exactly(name, t, torch.float32, (n,), x.device)


def _by_torch(x: Tensor, breakpoints: Tensor, slopes: Tensor, intercepts: Tensor) -> Tensor:
    at = torch.bucketize(x.detach(), breakpoints, right=True)
    return slopes[at] * x + intercepts[at]


def _write(x: Tensor, out: Tensor, breakpoints: Tensor, slopes: Tensor, intercepts: Tensor) -> Tensor:
    lib = _library()
    if lib is None:
        with subnormals_kept(x):
            return out.copy_(_by_torch(x.detach(), breakpoints, slopes, intercepts))
    if n := x.numel():
        parts = (check.address(breakpoints), check.address(slopes), check.address(intercepts))
        where = (check.address(x), check.address(out), n)
        lib.reqat_table(*where, *parts, len(slopes), threads(n, _WORK_PER_THREAD))
    return out


def _piecewise_linear(x: Tensor, breakpoints: Tensor, slopes: Tensor, intercepts: Tensor) -> Tensor:
    _check(x, breakpoints, slopes, intercepts)
    wide = x.float().contiguous()
    y = torch.empty(wide.shape, dtype=torch.float32, device="cpu")
    return _write(wide, y, breakpoints, slopes, intercepts).to(x.dtype)


def _elsewhere(x: Tensor, breakpoints: Tensor, slopes: Tensor, intercepts: Tensor) -> Tensor:
    _check(x, breakpoints, slopes, intercepts)
    return _by_torch(x.float(), breakpoints, slopes, intercepts).to(x.dtype)


def _meta(x: Tensor, breakpoints: Tensor, slopes: Tensor, intercepts: Tensor) -> Tensor:
    _check(x, breakpoints, slopes, intercepts)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


OPERATORS.impl("piecewise_linear", _piecewise_linear, "CPU")
OPERATORS.impl("piecewise_linear", _elsewhere, "CompositeExplicitAutograd")
torch.library.register_fake("reqat::piecewise_linear", _meta)


@cache
def _library() -> ctypes.CDLL | None:
    lib = library()
    if lib is not None:
        lib.reqat_table.argtypes = (
            [ctypes.c_void_p] * 2 + [ctypes.c_int64] + [ctypes.c_void_p] * 3 + [ctypes.c_int32] * 2
        )
        lib.reqat_table.restype = None
        lib.reqat_libmvec.argtypes = [ctypes.c_char_p, *[ctypes.c_void_p] * 2, ctypes.c_int64]
        lib.reqat_libmvec.restype = ctypes.c_int32
    return lib
