"""What else the machine does while something is timed, and how large its caches are.

Three witnesses. The **probe** reads a buffer that no cache holds; its best rate over a whole run is the read roofline,
its rate in a round says how much of the memory bus a neighbour (perhaps in another virtual machine) left over.
**/proc/stat** says how many cores other processes here kept busy, and what the hypervisor took (steal). The
scheduler's own account (**schedstat**) says how long this thread stood ready and did not run, to the nanosecond.

Where caches end is measured (:func:`read_bandwidth`): buffers of growing size are read again and again, and from the
size on at which that is as slow as reading the largest, data comes from memory. What /sys says of a cache is not
trusted: a virtual machine reports one that it shares, or another machine's.

Where the system does not say (no Linux), the answer is NaN, never zero.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reqat_kernels.native.gemm import allocate

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
#: Bytes of memory that a benchmark may take where nobody says otherwise.
MEMORY_BYTES = 4 * 10**9
# The largest buffer that is read to find where caches end: of the memory that may be taken, and whatever that is.
_LADDER_SHARE, _LADDER_BYTES = 4, 2 * 2**30
_FIRST_STEP_BYTES, _READINGS, _MOST_READINGS = 2**20, 8, 24
# Reading a size takes so long at least, by repetition: else the call would count more than the reading.
_READ_BYTES = 32 * 2**20
_AS_MEMORY = 1.2  # a buffer read at up to this times the rate of the largest one comes from memory
_PROBE_TIMES = 4  # the probe's size over that from which on data is cold


def last_level_cache_bytes(folder: Path = _CACHES) -> int:
    """Size of the largest data cache that core 0 can reach, as sysfs says; 0 where it does not. For the record only:
    no decision rests on it but to doubt a measurement that did not reach beyond it."""
    sizes = [0]
    for path in folder.glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip())
        kind = path.with_name("type")
        if found and not (kind.is_file() and kind.read_text().strip() == "Instruction"):
            sizes.append(int(found[1]) * _UNITS[found[2]])
    return max(sizes)


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second at which buffers of growing size are read again and again; ``cold_bytes``: the size from which on
    they come from memory, None where no size was seen to."""

    bytes: tuple[int, ...]
    rates: tuple[float, ...]
    cold_bytes: int | None

    def rate(self, bytes: int) -> float:
        """The rate of a buffer of this size, between two that were read on a logarithmic scale; NaN if none was."""
        if not self.bytes:
            return math.nan
        at = math.log2(max(1, bytes))
        steps = [math.log2(size) for size in self.bytes]
        for low, high, left, right in zip(steps, steps[1:], self.rates, self.rates[1:], strict=False):
            if low <= at <= high:
                return left + (right - left) * (at - low) / (high - low)
        return self.rates[0] if at < steps[0] else self.rates[-1]

    def is_cold(self, bytes: int) -> bool:
        """Whether data that comes round again after so many bytes is read from memory; False where nobody knows."""
        return self.cold_bytes is not None and bytes >= self.cold_bytes


def cold_from(bytes: tuple[int, ...], rates: tuple[float, ...], said: int = 0) -> int | None:
    """The smallest of these sizes from which on all are read about as slowly as the largest, which is memory's rate.

    None if that is the largest alone (nothing shows that it is memory that was read), or if the largest is no twice
    ``said``, the cache that the system claims: all of it may have been in there.
    """
    slow = [size for size, rate in zip(bytes, rates, strict=True) if rate > _AS_MEMORY * rates[-1]]
    found = min((size for size in bytes if not slow or size > max(slow)), default=None)
    return None if found is None or found == bytes[-1] or bytes[-1] < 2 * said else found


