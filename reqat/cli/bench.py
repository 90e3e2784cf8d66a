"""The verb about speed: `bench` measures; `reqat report` makes Figure 6 and its tables of that."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from reqat.cli.app import INTERRUPTED, Quiet, Tier, app, session, start_computing
from reqat.cli.arguments import Threads
from reqat.cli.run import Force
from reqat.config.errors import ReqatError
from reqat.pipeline.benchmark import benchmark_of, is_current, measure_all, reason_of, write_state
from reqat.pipeline.jobs import finished, running


@app.command()
def bench(
    id: Annotated[str | None, typer.Argument(help="Id of the tier's benchmark (default: what config/ says).")] = None,
    tier: Tier = "laptop",
    quiet: Quiet = False,
    force: Force = False,
    threads: Threads = 0,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only this section (repeatable), such as decode, heads, speculation; a result of its own."),
    ] = None,
    current: Annotated[
        bool, typer.Option("--current", help="Again, too, if the code is newer than the result.")
    ] = False,
) -> None:
    """Time kernels and decoding, ours beside others', in turns. Run it alone: it says who disturbed it.

    Killed, it goes on with the section that it was at, as long as machine, code and settings are the same."""
    settings, paths = benchmark_of(tier, session.paths), session.paths
    if only:
        settings = settings.only(only)
    if id is not None and id != settings.id:
        raise ReqatError(f"config/throughput.yaml changed: tier {tier}'s benchmark is {settings.id} now, not {id}.")

    def done(out: Path, id: str) -> bool:
        return finished(out, id) and (not current or is_current(out, paths))

    out = paths.throughput(settings.id)
    if force:
        shutil.rmtree(paths.checkpoints(settings.id), ignore_errors=True)
    with running("throughput", settings.id, settings, out, paths, tier=tier, force=force, done=done) as job:
        if job is not None:
            # Looking for a GPU by way of the driver would be in the way of the processes that are forked to use it.
            os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
            start_computing(threads or settings.threads)
            say = None if quiet else lambda line: print(line, flush=True)
            job.metrics = measure_all(settings, job.partial, paths, say, threads, paths.checkpoints(settings.id))
            job.resumed = bool(job.metrics["measured_before"])
    write_state(settings.id, paths, None)
    if not quiet:
        print(f"numbers: metrics of {out}/record.json" if only else f"tables: reqat report --what benchmark -t {tier}")


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
