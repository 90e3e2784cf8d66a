"""The clock: providers of one computation, each in a process of its own, checked, then timed in turns.

The idea in short. Each provider of a case is served by a worker process (:mod:`reqat_kernels.bench.worker`), which is
told to prepare, to run a burst, and to stop. It is held against the reference first, and what fails is not timed. A
round gives every provider one burst of calls for every number of threads, a turn of its ring at most, in an order that
turns by one each round, with one reading of the bandwidth probe. Only one process computes at a time; the clock is read
in the worker, around the burst alone. A sample is a burst's time divided by its calls; a row states the samples'
median, minimum and percentiles. Samples during which the scheduler kept the thread waiting are set aside and counted
(``set_aside``): that clock ran for somebody else.

Whatever a peer's library does to its process costs the peer's rows of this case: they say why, and the rest goes on.
All memory of a case is free again before the next one, because its processes have ended.

Why bursts: a call of 90 microseconds is as short as what Python spends around it. A provider that can string several
calls together (ggml: one graph) may, through ``Work.chain``; that can only flatter the peer.

On a GPU the same holds with its own clock, cache and probe (:class:`~reqat_kernels.bench.machine.Cuda`).

Interleaving makes what the machine does to one provider happen to all: trust the ratios of one run, not times of two.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from reqat_kernels.bench.machine import DEVICES, MEMORY_BYTES, Bandwidth, Load, Neighbours, Probe, present, waited_ns
from reqat_kernels.bench.measure import (
    Absent,
    Case,
    Kernel,
    Provider,
    Result,
    Row,
    Wrong,
    against_roofline,
    chunks,
    failed_row,
    percentile,
    ring_bytes,
    undisturbed,
)
from reqat_kernels.bench.worker import (
    PATIENCE_S,
    Died,
    Moved,
    Worker,
    check_threads,
    cpus,
    isolated,
    peak_above_bytes,
    private_bytes,
    resident_bytes,
    settle,
)

_FIRST_READINGS = 10  # of the probe, so that a short run knows its roofline too
_LONG_CALL_S = 1.0  # from here on, one call is warm-up enough
WORKER_BYTES = 50 * 10**6
"""What a worker takes for itself: interpreter and torch are shared with the parent until one of them writes."""
_RINGS_SHARE, _LEFT_SHARE = 0.5, 0.95
"""What all rings of a case may take: of the memory allowed, and of what its processes leave of that."""


class Roofline:
    """The bandwidth probe of a device in a process of its own: its best rate is the read roofline.

    ``memory``: bytes that the benchmark may take; ``bandwidth``: what is known already of where caches end.
    """

    def __init__(self, device: str = "cpu", memory: int = MEMORY_BYTES, bandwidth: Bandwidth | None = None) -> None:
        kind = DEVICES[device]
        self.device = device
        self.bandwidth: Bandwidth = bandwidth or isolated(partial(kind.bandwidth, memory))[0]
        self.bytes = kind.probe_bytes(self.bandwidth, memory)
        self.rates: dict[int, list[float]] = {}
        self._worker = Worker(lambda: _Probing(self.bytes, device))

    def __call__(self, threads: int = 1) -> float:
        """Bytes a second, this time, with so many threads. Every rate is kept in ``rates``."""
        for _ in range(1 if threads in self.rates else 1 + _FIRST_READINGS):
            rate = float(self._worker("read", threads))
            self.rates.setdefault(threads, []).append(rate)
        return rate

    def best(self) -> dict[int, float]:
        """Number of threads -> the best rate so far."""
        return {threads: max(rates) for threads, rates in self.rates.items()}

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._worker.pid

    def stop(self) -> None:
        """End its process."""
        self._worker.stop()


class _Probing:
    def __init__(self, bytes: int, device: str) -> None:
        self._probe = Probe(bytes, device)

    def read(self, threads: int) -> float:
        torch.set_num_threads(threads)
        rate = self._probe()
        if threads > 1:
            settle()
        return rate


@dataclass(frozen=True)
class Ready:
    """What a prepared provider says of itself; ``calls``: how many make a burst, by the number of threads."""

    copies: int
    bytes_moved: int
    ring_bytes: int
    warm: bool
    calls: dict[int, int]
    peak_bytes: float | None


class Served:
    """The worker's side: one provider's work on one case."""

    def __init__(self, provider: Provider, case: Case) -> None:
        self._device, self._cpus = DEVICES[case.device], cpus()
        self._make = partial(provider.make, case)
        self._bursts: dict[tuple[tuple[int, ...], int], Callable[[], Any]] = {}

    def prepare(self, threads: Sequence[int], burst_s: float, checked: bool) -> Ready:
        """Make the work, check it with each number of threads unless ``checked`` before, and warm it up.

        Raises what the provider raises, Absent and Wrong among it.
        """
        torch.set_num_threads(threads[0])
        self._work = work = self._make()
        calls, peak = {}, None
        for n in threads:
            torch.set_num_threads(n)
            if not checked:
                work.check()
            used, calls[n] = self._warm_up(burst_s)
            peak = used if peak is None else peak
            self._rest(n)
        work.check = _passed  # what it compared with would take memory as long as the clock runs
        return Ready(
            work.copies,
            work.bytes_moved,
            work.ring_bytes or work.copies * work.bytes_moved,
            work.warm,
            calls,
            peak,
        )

    def burst(self, order: tuple[int, ...], threads: int) -> tuple[int, int]:
        """Time one burst with these copies: nanoseconds, and those of them in which the thread waited for a core.

        Raises Moved if the process may not use the CPUs that it was prepared on.
        """
        torch.set_num_threads(threads)
        burst = self._bursts.get((order, threads))
        if burst is None:
            burst = self._bursts[order, threads] = self._device.ready(self._work.burst(order))
        waited = waited_ns()
        elapsed = self._device.time_ns(burst)
        waited = waited_ns() - waited
        self._rest(threads)
        return elapsed, waited

    def _rest(self, threads: int) -> None:
        if (now := cpus()) != self._cpus:
            raise Moved(f"its CPUs changed from {sorted(self._cpus)} to {sorted(now)} while it was measured")
        if threads > 1:
            settle()

    def _warm_up(self, burst_s: float) -> tuple[float | None, int]:
        """What a call needs beyond inputs and results, if the work can say; how many calls make ``burst_s``."""
        work, peak = self._work, None
        if work.peak_bytes is not None:
            start = time.perf_counter()
            peak = work.peak_bytes()
            if time.perf_counter() - start > _LONG_CALL_S:
                return peak, 1
        times = []
        for indices, _ in zip(chunks(work.copies, 2), range(3), strict=False):
            burst = self._device.ready(work.burst(indices))
            times.append(self._device.time_ns(burst) / len(indices))
        return peak, max(1, math.ceil(1e9 * burst_s / max(min(times), 1.0)))


def _passed() -> None:
    """The check of work that has passed it."""


@dataclass
class Samples:
    """Of one number of threads. ``waits``: share of each sample's time that the thread waited for a core."""

    indices: Iterator[Sequence[int]]
    us: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    total_ns: int = 0
    waited_ns: int = 0

    def add(self, elapsed_ns: int, waited_ns: int, calls: int) -> None:
        """One burst."""
        self.waited_ns += waited_ns
        self.total_ns += elapsed_ns
        self.us.append(elapsed_ns / calls / 1e3)
        self.waits.append(waited_ns / max(1, elapsed_ns))


