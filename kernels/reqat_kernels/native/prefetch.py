"""How far ahead the matrix products read their weights: measured on the machine at hand, kept for the process.

A product of few rows waits for memory. It asks for weights some bytes before it needs them: ``near`` bytes ahead into
the first cache and, where that pays, ``far`` bytes ahead into the second. Which distances are best differs between
processors, and with the rows of a pass, by up to a quarter of the time; no rule tells them from the processor's name.
So :func:`tune` runs the products over a model's own packed weights with each of a few schedules in turns, some tenths
of a second in all, and keeps the fastest. `reqat.pack` calls it. Results do not depend on the schedule, only their
time does.

Environment: ``REQAT_PREFETCH=default`` keeps the schedules that the library starts with.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from reqat_kernels.native import check
from reqat_kernels.native.gemm import Products
from reqat_kernels.native.library import library
from reqat_kernels.native.weights import PackedWeight

ROWS = (1, 2, 4, 8)
"""Rows of x that a pass over the weights can have."""
PATHS = ("integers", "bfloat16")
"""W4A4 and W4A8; W4A16 of bfloat16 inputs. By reqat::Path."""
SAMPLE_BYTES = 64 << 20
"""As many packed weights are read, or all that there are."""
LEAST_BYTES = 16 << 20
"""Fewer stay in a cache, where the schedule matters little: nothing is measured."""
ROUNDS = 4
GAIN = 0.97
"""A schedule replaces the one in use only where it takes less than this share of its time."""
_LARGEST = 1 << 20


class Ahead(NamedTuple):
    """Bytes ahead of the codes being read: into the first cache, and into the second (0: not at all)."""

    near: int
    far: int


CANDIDATES = (Ahead(2048, 0), Ahead(4096, 0), Ahead(8192, 0), Ahead(16384, 0), Ahead(512, 8192), Ahead(1024, 16384))
"""What :func:`tune` tries."""


def schedule(path: str, rows: int) -> Ahead | None:
    """The schedule in use for ``path`` and passes of ``rows`` rows; None without the native library."""
    lib = library()
    if lib is None:
        return None
    out = (ctypes.c_int * 2)()
    lib.reqat_get_ahead(*_place(path, rows), out)
    return Ahead(*out)


def set_schedule(path: str, rows: int, ahead: Ahead) -> None:
    """Use ``ahead`` from now on, in the whole process. Raises ValueError for distances outside [0, 2^20)."""
    lib = library()
    check.size("near", ahead.near, most=_LARGEST - 1)
    check.size("far", ahead.far, most=_LARGEST - 1)
    place = _place(path, rows)
    if lib is not None:
        lib.reqat_set_ahead(*place, *ahead)


def tune(weights: Sequence[PackedWeight], path: str) -> dict[int, Ahead]:
    """Measure the candidates over ``weights`` and keep the fastest for each number of rows; what was chosen.

    Measures once a process and path, and only where the weights are too many for a cache (:data:`LEAST_BYTES`).
    Returns nothing where it does not measure. Raises ValueError for another ``REQAT_PREFETCH`` than ``default``.
    """
    wanted = os.environ.get("REQAT_PREFETCH", "").strip()
    if wanted not in ("", "default"):
        raise ValueError(f"REQAT_PREFETCH={wanted!r}: choose default (nothing is measured), or leave it unset")
    if library() is None or wanted:
        return {}
    if path in _TUNED or sum(w.nbytes for w in weights) < LEAST_BYTES:
        return {}
    _TUNED.add(path)
    sample: list[PackedWeight] = []
    for w in weights:
        if w.columns % (w.format.block or 1):  # Products takes whole blocks
            continue
        if sum(s.nbytes for s in sample) >= SAMPLE_BYTES:
            break
        sample.append(w)
    return {rows: _fastest(path, rows, _pass(path, sample, rows)) for rows in ROWS if sample}


_TUNED: set[str] = set()


def _fastest(path: str, rows: int, run: Callable[[], None]) -> Ahead:
    before = schedule(path, rows)
    assert before is not None
    tried = (before, *(c for c in CANDIDATES if c != before))
    seconds = dict.fromkeys(tried, float("inf"))
    for _ in range(ROUNDS):  # in turns, so that a slower moment of the machine hits all alike
        for ahead in tried:
            set_schedule(path, rows, ahead)
            start = time.perf_counter()
            run()
            seconds[ahead] = min(seconds[ahead], time.perf_counter() - start)
    best = min(tried, key=seconds.__getitem__)
    chosen = best if seconds[best] < GAIN * seconds[before] else before
    set_schedule(path, rows, chosen)
    return chosen


def _pass(path: str, weights: Sequence[PackedWeight], rows: int) -> Callable[[], None]:
    """Multiply ``rows`` rows of zeros by all the weights: what is read does not depend on the numbers."""
    of_width: dict[int, list[PackedWeight]] = {}
    for w in weights:
        of_width.setdefault(w.columns, []).append(w)
    dtype, inputs = (torch.float32, "A8") if path == "integers" else (torch.bfloat16, None)
    parts = [
        Products(torch.zeros(rows, columns, dtype=dtype, device="cpu"), group, inputs=inputs)  # type: ignore[arg-type]
        for columns, group in of_width.items()
    ]

    def run() -> None:
        for part in parts:
            part()

    run()  # pages of the buffers, and the library's own
    return run


def _place(path: str, rows: int) -> tuple[int, int]:
    if path not in PATHS or rows not in ROWS:
        raise ValueError(f"no schedule for {path!r} and {rows} rows: paths are {', '.join(PATHS)}, rows 1, 2, 4 and 8")
    return PATHS.index(path), rows
