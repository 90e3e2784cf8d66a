"""Freed memory that stays with the process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from reqat.config.allocator import freed_memory_kept

# In a process of its own: what a long one has allocated before decides where blocks come from.
SCRIPT = """
import resource
import numpy as np
from reqat.config.allocator import freed_memory_kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        np.empty(2**26, dtype=np.uint8).fill(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

try:
    with freed_memory_kept():
        faults()
        kept = faults()
        raise KeyError
except KeyError:
    print(kept, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_blocks_are_faulted_in_once_within_the_block_and_given_back_after_it() -> None:
    """Page faults of allocating, writing and freeing the same 64 MiB eight times."""
    said = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True).stdout
    kept, after = map(int, said.split())
    assert kept < 2**14 / 8
    assert after > 8 * kept + 8  # huge pages may make each a few faults only


def test_a_decorated_function_keeps_it_each_time() -> None:
    @freed_memory_kept()
    def twice(x: int) -> int:
        return 2 * x

    assert [twice(1), twice(2)] == [2, 4]
