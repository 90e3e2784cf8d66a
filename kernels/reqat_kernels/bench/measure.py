"""What is measured: cases, providers, their work, and the rows that come of it. The clock is in
:mod:`reqat_kernels.bench.turns`.

A provider makes a :class:`Work` of a case: a ring of copies of its weights, of which every call takes the next, as
decoding takes the next layer; a check against the reference, and what a call has to read and write. Whether a ring is
``cold`` follows from how fast a buffer of its size is read again and again
(:class:`~reqat_kernels.bench.machine.Bandwidth`): as slowly as memory, or from a cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from reqat_kernels.bench.machine import MEMORY_BYTES, Bandwidth, present

ARITHMETICS = ("native", "emulated", "modelled")
# A sample whose thread waited for a core longer than this share of it is set aside, as long as enough samples remain.
_WAIT_SHARE, _KEPT_SHARE = 0.01, 1 / 3


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
    """Bytes that a ring of copies may take, one copy at least; 0: who measures decides, by :func:`ring_bytes`."""
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
        return max(1, self.ring_bytes // max(1, bytes_each))


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
    or a crash ends the benchmark instead of costing a row."""

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


@dataclass(frozen=True)
class Needs:
    """Bytes of memory that a provider of a case takes beside its ring: ``held`` as long as it is timed, ``passing``
    while it is prepared and checked, and ``copy``, the least that a ring takes (0: there is no ring). ``pages``: what a
    ring takes over its bytes, on average, because copies begin at huge pages. Estimates from above."""

    held: int = 0
    passing: int = 0
    copy: int = 0
    pages: float = 1.0


@dataclass
class Kernel:
    """A computation with several providers. ``cases(sizes, device)`` turns settings into cases."""

    name: str
    needs: Callable[[Case], Needs] = lambda case: Needs()
    resident: bool = True
    """Whether all providers of a case stay in memory while they take turns. If not, each is made ready for its turn
    and gives its memory back after it: for calls of seconds with operands of gigabytes."""
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
    """Whether data came from memory: a ring (or a model's weights) that is read again and again as slowly as the
    largest buffer is. False too where nobody counted it."""
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
    ring_bytes: int | None = None
    """Bytes read between two uses of the same ones: a ring, or a model's weights. None: not counted."""
    ring_gb_per_s: float | None = None
    """How fast one thread read a buffer of that size again and again."""
    bits: str | None = None
    """Decoding: bits a number, scales included, of the decoder's matrices / the output head / the embeddings."""
    failure: str | None = None
    """Why there is no time: how its process ended, what it raised, or by how much its result was off."""


def failed_row(
    kernel: str, provider: str, format: str, shape: str, m: int, threads: int, reason: str, **more: Any
) -> Row:
    """The row of what was not timed, or not to the end: no samples, no times, and the reason."""
    nan = math.nan
    given: dict[str, Any] = {"device": "cpu", "arithmetic": "native"} | more
    return Row(
        kernel=kernel, provider=provider, shape=shape, m=m, format=format, threads=threads, n=0, median_us=nan,
        min_us=nan, p10_us=nan, p90_us=nan, bytes_moved=0, gb_per_s=nan, roofline_gb_per_s=nan, roofline_fraction=nan,
        probe_gb_per_s=nan, cold=False, neighbour_cores=nan, steal=nan, waited=nan, set_aside=0, failure=reason,
        **given,
    )  # fmt: skip


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


def ring_bytes(bandwidth: Bandwidth, memory: int) -> int:
    """Bytes of a ring that has ``memory`` for itself: twice the size from which on data is cold, all of ``memory``
    where that is less, or where no such size is known."""
    return memory if bandwidth.cold_bytes is None else min(memory, 2 * bandwidth.cold_bytes)


def against_roofline(rows: Iterable[Row], best_bytes_per_s: Mapping[int, float]) -> list[Row]:
    """The rows with the run's roofline filled in: the best rate that the probe read at with as many threads, anywhere
    in the run (number of threads -> bytes a second).

    Rows that have one (of another device) keep it.
    """
    out = []
    for row in rows:
        roof = best_bytes_per_s.get(row.threads, math.nan) / 1e9
        known = not math.isnan(row.roofline_gb_per_s)
        out.append(row if known else replace(row, roofline_gb_per_s=roof, roofline_fraction=row.gb_per_s / roof))
    return out


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
