"""The clock: providers of one computation, checked, then timed in turns.

The idea in short. All providers of a case live in one process. Each is first held against the reference there, and
what fails is not timed. Each has a ring of copies of its weights, and every call takes the next copy, as decoding takes
the next layer. A round gives every provider one burst of calls, a turn of its ring at most, in an order that turns by
one each round, with one reading of the bandwidth probe. A sample is a burst's time divided by its calls; a row states
the samples' median, minimum and percentiles. Samples during which the scheduler kept the thread waiting are set aside
and counted (``set_aside``): that clock ran for somebody else.

Data is cold: between two uses of a copy lie the rest of its ring and the whole probe, the working set that each row
states, and a row is ``cold`` where this exceeds the last-level cache (never where ``Work.warm`` reuses its data on
purpose). Rings and probe are bounded by the memory that the benchmark may take, whatever size the system gives its
caches.

Why bursts: a call of 90 microseconds is as short as what Python spends around it. A provider that can string several
calls together (ggml: one graph) may, through ``Work.chain``; that can only flatter the peer.

On a GPU the same holds with its own clock, cache and probe (:class:`~reqat_kernels.bench.machine.Cuda`).

Interleaving makes what the machine does to one provider happen to all: trust the ratios of one run, not times of two.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from reqat_kernels.bench.machine import DEVICES, MEMORY_BYTES, Load, Neighbours, Probe, present, waited_ns

ARITHMETICS = ("native", "emulated", "modelled")
# A sample whose thread waited for a core longer than this share of it is set aside, as long as enough samples remain.
_WAIT_SHARE, _KEPT_SHARE = 0.01, 1 / 3
_FIRST_READINGS = 10  # of a device's own probe, so that a short run knows its roofline too


class Absent(Exception):
    """A provider that cannot run here (not installed, not for this shape). Its text is a sentence for people."""


class Wrong(ValueError):
    """A provider whose result is not what it should be; it is not timed."""


@dataclass(frozen=True)
class Case:
    """One computation. ``shape``: its sizes by name, in the order in which they are shown."""

    kernel: str
    shape: tuple[tuple[str, int], ...]
    device: str = "cpu"
    ring_bytes: int = 0
    """Bytes that a ring of copies has to reach; 0: twice the last-level cache, as far as ``memory_bytes`` allows."""
    memory_bytes: int = MEMORY_BYTES
    """Bytes of memory that the whole benchmark may take."""

    def __getattr__(self, name: str) -> int:
        """A size by its name."""
        for key, value in object.__getattribute__(self, "shape"):
            if key == name:
                return int(value)
        raise AttributeError(f"case {self.label} has no size {name!r}")

    def on(self, device: str | None) -> list[Case]:
        """This case on ``device``, or on each that this machine has (None)."""
        return [replace(self, device=name) for name in (present() if device is None else (device,))]

    @property
    def label(self) -> str:
        """For people: ``M=1 N=2048 K=2048``."""
        return " ".join(f"{key}={value}" for key, value in self.shape)

    def copies(self, bytes_each: int) -> int:
        """How many copies make a ring."""
        wanted = self.ring_bytes or DEVICES[self.device].ring_bytes(self.memory_bytes)
        return max(1, -(-wanted // max(1, bytes_each)))


@dataclass
class Work:
    """What a provider made ready for a case.

    ``run(i)`` computes with copy ``i`` of ``copies``; ``check()`` raises :class:`Wrong` if the result is wrong;
    ``bytes_moved``: bytes that a call has to read and write at least once. ``chain(indices)``, where given, makes one
    function of the calls ``run(i) for i in indices``.
    """

    run: Callable[[int], Any]
    copies: int
    bytes_moved: int
    check: Callable[[], None]
    ring_bytes: int = 0
    """Bytes of the whole ring (0: ``copies * bytes_moved``)."""
    chain: Callable[[Sequence[int]], Callable[[], Any]] | None = None
    warm: bool = False
    """Whether all calls read the same numbers on purpose, which then stay in a cache."""
    peak_bytes: Callable[[], float] | None = None
    """Makes a call and says what it needed beyond inputs and results; called before the clock starts, as warm-up."""

    def burst(self, indices: Sequence[int]) -> Callable[[], Any]:
        """A function without arguments that computes with each of these copies."""
        if self.chain is not None:
            return self.chain(indices)
        run, order = self.run, tuple(indices)

        def calls() -> None:
            for i in order:
                run(i)

        return calls


@dataclass(frozen=True)
class Provider:
    """Somebody's implementation. ``format``: of the weights (and inputs) it computes with; ``ours``: a wrong result
    ends the benchmark instead of costing a row."""

    name: str
    format: str
    make: Callable[[Case], Work]
    arithmetic: str = "native"
    devices: tuple[str, ...] = ("cpu",)
    ours: bool = False

    @property
    def label(self) -> str:
        """For people: ``ggml, repacked Q4_0 W4A8``."""
        return f"{self.name} {self.format}"


@dataclass
class Kernel:
    """A computation with several providers. ``cases(sizes, device)`` turns settings into cases."""

    name: str
    providers: list[Provider] = field(default_factory=list)

    def provider(
        self,
        name: str,
        *,
        format: str,
        arithmetic: str = "native",
        devices: tuple[str, ...] = ("cpu",),
        ours: bool = False,
    ) -> Callable[[Callable[[Case], Work]], Callable[[Case], Work]]:
        """Register a function from a case to its :class:`Work`; it raises :class:`Absent` where it cannot run.

        Raises ValueError for a name that is taken or an arithmetic that is none.
        """
        if any(p.name == name and p.format == format for p in self.providers):
            raise ValueError(
                f"kernel {self.name} has a provider {name!r} of {format} already; give this one another name"
            )
        if arithmetic not in ARITHMETICS:
            raise ValueError(f"arithmetic {arithmetic!r}: choose one of {', '.join(ARITHMETICS)}")

        def register(make: Callable[[Case], Work]) -> Callable[[Case], Work]:
            self.providers.append(Provider(name, format, make, arithmetic, devices, ours))
            return make

        return register


@dataclass(frozen=True)
class Row:
    """One line of the table. Times in microseconds a call (decoding: a step of the batch), rates in 10^9 bytes/s."""

    kernel: str
    provider: str
    shape: str
    m: int
    format: str
    device: str
    arithmetic: str
    threads: int
    n: int
    median_us: float
    min_us: float
    p10_us: float
    p90_us: float
    bytes_moved: int
    gb_per_s: float
    roofline_gb_per_s: float
    roofline_fraction: float
    probe_gb_per_s: float
    """Median of the probe in the rounds of this case: below the roofline, somebody else was reading."""
    cold: bool
    """Whether the working set was larger than the last-level cache; False too where nobody counted it."""
    neighbour_cores: float
    steal: float
    waited: float
    """Share of this row's own time that the thread stood ready without a core."""
    set_aside: int
    """Samples not among the n, because the thread waited for a core meanwhile."""
    ours: bool = False
    output_tokens: int | None = None
    tokens_per_s: float | None = None
    weight_bytes: int | None = None
    cache_bytes: int | None = None
    peak_extra_bytes: float | None = None
    working_set_bytes: int | None = None
    """Bytes read between two uses of the same ones: ring and probe, or a model's weights. None: not counted."""
    last_level_cache_bytes: int | None = None


