"""The benchmark of kernels and decoding, section by section.

Nothing is computed in this process: each provider of a kernel and each decoding implementation is served by a worker
process, and takes turns with the others (:mod:`reqat_kernels.bench.turns`, :mod:`reqat.evaluation.throughput`); what
knows only our code and torch runs as a whole in one (:mod:`reqat.pipeline.bench_sections`). So memory is free again
before the next section starts, and code of others that dies (a protection fault inside ggml, say) costs its own rows,
which say so. What the sections are going to take of memory is told first, and refused where there is no room.
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reqat.config import machine
from reqat.config.errors import ReqatError
from reqat.config.files import read_json, write_file
from reqat.config.paths import Paths
from reqat.config.throughput import FILE, LEAST_MEMORY_MB, Throughput, load_throughput, sources
from reqat.pipeline.bench_kept import Kept
from reqat.pipeline.bench_sections import Bench, Section, planned_bytes, preload, sections
from reqat.records import provenance, record

CSV = "throughput.csv"
_ERROR_PREFIX = "reqat: error: "


def benchmark_of(tier: str, paths: Paths) -> Throughput:
    """The tier's benchmark. Raises `ReqatError` if it has none."""
    found = load_throughput(tier, paths.config)
    if found is None:
        raise ReqatError(f"tier {tier} has no benchmark; give it a section in config/{FILE}.")
    return found


def write_state(id: str, paths: Paths, reason: str | None) -> None:
    """Note how an attempt at a benchmark ended: measured (None), or why not."""
    state = {"state": "measured"} if reason is None else {"state": "failed", "reason": reason}
    write_file(paths.throughput_state(id), json.dumps({"id": id} | state) + "\n")


def failure_of(id: str, paths: Paths) -> str | None:
    """Why the last attempt at a benchmark failed; None if it did not."""
    path = paths.throughput_state(id)
    if not path.is_file():
        return None
    state = read_json(path, "note on a benchmark", "remove it, and measure again")
    return str(state.get("reason", "for no known reason")) if state.get("state") == "failed" else None


def is_current(out: Path, paths: Paths) -> bool:
    """Whether a result is newer than the sources of the code that it measured."""
    made = (out / record.FILE).stat().st_mtime
    return all(file.stat().st_mtime <= made for file in sources(paths.root))


def reason_of(code: int, log: Path | None) -> str:
    """Why `reqat bench` ended with `code`, in one line: the error that its log closes with, or the signal."""
    if code > 128:
        ended = signal.Signals(code - 128).name if code - 128 in set(signal.Signals) else f"exit code {code}"
        memory = ", as the system does when memory runs out" if ended == "SIGKILL" else ""
        return f"it was ended by {ended}{memory}"
    lines = []
    if log is not None and log.is_file():
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line for line in lines if line.startswith(_ERROR_PREFIX)]
    return said[-1].removeprefix(_ERROR_PREFIX) if said else f"it ended with exit code {code}"


def memory_of(settings: Throughput) -> int:
    """Bytes that the benchmark may take: what its settings declare, less where less is free.

    Raises `ReqatError` where too little is free to measure anything.
    """
    free = int(machine.USABLE * machine.available_bytes())
    if free < LEAST_MEMORY_MB * machine.MB:
        raise ReqatError(
            f"the benchmark needs {LEAST_MEMORY_MB / 1000:g} GB of free memory, {free / 1e9:.1f} GB are: close other "
            "programs, or leave it out (make figures BENCH=no)."
        )
    return min(settings.memory_mb * machine.MB, free)


