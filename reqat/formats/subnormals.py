"""Float arithmetic that keeps subnormal numbers, whatever mode the process is in.

``torch.set_flush_denormal(True)``, and any library that was built with ``-ffast-math``, make the CPU take numbers below
2^-126 for zero. Formats need them: the smallest power-of-two scale is 2^-127, and dividing by it would give infinity.
The mode is a thread's own. A thread that torch starts for its operations has the mode that its starter had then, and
keeps it; nobody can ask it to change, so what such threads would compute the calling thread then computes alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")

_SMALLEST = 2.0**-1022  # the smallest normal number of Python; half of it is 0 where subnormals are flushed
_SHARE = 32768  # elements from which on torch gives an operation to several threads


@contextmanager
def subnormals_kept(x: Tensor) -> Iterator[None]:
    """Within this block operations on CPU tensors of the size of ``x`` keep subnormals; then the mode is as before."""
    flushing = not _SMALLEST / 2 > 0
    threads = torch.get_num_threads() if x.device.type == "cpu" else 1
    # Packed tensors hold two elements a byte, and some operations are shared out earlier than others.
    alone = threads > 1 and x.numel() > _SHARE // 4 and _helpers_flush(threads)
    if flushing:
        torch.set_flush_denormal(False)
    if alone:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if alone:
            torch.set_num_threads(threads)
        if flushing:
            torch.set_flush_denormal(True)


def keeps_subnormals(
    function: Callable[Concatenate[Tensor, _Parameters], _Result],
) -> Callable[Concatenate[Tensor, _Parameters], _Result]:
    """A function of a tensor that computes within :func:`subnormals_kept`."""

    @functools.wraps(function)
    def kept(x: Tensor, *args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        if not isinstance(x, Tensor):  # which the function will say
            return function(x, *args, **kwargs)
        with subnormals_kept(x):
            return function(x, *args, **kwargs)

    return kept


def _helpers_flush(threads: int) -> bool:
    """Whether some thread that torch starts for this one flushes subnormals: each gets a share of this to halve."""
    halves = torch.full((threads * _SHARE,), 2.0**-126, dtype=torch.float32, device="cpu").mul_(0.5)
    shares = halves.view(torch.int32).view(threads, _SHARE)[:, 1 :: _SHARE - 2]
    return not bool(shares.all())  # as integers: this thread may flush, too