@dataclass(eq=False)
class Contender:
    """The parent's side: a provider of a case, its worker while it has one, and its samples by number of threads."""

    provider: Provider
    case: Case
    patience_s: float
    worker: Worker | None = None
    ready: Ready | None = None
    samples: dict[int, Samples] = field(default_factory=dict)
    held_bytes: int = 0
    """What its worker holds once it is ready."""

    def prepare(self, threads: Sequence[int], burst_s: float) -> None:
        """Start its worker and make it ready."""
        self.worker = Worker(lambda: Served(self.provider, self.case), self.patience_s)
        ready = self.worker("prepare", tuple(threads), burst_s, self.ready is not None)
        if self.ready is None:
            self.ready = ready
            self.samples = {n: Samples(chunks(ready.copies, calls)) for n, calls in ready.calls.items()}
        self.held_bytes = private_bytes(self.worker.pid)

    def turn(self, threads: int) -> None:
        """One burst."""
        assert self.worker is not None
        samples = self.samples[threads]
        order = tuple(next(samples.indices))
        elapsed, waited = self.worker("burst", order, threads)
        samples.add(elapsed, waited, len(order))

    def stop(self) -> None:
        """End its worker."""
        if self.worker is not None:
            self.worker.stop()
            self.worker, self.held_bytes = None, 0


