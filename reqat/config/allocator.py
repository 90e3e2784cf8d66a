"""The allocator of the C library: whether freed memory stays with the process.

glibc returns large blocks to the system as soon as they are freed. A training step allocates the same large tensors
again and again; each time the system clears their pages anew and maps them one fault at a time. With logits of a large
vocabulary that is a third of a step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1
# The largest that glibc itself would have come to by adapting them.
_TRIM_BYTES, _MMAP_BYTES = 64 * 2**20, 32 * 2**20


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within this block, or the function that it decorates, freed blocks below 2 GiB are kept for the next allocation;
    at its end they go back to the system. No number changes. Nothing happens where the C library is not glibc.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, _NEVER)
    libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _MMAP_BYTES)
        libc.mallopt(_TRIM_THRESHOLD, _TRIM_BYTES)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
        return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
    except (OSError, TypeError):
        return None
