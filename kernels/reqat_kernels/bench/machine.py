"""What else the machine does while something is timed.

Three witnesses. The **probe** reads a buffer that no cache holds; its best rate over a whole run is the read roofline,
its rate in a round says how much of the memory bus a neighbour (perhaps in another virtual machine) left over.
**/proc/stat** says how many cores other processes here kept busy, and what the hypervisor took (steal). The
scheduler's own account (**schedstat**) says how long this thread stood ready and did not run, to the nanosecond.

Where the system does not say (no Linux), the answer is NaN, never zero.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reqat_kernels.native.gemm import allocate

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_FALLBACK_CACHE_BYTES = 64 * 2**20  # larger than most, so that data is cold where the size is unknown
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
#: States the size of the last-level cache in bytes, in place of what sysfs says.
CACHE_VARIABLE = "REQAT_LAST_LEVEL_CACHE_BYTES"
#: Bytes of memory that a benchmark may take where nobody says otherwise.
MEMORY_BYTES = 4 * 10**9
# Shares of that memory. A probe, a ring for each of some 20 providers, their operands and torch fit into it together.
_PROBE_SHARE, _RING_SHARE = 4, 40


def last_level_cache_bytes(folder: Path = _CACHES) -> int:
    """Size of the largest data cache that core 0 can reach, from sysfs; 64 MiB where sysfs does not say.

    The environment variable ``REQAT_LAST_LEVEL_CACHE_BYTES`` takes precedence. Raises ValueError if it is no positive
    whole number.
    """
    given = os.environ.get(CACHE_VARIABLE)
    if given is None:
        return _cache_in_sysfs(folder)
    if not given.isdecimal() or int(given) == 0:
        raise ValueError(f"{CACHE_VARIABLE}={given!r}: give bytes, a whole number above 0, or unset it")
    return int(given)


@cache
def _cache_in_sysfs(folder: Path) -> int:
    sizes = [0]
    for path in folder.glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip())
        kind = path.with_name("type")
        if found and not (kind.is_file() and kind.read_text().strip() == "Instruction"):
            sizes.append(int(found[1]) * _UNITS[found[2]])
    return max(sizes) or _FALLBACK_CACHE_BYTES


@dataclass(frozen=True)
class Load:
    """What others took over a stretch of time. NaN: the system does not say."""

    neighbour_cores: float
    """Cores that other processes of this machine kept busy, on average."""
    steal: float
    """Cores that the hypervisor gave to somebody else."""


class Neighbours:
    """Watches the machine from its creation on: ``load()`` is what others took since then."""

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        self._stat = stat
        self._start = self._read()

    def load(self) -> Load:
        """What others took since the start."""
        now, then = self._read(), self._start
        if now is None or then is None or now[0] <= then[0]:
            return Load(math.nan, math.nan)
        wall, busy, stolen, own = (a - b for a, b in zip(now, then, strict=True))
        return Load(max(0.0, busy - own) / wall, stolen / wall)

    def _read(self) -> tuple[float, float, float, float] | None:
        """Seconds: wall clock; all processes' time on all cores; stolen; this process's time."""
        try:
            first = self._stat.read_text().split("\n", 1)[0].split()
            user, nice, system, _, _, irq, softirq, steal = (int(field) for field in first[1:9])
        except (OSError, ValueError):
            return None
        tick = os.sysconf("SC_CLK_TCK")
        own = os.times()
        busy = (user + nice + system + irq + softirq) / tick
        return time.monotonic(), busy, steal / tick, own.user + own.system


def waited_ns() -> int:
    """Nanoseconds that this thread has stood ready without a core, since it began; 0 where the system does not say."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0


class Device:
    """How work on the CPU is timed, and what its caches hold. :data:`DEVICES` knows one such object a device."""

    name = "cpu"

    def cache_bytes(self) -> int:
        """Size of the last-level cache."""
        return last_level_cache_bytes()

    def probe_bytes(self, memory: int = MEMORY_BYTES) -> int:
        """Size of a buffer whose reading shows the bandwidth of memory: little of it is left in the cache.

        A quarter of the ``memory`` that the benchmark may take, at most, however large the cache is said to be.
        """
        return min(8 * self.cache_bytes(), memory // _PROBE_SHARE)

    def ring_bytes(self, memory: int = MEMORY_BYTES) -> int:
        """Size of a provider's ring of copies: twice the cache, bounded like the probe, by a 40th of ``memory``."""
        return min(2 * self.cache_bytes(), memory // _RING_SHARE)

    def ready(self, burst: Callable[[], Any]) -> Callable[[], Any]:
        """``burst`` in the form in which it is to be timed."""
        return burst

    def time_ns(self, burst: Callable[[], Any]) -> int:
        """Nanoseconds that one call of ``burst`` takes, beginning to end of its work."""
        start = time.perf_counter_ns()
        burst()
        return time.perf_counter_ns() - start


class Cuda(Device):
    """A CUDA device: bursts are captured as graphs and timed by events.

    A kernel of microseconds is shorter than its launch from Python. Replaying a graph launches from the device's own
    queue, so what is timed is the kernels, for every provider alike. A function that waits for the device (a check of
    its results, say) cannot be captured; then its burst runs as it is.
    """

    name = "cuda"

    def cache_bytes(self) -> int:
        """Size of the second-level cache."""
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)

    def probe_bytes(self, memory: int = MEMORY_BYTES) -> int:
        """A gigabyte at least: less is read before the device is busy everywhere. Of the device's own memory, so the
        host's bound does not apply."""
        return max(2**30, 8 * self.cache_bytes())

    def ring_bytes(self, memory: int = MEMORY_BYTES) -> int:
        """Twice the cache, in the device's own memory."""
        return 2 * self.cache_bytes()

    def ready(self, burst: Callable[[], Any]) -> Callable[[], Any]:
        """A graph of ``burst``, which ran once before: everything is compiled and allocated."""
        burst()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                burst()
        except RuntimeError:
            torch.cuda.synchronize()
            return burst
        return graph.replay

    def time_ns(self, burst: Callable[[], Any]) -> int:
        """Between two events on the current stream."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        burst()
        end.record()
        end.synchronize()
        return round(1e6 * start.elapsed_time(end))


DEVICES: dict[str, Device] = {device.name: device for device in (Device(), Cuda())}


def present() -> tuple[str, ...]:
    """The devices of this machine, ``cpu`` first."""
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


class Probe:
    """Reads a buffer that the last-level cache cannot hold and says how fast that went.

    Where the cache is larger than what memory allows (:meth:`Device.probe_bytes`), part of it is read from there.
    A plain sum of float32 by torch, with torch's threads: on the CPUs tried it reads as fast as a bare loop of loads.
    On a CPU the buffer lies in huge pages, as packed weights do; in small ones a third less is read.
    """

    def __init__(self, bytes: int | None = None, device: str = "cpu") -> None:
        self.device = device
        size = bytes or DEVICES[device].probe_bytes()
        size = max(4, size // 4 * 4)
        raw = allocate(size) if device == "cpu" else torch.empty(size, dtype=torch.uint8, device=device)
        self.buffer: Tensor = raw.view(torch.float32).fill_(1)
        self.rates: list[float] = []

    def __call__(self) -> float:
        """Bytes a second, this time. Every rate is kept in ``rates``."""
        rate = self.buffer.nbytes / max(1, DEVICES[self.device].time_ns(self.buffer.sum)) * 1e9
        self.rates.append(rate)
        return rate

    @property
    def best(self) -> float:
        """The best rate so far: the read roofline. NaN before the first reading."""
        return max(self.rates, default=math.nan)
