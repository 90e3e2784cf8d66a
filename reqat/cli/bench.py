"""The verb about speed: `bench` measures; `reqat report` makes Figure 6 and its tables of that."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from reqat.cli.app import INTERRUPTED, Quiet, Tier, app, session, start_computing
from reqat.cli.arguments import Threads
from reqat.cli.run import Force
from reqat.config import machine
from reqat.config.errors import ReqatError
from reqat.config.files import write_file
from reqat.config.throughput import LEAST_MEMORY_MB, Throughput, sources
from reqat.pipeline.benchmark import Bench, Section, benchmark_of, measured, preload, sections, write_state
from reqat.pipeline.jobs import finished, running
from reqat.records import provenance, record

CSV = "throughput.csv"
ERROR_PREFIX = "reqat: error: "


def is_current(out: Path) -> bool:
    """Whether a result is newer than the sources of the code that it measured."""
    made = (out / record.FILE).stat().st_mtime
    return all(file.stat().st_mtime <= made for file in sources(session.paths.root))


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


@app.command()
def bench(
    id: Annotated[str | None, typer.Argument(help="Id of the tier's benchmark (default: what config/ says).")] = None,
    tier: Tier = "laptop",
    quiet: Quiet = False,
    force: Force = False,
    threads: Threads = 0,
    current: Annotated[
        bool, typer.Option("--current", help="Again, too, if the code is newer than the result.")
    ] = False,
) -> None:
    """Time kernels and decoding, ours beside others' in one process. Run it alone: it says who disturbed it."""
    settings, paths = benchmark_of(tier, session.paths), session.paths
    if id is not None and id != settings.id:
        raise ReqatError(f"config/throughput.yaml changed: tier {tier}'s benchmark is {settings.id} now, not {id}.")

    def done(out: Path, id: str) -> bool:
        return finished(out, id) and (not current or is_current(out))

    out = paths.throughput(settings.id)
    with running("throughput", settings.id, settings, out, paths, tier=tier, force=force, done=done) as job:
        if job is not None:
            # Looking for a GPU by way of the driver would be in the way of the processes that are forked to use it.
            os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
            start_computing(threads or settings.threads)
            say = None if quiet else lambda line: print(line, flush=True)
            job.metrics = measure_all(settings, job.partial, say)
    write_state(settings.id, paths, None)


@app.command("bench-failed", hidden=True)
def bench_failed(
    id: Annotated[str, typer.Argument(help="Id of the benchmark that failed.")],
    code: Annotated[int, typer.Option(help="Exit code of `reqat bench`.")] = 1,
    log: Annotated[Path | None, typer.Option(help="Its log.")] = None,
) -> None:
    """Note that a benchmark failed, so that its figure and tables can say why. An interruption is no failure.

    For the workflow: whatever ends the clock, the results of hours of training are collected.
    """
    if code in (INTERRUPTED, 128 + signal.SIGTERM, 128 + signal.SIGINT):
        raise typer.Exit(code)
    reason = reason_of(code, log)
    write_state(id, session.paths, reason)
    print(f"reqat: warning: the benchmark failed: {reason}", file=sys.stderr)


def reason_of(code: int, log: Path | None) -> str:
    """Why `reqat bench` ended with `code`, in one line: the error that its log closes with, or the signal."""
    if code > 128:
        ended = signal.Signals(code - 128).name if code - 128 in set(signal.Signals) else f"exit code {code}"
        memory = ", as the system does when memory runs out" if ended == "SIGKILL" else ""
        return f"it was ended by {ended}{memory}"
    lines = []
    if log is not None and log.is_file():
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line for line in lines if line.startswith(ERROR_PREFIX)]
    return said[-1].removeprefix(ERROR_PREFIX) if said else f"it ended with exit code {code}"


def measure_all(settings: Throughput, out: Path, say: Any = None) -> dict[str, Any]:
    """Measure what the settings ask for and write `throughput.csv` into `out`; returns the record's metrics.

    Raises `ReqatError` where memory is short or a section cannot be measured.
    """
    import pandas as pd

    from reqat_kernels.bench.machine import last_level_cache_bytes
    from reqat_kernels.bench.measure import Result, against_roofline

    if sys.modules.get("torchao", ...) is None:  # start_computing keeps it from other verbs; here it is a peer
        del sys.modules["torchao"]
    bench = Bench(settings, memory_of(settings), out, session.paths.base, say or (lambda _: None))
    cache_bytes = last_level_cache_bytes()
    preload(settings)
    whole, peaks = Section(Result(), [], []), {}
    for name, work in sections(settings).items():
        section = measured(name, work, bench)
        peaks[name] = section.peak_memory_bytes
        if section.peak_memory_bytes > bench.memory:
            took, allowed = section.peak_memory_bytes / 1e9, bench.memory / 1e9
            line = f"{name}: took {took:.1f} GB of memory, more than the {allowed:.1f} it may take."
            whole.result.refused.append(line)
        whole.result.add(section.result)
        whole.probe_bytes_per_s += section.probe_bytes_per_s
        whole.agreement += section.agreement
    rates = whole.probe_bytes_per_s
    rows = against_roofline(whole.result.rows, max(rates, default=math.nan))
    table = pd.DataFrame([dataclasses.asdict(row) for row in rows])
    made, hardware = provenance.commit(session.paths.root), provenance.hardware()
    versions = provenance.versions()
    names = ("python", "torch", "transformers", "triton", "llama-cpp-python", "torchao")
    table["commit"] = f"{made['commit']}{'+changes' if made['dirty'] else ''}"
    table["versions"] = "; ".join(f"{name} {versions[name]}" for name in names if name in versions)
    table["hardware"] = f"{hardware['cpu']}, {hardware['cores']} cores"
    write_file(out / CSV, table.to_csv(index=False, lineterminator="\n"))
    for line in [*whole.result.skipped, *whole.result.refused]:
        print(f"reqat: warning: {line}", file=sys.stderr)
    return {
        "rows": len(rows),
        "skipped": whole.result.skipped,
        "refused": whole.result.refused,
        "roofline_bytes_per_s": max(rates, default=math.nan),
        "probe_bytes_per_s": {"n": len(rates), "min": min(rates, default=math.nan)},
        "last_level_cache_bytes": cache_bytes,
        "memory": {"budget_bytes": bench.memory, "peak_bytes": peaks},
        "agreement": whole.agreement,
    }