@dataclass
class Clock:
    """Samples of one provider in one case."""

    provider: Provider
    work: Work
    indices: Iterator[Sequence[int]]
    bursts: dict[tuple[int, ...], Callable[[], Any]] = field(default_factory=dict)
    samples_us: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    """Share of each sample's time that the thread waited for a core."""
    total_ns: int = 0
    waited_ns: int = 0
    peak_bytes: float | None = None

    def tick(self, device: str) -> None:
        """Time one burst."""
        order = tuple(next(self.indices))
        burst = self.bursts.get(order)
        if burst is None:
            burst = self.bursts[order] = DEVICES[device].ready(self.work.burst(order))
        waited = waited_ns()
        elapsed = DEVICES[device].time_ns(burst)
        waited = waited_ns() - waited
        self.waited_ns += waited
        self.total_ns += elapsed
        self.samples_us.append(elapsed / len(order) / 1e3)
        self.waits.append(waited / max(1, elapsed))

    def kept(self) -> list[float]:
        """The samples that count, see :func:`undisturbed`."""
        return undisturbed(self.samples_us, self.waits)


def chunks(copies: int, size: int) -> Iterator[Sequence[int]]:
    """The ring's indices in bursts of ``size`` (the last of a turn may be shorter), turn after turn, without end."""
    size = max(1, min(size, copies))
    while True:
        for start in range(0, copies, size):
            yield range(start, min(start + size, copies))


