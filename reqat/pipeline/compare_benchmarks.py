"""Holding a fresh benchmark against the one that is pinned for the same type of machine.

Times of two runs differ by what else the machine did; so a difference is no verdict here, and nothing passes or fails.
What is shown is each row's time over the pinned one's, beside the rooflines that both runs read. Between types of
machines (:mod:`reqat.records.machines`) no ratio is given at all.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from reqat.config.errors import ReqatError
from reqat.config.paths import Paths
from reqat.pipeline.benchmark import CSV, benchmark_of
from reqat.records import pinned, record
from reqat.records.machines import machine_type

KEYS = ("kernel", "provider", "format", "shape", "device", "threads")


@dataclass(frozen=True)
class Ratios:
    """A fresh benchmark beside a pinned one of the same type of machine."""

    machine: str
    pinned: str
    """Name of the pinned run."""
    roofline_bytes_per_s: tuple[float, float]
    """Fresh, pinned."""
    rows: list[tuple[str, float, float]]
    """What was timed, in words; microseconds fresh and pinned."""


def compare_benchmarks(tier: str, paths: Paths) -> Ratios:
    """The fresh benchmark of a tier beside the newest pinned one of its type of machine.

    Raises `ReqatError` where none of that type is pinned, naming those that are, or the fresh one is not whole.
    """
    import pandas as pd

    folder = paths.throughput(benchmark_of(tier, paths).id)
    made = record.verify(folder)
    machine, there = machine_type(made), pinned.benchmarks(tier, paths)
    if machine not in there:
        others = "; ".join(f"{kind} ({path.name})" for kind, path in sorted(there.items())) or "none"
        raise ReqatError(
            f"no benchmark of tier {tier} is pinned for this type of machine, {machine} (pinned: {others}). Times of "
            "another type are not comparable; `reqat pin --what benchmark` keeps this one."
        )
    with pinned.restored(there[machine], "benchmark") as kept:
        ((id, then),) = kept.records.items()
        old = pd.read_csv(kept.root / "throughput" / id / CSV)
    both = pd.read_csv(folder / CSV).merge(old, on=list(KEYS), suffixes=("", "_pinned"))
    both = both[both.median_us.notna() & both.median_us_pinned.notna()]
    rows = [(_label(row), float(row.median_us), float(row.median_us_pinned)) for row in both.itertuples()]
    if not rows:
        raise ReqatError(f"the fresh benchmark and {there[machine].name} timed nothing in common; pin the tier anew.")
    rooflines = tuple(float(entry["metrics"]["roofline_bytes_per_s"]) for entry in (made, then))
    return Ratios(machine, there[machine].name, (rooflines[0], rooflines[1]), rows)


def report(found: Ratios) -> str:
    """The comparison as a table."""
    width = max(len(label) for label, _, _ in found.rows)
    lines = [f"{'timed':<{width}}  {'pinned, us':>12} {'fresh, us':>12} {'fresh/pinned':>12}"]
    lines += [f"{label:<{width}}  {then:>12.1f} {now:>12.1f} {now / then:>12.2f}" for label, now, then in found.rows]
    fresh, then = (rate / 1e9 for rate in found.roofline_bytes_per_s)
    middle = statistics.median(now / old for _, now, old in found.rows)
    lines.append(
        f"{len(found.rows)} rows on {found.machine}, against {found.pinned}; median {middle:.2f} times its time. "
        f"Read roofline {fresh:.1f} GB/s, pinned {then:.1f}: what else a machine does shows in both."
    )
    return "\n".join(lines)


def _label(row: Any) -> str:
    threads = f", {row.threads} threads" if row.threads > 1 else ""
    return f"{row.kernel} {row.shape}, {row.provider} {row.format}{threads}"
