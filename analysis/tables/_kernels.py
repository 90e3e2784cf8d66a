"""The table of one kernel of the benchmark: a row a provider and format, a column a shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from analysis.report.benchmark import MIB, Measured, pick, providers, short_failure, size
from analysis.report.document import Column, Table, Text, number


@dataclass(frozen=True)
class Kernel:
    """How the table of a kernel reads."""

    name: str
    """As in the rows and in `config/throughput.yaml`."""
    title: str
    caption: str
    memory_bound: bool = False
    """Whether its time is a matter of bytes, so that the share of the read roofline says something."""
    milliseconds: bool = False
    """Times in milliseconds, not microseconds."""
    shows_memory: bool = False
    """Whether cells say how much memory was taken beyond inputs and results."""
    adds_to: str | None = None
    """The provider to which the others add something: their cells say how much longer they take."""
    against: Mapping[str, Callable[[Any], bool]] = field(default_factory=dict)
    """What ours is compared with -> which of the other rows that is."""


def kernel_table(measured: Measured, kernel: Kernel) -> Table:
    """One row a provider and format, one column a shape: median time and the share of the roofline.

    Below stands what all this is for: how many times the best of ours is as fast as the best of some others; what
    the probe read meanwhile; and, where several numbers of threads were measured, how many times each is as fast as
    with the fewest. Where ours adds to another (`Kernel.adds_to`), its own cells say how much. What could not be timed
    has the reason in its cell. Each device and number of threads has columns of its own, and is compared with itself.
    """
    failed = measured.failed_of(kernel.name)
    data = pd.concat([measured.of(kernel.name), failed]) if len(failed) else measured.of(kernel.name)
    few = int(data.threads.min()) if len(data) else 1
    rows = data.assign(
        base=[_at(row.shape, row.device, few, few) for row in data.itertuples()],
        shape=[_at(row.shape, row.device, int(row.threads), few) for row in data.itertuples()],
    )
    shapes = list(dict.fromkeys(rows["shape"]))
    names = [dict(part.split("=") for part in shape.partition(",")[0].split() if "=" in part) for shape in shapes]
    columns = [Column("provider", align="l"), Column("format", align="l")]
    for shape, n in zip(shapes, names, strict=True):
        square = "M" in n and n.get("N") == n.get("K")
        device = shape.partition(", ")[2]
        columns.append(
            Column(f"M={n['M']}", ", ".join(filter(None, (f"N=K={n['N']}", device)))) if square else Column(shape)
        )
    shares = kernel.memory_bound and bool(rows.roofline_fraction.notna().any())
    fastest = {s: rows[rows["shape"] == s].median_us.min() for s in shapes}

    def line(provider: str, fmt: str) -> tuple[Text, ...]:
        cells = [Text(provider), Text(fmt)]
        for shape in shapes:
            row = pick(rows, provider=provider, format=fmt, shape=shape)
            if row is None:
                cells.append(Text())
                continue
            if math.isnan(row.median_us):
                cells.append(Text("failed", detail=f"({short_failure(row.failure)})"))
                continue
            known = shares and not math.isnan(row.roofline_fraction)
            detail = f"({100 * row.roofline_fraction:.0f}%)" if known else ""
            if kernel.shows_memory and not math.isnan(row.peak_extra_bytes):
                detail = f"({size(row.peak_extra_bytes)})" if row.peak_extra_bytes >= MIB else "(<1 MiB)"
            plain = None
            if kernel.adds_to is not None and provider != kernel.adds_to:
                plain = pick(rows, provider=kernel.adds_to, format=fmt, shape=shape)
            if plain is not None and not math.isnan(plain.median_us):
                detail = f"({number(100 * (row.median_us / plain.median_us - 1), sign=True)}%)"
            cells.append(Text(_time(row.median_us, kernel), bold=row.median_us == fastest[shape], detail=detail))
        return tuple(cells)

    def is_ours(who: tuple[str, str]) -> bool:
        return bool(rows[(rows.provider == who[0]) & (rows.format == who[1])].ours.any())

    peers = [line(*who) for who in providers(rows) if not is_ours(who)]
    own = [line(*who) for who in providers(rows) if is_ours(who)]
    ratios = [
        (
            Text(f"ours: times as fast as {what}"),
            Text(""),
            *(_times(_best(rows, s, who), _best(rows, s)) for s in shapes),
        )
        for what, who in kernel.against.items()
    ]
    probe = []
    if shares:
        probe.append(
            (Text("read probe in the same rounds, GB/s"), Text(""), *(_probe(rows[rows["shape"] == s]) for s in shapes))
        )
    scaling = [_scaling(rows, shapes, few, *who) for who in providers(rows)] if rows.threads.nunique() > 1 else []
    sections = tuple(tuple(part) for part in (peers, own, ratios if own else [], probe, scaling) if part)
    return Table(
        name=f"throughput-{kernel.name.replace('_', '-')}",
        title=kernel.title,
        caption=kernel.caption,
        footer=(*measured.notes(kernel.name), *measured.absences()),
        columns=tuple(columns),
        sections=sections,
        data=data,
    )


def _at(shape: str, device: str, threads: int, fewest: int) -> str:
    """A shape on another device than the CPU, or with more than the fewest threads, says so, and is another shape."""
    more = [device] if device != "cpu" else []
    more += [f"{threads} threads"] if threads != fewest else []
    return ", ".join([shape, *more])


def _scaling(rows: pd.DataFrame, shapes: list[str], fewest: int, provider: str, fmt: str) -> tuple[Text, ...]:
    """Under the columns of more threads: the time with the fewest threads over that with so many."""
    cells = [Text(provider), Text(f"{fmt}: times as fast as with {fewest} thread{'s' if fewest > 1 else ''}")]
    for shape in shapes:
        row = pick(rows, provider=provider, format=fmt, shape=shape)
        alone = None if row is None else pick(rows, provider=provider, format=fmt, shape=row["base"])
        if row is None or alone is None or row.threads == fewest:
            cells.append(Text())
        else:
            cells.append(_times(alone.median_us, row.median_us))
    return tuple(cells)


def _time(us: float, kernel: Kernel) -> str:
    value = us / 1000 if kernel.milliseconds else us
    return number(value, 0 if value >= 100 else 1)


def _probe(rows: pd.DataFrame) -> Text:
    """What memory gave while one shape was measured, and that as a share of the roofline, the best it gave at all."""
    rows = rows[rows.median_us.notna()]
    if rows.empty:
        return Text()
    rate, best = rows.probe_gb_per_s.iloc[0], rows.roofline_gb_per_s.iloc[0]
    return Text() if math.isnan(rate) else Text(number(rate, 1), detail=f"({100 * rate / best:.0f}%)")


def is_four_bit(fmt: str) -> bool:
    """Whether weights of a row's format take about four bits: ``INT4-g32 W4A16``, ``Q4_0 W4A8``, ``NVFP4 W4A4``."""
    return "W4" in fmt


def _best(rows: pd.DataFrame, shape: str, who: Callable[[Any], bool] | None = None) -> float:
    """Shortest median at a shape: of ours (None), or of others that ``who`` picks; NaN if there is none.

    Our loss without the entropy term is no answer to what the SEM loss costs, and does not count.
    """
    rows = rows[rows.provider != "reqat-ce"]
    there = rows[(rows["shape"] == shape) & rows.median_us.notna()]
    at = [row for row in there.itertuples() if bool(row.ours) == (who is None)]
    return min((float(row.median_us) for row in at if who is None or who(row)), default=math.nan)


def _times(theirs: float, ours: float) -> Text:
    value = theirs / ours
    return Text() if math.isnan(value) else Text(number(value, 2))