def percentile(samples: Sequence[float], q: float) -> float:
    """The q-th quantile, interpolated linearly; NaN of nothing."""
    if not samples:
        return math.nan
    ordered = sorted(samples)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def undisturbed(samples: Sequence[float], waits: Sequence[float]) -> list[float]:
    """Samples during which the thread did not wait for a core; all of them where fewer than a third are such.

    The choice looks at the scheduler's account alone, never at the time measured.
    """
    kept = [sample for sample, wait in zip(samples, waits, strict=True) if wait <= _WAIT_SHARE]
    return kept if len(kept) >= _KEPT_SHARE * len(samples) else list(samples)


@dataclass
class Result:
    """What measuring gave: rows; what is not there, and why; what was refused because its result is wrong."""

    rows: list[Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def add(self, other: Result) -> None:
        """Take over another's rows and sentences, each sentence once."""
        self.rows += other.rows
        self.skipped += [line for line in dict.fromkeys(other.skipped) if line not in self.skipped]
        self.refused += [line for line in dict.fromkeys(other.refused) if line not in self.refused]


def measure(
    case: Case,
    providers: Iterable[Provider],
    *,
    rounds: int,
    burst_s: float = 2e-3,
    probe: Probe | None = None,
    avoid: Collection[str] = (),
    entering: Callable[[str], object] = lambda name: None,
) -> Result:
    """Check every provider of a case and time those that pass, in turns.

    Args:
        rounds: samples a provider.
        burst_s: how long a burst should take; a turn of the ring at most, one call at least.
        probe: the run's bandwidth probe, read once a round; its best over the run is the roofline. One of another
            device is left alone: the case's device has its own then, and its rows come with their roofline.
        avoid: names (:attr:`Provider.label`) of providers to leave out.
        entering: told the name of the provider whose code runs next if it is not ours, and "" after that.

    A provider for a device that this machine does not have is skipped, with a sentence; so is one of others that raises
    anything, then or on the clock.

    Raises Wrong if one of our own providers fails its check, and whatever else ours raises.
    """
    shared = probe is not None and probe.device == case.device
    if probe is None or not shared:
        probe = own_probe(case.device)
    out, clocks = Result(), []
    for provider in providers:
        if provider.label in avoid:
            continue
        if case.device not in provider.devices:
            if not set(provider.devices) & set(present()):
                wanted = " or ".join(provider.devices)
                out.skipped.append(f"{case.kernel}, {provider.name}: it needs a device of type {wanted}; none is here.")
            continue
        entering(_foreign(provider))
        try:
            work = provider.make(case)
            work.check()
            work.check = _passed  # what it compared with would take memory as long as the clock runs
            peak, calls = _warm_up(work, burst_s, case.device)
        except Absent as reason:
            out.skipped.append(f"{case.kernel}, {provider.name}: {reason}")
            continue
        except Wrong as error:
            if provider.ours:
                raise Wrong(f"{case.kernel} {case.label}, {provider.name} {provider.format}: {error}") from error
            out.refused.append(f"{case.kernel} {case.label}, {provider.name} {provider.format}, not timed: {error}")
            continue
        except Exception as error:
            if provider.ours:
                raise
            out.skipped.append(_raised(case, provider, error))
            continue
        clocks.append(Clock(provider, work, chunks(work.copies, calls), peak_bytes=peak))
    watch = Neighbours()
    first_probe = len(probe.rates)
    for turn in range(rounds):
        probe()
        at = turn % max(1, len(clocks))
        for clock in clocks[at:] + clocks[:at]:
            entering(_foreign(clock.provider))
            try:
                clock.tick(case.device)
            except Exception as error:
                if clock.provider.ours:
                    raise
                out.skipped.append(_raised(case, clock.provider, error))
                clocks.remove(clock)
    entering("")
    load, rates = watch.load(), probe.rates[first_probe:]
    out.rows = [_row(case, clock, load, percentile(rates, 0.5), probe.buffer.nbytes) for clock in clocks]
    if not shared:
        out.rows = against_roofline(out.rows, probe.best)
    return out


@cache
def own_probe(device: str) -> Probe:
    """The probe of a device for this process, read a few times already."""
    probe = Probe(device=device)
    for _ in range(_FIRST_READINGS):
        probe()
    return probe


_LONG_CALL_S = 1.0  # from here on, one call is warm-up enough


def _warm_up(work: Work, burst_s: float, device: str) -> tuple[float | None, int]:
    """What a call needs beyond inputs and results, if the work can say; how many calls make a burst of ``burst_s``."""
    peak = None
    if work.peak_bytes is not None:
        start = time.perf_counter()
        peak = work.peak_bytes()
        if time.perf_counter() - start > _LONG_CALL_S:
            return peak, 1
    times = []
    for indices, _ in zip(chunks(work.copies, 2), range(3), strict=False):
        burst = DEVICES[device].ready(work.burst(indices))
        times.append(DEVICES[device].time_ns(burst) / len(indices))
    return peak, max(1, math.ceil(1e9 * burst_s / max(min(times), 1.0)))


def _foreign(provider: Provider) -> str:
    return "" if provider.ours else provider.label


def _raised(case: Case, provider: Provider, error: Exception) -> str:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return f"{case.kernel} {case.label}, {provider.label}: not timed, it raised {reason}"


def _passed() -> None:
    """The check of work that has passed it."""


def _row(case: Case, clock: Clock, load: Load, probe_rate: float, probe_bytes: int) -> Row:
    samples, work, provider = clock.kept(), clock.work, clock.provider
    median = percentile(samples, 0.5)
    working_set = (work.ring_bytes or work.copies * work.bytes_moved) + probe_bytes
    cache_bytes = DEVICES[case.device].cache_bytes()
    return Row(
        kernel=case.kernel,
        provider=provider.name,
        shape=case.label,
        m=dict(case.shape).get("M", dict(case.shape).get("B", 1)),
        format=provider.format,
        device=case.device,
        arithmetic=provider.arithmetic,
        threads=torch.get_num_threads(),
        n=len(samples),
        median_us=median,
        min_us=min(samples, default=math.nan),
        p10_us=percentile(samples, 0.1),
        p90_us=percentile(samples, 0.9),
        bytes_moved=work.bytes_moved,
        gb_per_s=work.bytes_moved / median / 1e3,
        roofline_gb_per_s=math.nan,
        roofline_fraction=math.nan,
        probe_gb_per_s=probe_rate / 1e9,
        cold=working_set > cache_bytes and not work.warm,
        neighbour_cores=load.neighbour_cores,
        steal=load.steal,
        waited=clock.waited_ns / clock.total_ns if clock.total_ns else math.nan,
        set_aside=len(clock.samples_us) - len(samples),
        ours=provider.ours,
        peak_extra_bytes=clock.peak_bytes,
        working_set_bytes=working_set,
        last_level_cache_bytes=cache_bytes,
    )


def against_roofline(rows: Iterable[Row], best_bytes_per_s: float) -> list[Row]:
    """The rows with the run's roofline filled in: the best rate that the probe read at, anywhere in the run.

    Rows that have one (of another device) keep it.
    """
    roof = best_bytes_per_s / 1e9
    return [
        replace(row, roofline_gb_per_s=roof, roofline_fraction=row.gb_per_s / roof)
        if math.isnan(row.roofline_gb_per_s)
        else row
        for row in rows
    ]


def triton_runs(device: str) -> None:
    """Raise :class:`Absent` unless Triton kernels run on this device (in the interpreter: on any, for tests)."""
    from reqat_kernels.triton import runtime

    if not runtime.AVAILABLE:
        raise Absent("triton is not installed: pip install 'reqat[kernels]'.")
    if device != "cuda" and not runtime.INTERPRETED:
        raise Absent("Triton kernels need a CUDA device.")


def within(y: Tensor, reference: Tensor, bound: Tensor, what: str) -> None:
    """Raise :class:`Wrong` where ``|y - reference| > bound`` (all float64, elementwise) or y is not finite."""
    if y.shape != reference.shape:
        raise Wrong(f"{what} has shape {tuple(y.shape)}, should have {tuple(reference.shape)}")
    over = (y.double() - reference).abs() / bound.clamp(min=torch.finfo(torch.float64).tiny)
    worst = float(over.max()) if over.numel() else 0.0
    if not worst <= 1:  # NaN fails too
        raise Wrong(f"{what} is off by up to {worst:.3g} times what its arithmetic allows")