def measure_all(
    settings: Throughput,
    out: Path,
    paths: Paths,
    say: Callable[[str], None] | None = None,
    threads: int = 0,
    keep: Path | None = None,
) -> dict[str, Any]:
    """Measure what the settings ask for and write `throughput.csv` into `out`; returns the record's metrics.

    ``threads``: for every section, in place of what the settings say; 0: what they say. ``keep``: a folder where
    sections outlive a kill, so that another attempt on this machine, with this code, measures the others alone. Raises
    `ReqatError` where memory is short or a section cannot be measured.
    """
    import pandas as pd

    from reqat_kernels.bench.machine import last_level_cache_bytes
    from reqat_kernels.bench.measure import Result, against_roofline

    if sys.modules.get("torchao", ...) is None:  # start_computing keeps it from other verbs; here it is a peer
        del sys.modules["torchao"]
    bench = Bench(settings, memory_of(settings), out, paths.base, say or (lambda _: None), threads)
    preload(settings)
    whole, peaks = Section(Result()), {}
    kept = None if keep is None else Kept(keep, bench, paths)
    try:
        if kept is not None:
            kept.bandwidth(bench)
        planned = planned_bytes(bench)
        for name, work in sections(settings).items():
            section = measured_once(name, work, bench, kept)
            peaks[name] = section.peak_memory_bytes
            if section.peak_memory_bytes > bench.memory:
                took, allowed = section.peak_memory_bytes / 1e9, bench.memory / 1e9
                line = f"{name}: took {took:.1f} GB of memory, more than the {allowed:.1f} it may take."
                whole.result.refused.append(line)
            whole.result.add(section.result)
            whole.rates += section.rates
            for kind, found in section.compared.items():
                whole.compared.setdefault(kind, []).extend(found)
    finally:
        bench.stop()
    rates = {n: list(found) for n, found in bench.read_rates().items()}
    rates.setdefault(threads or settings.threads, []).extend(whole.rates)
    rates = {n: found for n, found in sorted(rates.items()) if found}
    best = {n: max(found) for n, found in rates.items()}
    rows = against_roofline(whole.result.rows, best)
    table = pd.DataFrame([dataclasses.asdict(row) for row in rows])
    made, hardware = provenance.commit(paths.root), provenance.hardware()
    versions = provenance.versions()
    names = ("python", "torch", "transformers", "triton", "llama-cpp-python", "torchao")
    table["commit"] = f"{made['commit']}{'+changes' if made['dirty'] else ''}"
    table["versions"] = "; ".join(f"{name} {versions[name]}" for name in names if name in versions)
    table["hardware"] = f"{hardware['cpu']}, {hardware['cores']} cores"
    write_file(out / CSV, table.to_csv(index=False, lineterminator="\n"))
    for line in [*whole.result.skipped, *whole.result.refused]:
        print(f"reqat: warning: {line}", file=sys.stderr)
    read = bench.bandwidth
    every = [rate for found in rates.values() for rate in found]
    return {
        "rows": len(rows),
        "failed_rows": sum(row.failure is not None for row in rows),
        "skipped": whole.result.skipped,
        "refused": whole.result.refused,
        "roofline_bytes_per_s": next(iter(best.values()), math.nan),
        "roofline_bytes_per_s_by_threads": {str(n): rate for n, rate in best.items()},
        "probe_bytes_per_s": {"n": len(every), "min": min(every, default=math.nan)},
        "read_bandwidth": {"bytes": read.bytes, "bytes_per_s": read.rates, "cold_bytes": read.cold_bytes},
        "last_level_cache_bytes": last_level_cache_bytes(),
        "memory": {"budget_bytes": bench.memory, "planned_bytes": planned, "peak_bytes": peaks},
        "agreement": whole.compared.get("agreement", []),
        "heads": whole.compared.get("heads", []),
        "speculation": whole.compared.get("speculation", []),
        "measured_before": {} if kept is None else kept.used,
    }


def measured_once(name: str, work: Callable[[Bench], Section], bench: Bench, kept: Kept | None) -> Section:
    """Measure a section, or take what an earlier attempt kept of it. Raises like `measured`."""
    found = None if kept is None else kept.read(name)
    if found is not None:
        bench.say(f"{name}: measured by an earlier attempt")
        section, rates = found
        for threads, more in rates.items():
            bench.earlier.setdefault(threads, []).extend(more)
        return section
    before = {threads: len(rates) for threads, rates in bench.own_rates().items()}
    section = measured(name, work, bench)
    if kept is not None:
        kept.write(name, section, {n: rates[before.get(n, 0) :] for n, rates in bench.own_rates().items()})
    return section


def measured(name: str, work: Callable[[Bench], Section], bench: Bench) -> Section:
    """Measure a section. Raises `ReqatError` if a process of our own code ended in it, and what ``work`` raises."""
    from reqat_kernels.bench.worker import Died

    bench.held.clear()
    try:
        section = work(bench)
    except Died as died:
        raise ReqatError(
            f"section {name} of the benchmark ended: {died}. Free some memory if that is short, and run it again."
        ) from None
    section.peak_memory_bytes = max([section.peak_memory_bytes, *bench.held])
    return section