def read_bandwidth(memory: int = MEMORY_BYTES) -> Bandwidth:
    """Read buffers from 1 MiB up to a quarter of ``memory`` (2 GiB at most), each double the one before, with torch's
    threads: the best of several readings, one of every size in turn so that a neighbour hits all alike. Where that
    shows no end of the caches, of more: one reading of the largest that nobody disturbed is what it takes."""
    top = min(_LADDER_BYTES, memory // _LADDER_SHARE)
    sizes = tuple(_FIRST_STEP_BYTES << i for i in range(max(1, (top // _FIRST_STEP_BYTES).bit_length())))
    buffer = allocate(sizes[-1]).view(torch.float32).fill_(1)
    best = dict.fromkeys(sizes, 0.0)
    for reading in range(_MOST_READINGS):
        rates = tuple(best.values())
        if reading >= _READINGS and cold_from(sizes, rates, last_level_cache_bytes()) is not None:
            break
        for size in sizes:
            part, times = buffer[: size // 4], max(1, _READ_BYTES // size)
            part.sum()  # now as much of it is in a cache as fits
            start = time.perf_counter_ns()
            for _ in range(times):
                part.sum()
            best[size] = max(best[size], times * size / max(1, time.perf_counter_ns() - start) * 1e9)
    rates = tuple(best.values())
    return Bandwidth(sizes, rates, cold_from(sizes, rates, last_level_cache_bytes()))


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
        busy = (user + nice + system + irq + softirq) / tick
        return time.monotonic(), busy, steal / tick, own_seconds()


def own_seconds() -> float:
    """CPU time of this process and of all that it started, running ones too."""
    tick, mine = os.sysconf("SC_CLK_TCK"), os.times()
    total = mine.user + mine.system + mine.children_user + mine.children_system
    for child in multiprocessing.active_children():
        try:
            fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / tick  # utime and stime; the name before them may hold spaces
        except (OSError, ValueError, IndexError):
            continue
    return total


def waited_ns() -> int:
    """Nanoseconds that this thread has stood ready without a core, since it began; 0 where the system does not say."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0


class Device:
    """How work on the CPU is timed, and where its caches end. :data:`DEVICES` knows one such object a device."""

    name = "cpu"

    def bandwidth(self, memory: int = MEMORY_BYTES) -> Bandwidth:
        """Read bandwidth over the size of what is read; allocates and computes, so it has a process of its own."""
        return read_bandwidth(memory)

    def probe_bytes(self, bandwidth: Bandwidth, memory: int = MEMORY_BYTES) -> int:
        """Size of a buffer whose reading shows the bandwidth of memory: some times the size from which on data is cold,
        within the share of ``memory`` that :func:`read_bandwidth` takes, all of that where no size is known."""
        most = min(_LADDER_BYTES, memory // _LADDER_SHARE)
        return most if bandwidth.cold_bytes is None else min(most, _PROBE_TIMES * bandwidth.cold_bytes)

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

    def bandwidth(self, memory: int = MEMORY_BYTES) -> Bandwidth:
        """A device says what its second-level cache holds, and shares it with nobody: data is cold beyond it."""
        return Bandwidth((), (), int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size))

    def probe_bytes(self, bandwidth: Bandwidth, memory: int = MEMORY_BYTES) -> int:
        """A gigabyte at least: less is read before the device is busy everywhere. Of the device's own memory, so the
        host's bound does not apply."""
        return max(2**30, 8 * (bandwidth.cold_bytes or 0))

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
    """Reads a buffer that no cache holds and says how fast that went.

    A plain sum of float32 by torch, with torch's threads: on the CPUs tried it reads as fast as a bare loop of loads.
    On a CPU the buffer lies in huge pages, as packed weights do; in small ones a third less is read.
    """

    def __init__(self, bytes: int, device: str = "cpu") -> None:
        self.device = device
        size = max(4, bytes // 4 * 4)
        raw = allocate(size) if device == "cpu" else torch.empty(size, dtype=torch.uint8, device=device)
        self.buffer: Tensor = raw.view(torch.float32).fill_(1)
        self.rates: list[float] = []

    def __call__(self) -> float:
        """Bytes a second, this time. Every rate is kept in ``rates``."""
        rate = self.buffer.nbytes / max(1, DEVICES[self.device].time_ns(self.buffer.sum)) * 1e9
        self.rates.append(rate)
        return rate