def plan(kernel: Kernel, case: Case, probe: Roofline | None = None) -> int:
    """Bytes of memory that measuring a case takes at most: processes, probe, rings and what checks take.

    ``case.ring_bytes`` has to be settled (:func:`with_ring`). An estimate from above, made before anything is computed.
    """
    needs, count = kernel.needs(case), _count(kernel, case)
    together = count if kernel.resident else min(1, count)
    ring = int(needs.pages * max(case.ring_bytes, needs.copy)) if needs.copy else 0
    each = WORKER_BYTES + needs.held + ring
    return resident_bytes() + (probe.bytes if probe else 0) + together * each + needs.passing


def with_ring(kernel: Kernel, case: Case, probe: Roofline) -> Case:
    """The case with the bytes of a ring, unless it states some: what makes data cold, within an equal share of half the
    memory that the benchmark may take, and of what its processes leave."""
    if case.ring_bytes or case.device != "cpu":
        return replace(case, ring_bytes=case.ring_bytes or 2 * (probe.bandwidth.cold_bytes or 2**26))
    bare = replace(case, ring_bytes=1)
    needs, count = kernel.needs(case), max(1, _count(kernel, case) if kernel.resident else 1)
    left = case.memory_bytes - plan(kernel, bare, probe) + count * int(needs.pages * needs.copy)
    share = int(min(_RINGS_SHARE * case.memory_bytes, _LEFT_SHARE * max(0, left)) / needs.pages) // count
    return replace(case, ring_bytes=max(1, ring_bytes(probe.bandwidth, share)))


def _count(kernel: Kernel, case: Case) -> int:
    return sum(case.device in provider.devices for provider in kernel.providers)


def measure(
    case: Case,
    kernel: Kernel,
    *,
    rounds: int,
    threads: Sequence[int] = (1,),
    burst_s: float = 2e-3,
    probe: Roofline | None = None,
    patience_s: float = PATIENCE_S,
    peak: Callable[[int], object] = lambda bytes: None,
) -> Result:
    """Check every provider of a case and time those that pass, in turns.

    Args:
        rounds: samples of a provider for each number of threads.
        threads: a row for each number; each is held against the reference.
        burst_s: how long a burst should take; a turn of the ring at most, one call at least.
        probe: the run's bandwidth probe, read once a round; its best over the run is the roofline. One of another
            device is left alone: the case's device has its own then, and its rows come with their roofline.
        patience_s: seconds after which a call counts as one without end.
        peak: told the bytes that all processes hold together, whenever that may have grown.

    A provider for a device that this machine does not have is skipped, with a sentence. One of others that crashes,
    hangs, raises or is wrong gets rows that say so.

    Raises ValueError for more threads than CPUs; Wrong if one of our own providers fails its check, Died if one of them
    crashes, and whatever else ours raises.
    """
    for n in threads:
        check_threads(n)
    shared = probe is not None and probe.device == case.device
    if probe is None or not shared:
        probe = Roofline(case.device, case.memory_bytes)
    case = with_ring(kernel, case, probe)
    out, contenders = Result(), list[Contender]()
    watch, first = Neighbours(), {n: len(probe.rates.get(n, ())) for n in threads}

    def attempt(contender: Contender, act: Callable[[], None]) -> None:
        """Do something that may fail; then note why, and leave the provider out from there on."""
        provider = contender.provider
        try:
            act()
            return
        except Absent as reason:
            out.skipped.append(f"{case.kernel}, {provider.name}: {reason}")
            contenders.remove(contender)
        except Exception as error:
            if provider.ours and not isinstance(error, Moved):
                if isinstance(error, Wrong | Died):
                    raise type(error)(f"{case.kernel} {case.label}, {provider.label}: {error}") from error
                raise
            reason_text = reason_of(error)
            out.refused.append(f"{case.kernel} {case.label}, {provider.label}, not timed: {reason_text}")
            out.rows += [_failed(case, provider, n, reason_text) for n in threads]
            contenders.remove(contender)
        contender.stop()

    own = resident_bytes() + probe.bytes

    def told(contender: Contender) -> None:
        above = 0 if contender.worker is None else peak_above_bytes(contender.worker.pid)
        peak(own + sum(c.held_bytes for c in contenders) + above)

    try:
        for provider in kernel.providers:
            if case.device in provider.devices:
                contender = Contender(provider, case, patience_s)
                contenders.append(contender)
                if kernel.resident:
                    attempt(contender, lambda c=contender: c.prepare(threads, burst_s))  # type: ignore[misc]
                    told(contender)
            elif not set(provider.devices) & set(present()):
                wanted = " or ".join(provider.devices)
                out.skipped.append(f"{case.kernel}, {provider.name}: it needs a device of type {wanted}; none is here.")
        for turn in range(rounds):
            for n in threads:
                probe(n)
            at = turn % max(1, len(contenders))
            for contender in contenders[at:] + contenders[:at]:
                if not kernel.resident:
                    attempt(contender, lambda c=contender: c.prepare(threads, burst_s))  # type: ignore[misc]
                for n in threads:
                    if contender in contenders:
                        attempt(contender, lambda c=contender, n=n: c.turn(n))  # type: ignore[misc]
                if not kernel.resident:
                    told(contender)
                    contender.stop()
    finally:
        for contender in contenders:
            contender.stop()
        if not shared:
            probe.stop()
    load = watch.load()
    timed = [
        _row(case, contender, n, load, percentile(probe.rates[n][first[n] :], 0.5), probe.bandwidth)
        for contender in contenders
        for n in threads
    ]
    out.rows = (timed if shared else against_roofline(timed, probe.best())) + out.rows
    return out


def reason_of(error: Exception) -> str:
    """Why something was not timed, in one line: what is wrong, how a process ended, or what was raised."""
    if isinstance(error, Wrong | Died | Moved):
        return str(error)
    return f"it raised {type(error).__name__}: {error}".splitlines()[0]


def _m(case: Case) -> int:
    sizes = dict(case.shape)
    return sizes.get("M", sizes.get("B", 1))


def _failed(case: Case, provider: Provider, threads: int, reason: str) -> Row:
    return failed_row(
        case.kernel,
        provider.name,
        provider.format,
        case.label,
        _m(case),
        threads,
        reason,
        device=case.device,
        arithmetic=provider.arithmetic,
        ours=provider.ours,
    )


def _row(case: Case, contender: Contender, threads: int, load: Load, probe_rate: float, bandwidth: Bandwidth) -> Row:
    provider, ready, samples = contender.provider, contender.ready, contender.samples[threads]
    assert ready is not None
    kept = undisturbed(samples.us, samples.waits)
    median = percentile(kept, 0.5)
    return Row(
        kernel=case.kernel,
        provider=provider.name,
        shape=case.label,
        m=_m(case),
        format=provider.format,
        device=case.device,
        arithmetic=provider.arithmetic,
        threads=threads,
        n=len(kept),
        median_us=median,
        min_us=min(kept, default=math.nan),
        p10_us=percentile(kept, 0.1),
        p90_us=percentile(kept, 0.9),
        bytes_moved=ready.bytes_moved,
        gb_per_s=ready.bytes_moved / median / 1e3,
        roofline_gb_per_s=math.nan,
        roofline_fraction=math.nan,
        probe_gb_per_s=probe_rate / 1e9,
        cold=bandwidth.is_cold(ready.ring_bytes) and not ready.warm,
        neighbour_cores=load.neighbour_cores,
        steal=load.steal,
        waited=samples.waited_ns / samples.total_ns if samples.total_ns else math.nan,
        set_aside=len(samples.us) - len(kept),
        ours=provider.ours,
        peak_extra_bytes=ready.peak_bytes,
        ring_bytes=ready.ring_bytes,
        ring_gb_per_s=bandwidth.rate(ready.ring_bytes) / 1e9,
    )
