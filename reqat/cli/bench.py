"""Verbs about speed: `bench` measures, `throughput` makes Figure 6 and its tables of what was measured."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from reqat.cli.app import Quiet, Tier, app, session, start_computing
from reqat.cli.run import Force, finished, locked
from reqat.config.errors import ReqatError
from reqat.config.throughput import Throughput, load_throughput
from reqat.records import provenance, record

CSV = "throughput.csv"
_FIRST_READINGS = 10  # of the probe, so that a short run knows its roofline too


def settings_of(tier: str) -> Throughput:
    """The tier's benchmark. Raises `ReqatError` if it has none."""
    found = load_throughput(tier, session.paths.config)
    if found is None:
        raise ReqatError(f"tier {tier} has no benchmark; give it a section in config/throughput.yaml.")
    return found


def folder_of(settings: Throughput) -> Path:
    """Where the benchmark's record and rows lie."""
    return session.paths.work / "throughput" / settings.id


@app.command()
def bench(
    id: Annotated[str | None, typer.Argument(help="Id of the tier's benchmark (default: what config/ says).")] = None,
    tier: Tier = "laptop",
    quiet: Quiet = False,
    force: Force = False,
    threads: Annotated[int, typer.Option(help="Threads to compute with (0: as the benchmark says).")] = 0,
) -> None:
    """Time kernels and decoding, ours beside others' in one process. Run it alone: it says who disturbed it."""
    settings = settings_of(tier)
    if id is not None and id != settings.id:
        raise ReqatError(f"config/throughput.yaml changed: tier {tier}'s benchmark is {settings.id} now, not {id}.")
    out = folder_of(settings)
    with locked(session.paths, settings.id):
        if not force and finished(out, settings.id):
            print(f"{settings.id}: already there")
            return
        start_computing(threads or settings.threads)
        where = session.paths.partial(settings.id)
        paths = session.paths
        with record.job("throughput", settings.id, settings, root=paths.root, out=out, partial=where, tier=tier) as job:
            job.metrics = measure_all(settings, where, None if quiet else lambda line: print(line, flush=True))
    print(f"{settings.id}: done, {out}")


def measure_all(settings: Throughput, out: Path, say: Any = None) -> dict[str, Any]:
    """Measure what the settings ask for and write `throughput.csv` into `out`; returns the record's metrics."""
    import pandas as pd

    from reqat_kernels.bench import attention, fake_quantize, kernels, linear, loss, measure
    from reqat_kernels.bench.machine import Probe, last_level_cache_bytes
    from reqat_kernels.bench.measure import Result, against_roofline

    say = say or (lambda _: None)
    if sys.modules.get("torchao", ...) is None:  # start_computing keeps it from other verbs; here it is a peer
        del sys.modules["torchao"]
    probe, result = Probe(), Result()
    for _ in range(_FIRST_READINGS):
        probe()
    ring, known = settings.ring_bytes, kernels()
    asked = [(settings.linear.rounds, linear.cases(settings.linear.m, settings.linear.nk, ring_bytes=ring))]
    if settings.attention is not None:
        wanted = settings.attention
        asked.append((wanted.rounds, attention.cases(wanted.batches, wanted.contexts, ring_bytes=ring)))
    if settings.fake_quantize is not None:
        asked.append(
            (settings.fake_quantize.rounds, fake_quantize.cases(settings.fake_quantize.sizes, ring_bytes=ring))
        )
    if settings.sem_loss is not None:
        asked.append((settings.sem_loss.rounds, loss.cases(settings.sem_loss.shape)))
    for rounds, cases in asked:
        for case in cases:
            say(f"{case.kernel}, {case.label}")
            providers, burst_s = known[case.kernel].providers, settings.burst_ms / 1e3
            result.add(measure(case, providers, rounds=rounds, burst_s=burst_s, probe=probe))
    if settings.decode is not None:
        result.add(decode(settings, probe, out, say))
    rows = against_roofline(result.rows, probe.best)
    table = pd.DataFrame([dataclasses.asdict(row) for row in rows])
    made, machine = provenance.commit(session.paths.root), provenance.hardware()
    versions = provenance.versions()
    names = ("python", "torch", "transformers", "triton", "llama-cpp-python", "torchao")
    table["commit"] = f"{made['commit']}{'+changes' if made['dirty'] else ''}"
    table["versions"] = "; ".join(f"{name} {versions[name]}" for name in names if name in versions)
    table["hardware"] = f"{machine['cpu']}, {machine['cores']} cores"
    table.to_csv(out / CSV, index=False, lineterminator="\n")
    for line in [*result.skipped, *result.refused]:
        print(f"reqat: warning: {line}", file=sys.stderr)
    return {
        "rows": len(rows),
        "skipped": result.skipped,
        "refused": result.refused,
        "roofline_bytes_per_s": probe.best,
        "probe_bytes_per_s": {"n": len(probe.rates), "min": min(probe.rates, default=None)},
        "last_level_cache_bytes": last_level_cache_bytes(),
    }


def decode(settings: Throughput, probe: Any, out: Path, say: Any) -> Any:
    """The rows of decoding with a whole model; none, and a sentence, where its weights are not installed."""
    from reqat.evaluation.throughput import measure_decoding
    from reqat.models.loading import CheckpointNotFoundError
    from reqat_kernels.bench.measure import Result

    asked = settings.decode
    assert asked is not None
    path = str(session.paths.base / "model") if asked.model == "pinned" else asked.model
    scratch = out.with_name(f"{out.name}-weights")
    try:
        return measure_decoding(
            path,
            asked.precision,
            batches=asked.batches,
            prompt_tokens=asked.prompt_tokens,
            output_tokens=asked.output_tokens,
            rounds=asked.rounds,
            probe=probe,
            scratch=scratch,
            say=say,
        )
    except CheckpointNotFoundError as error:
        return Result(skipped=[f"decode: {error}"])


@app.command()
def throughput(
    tier: Tier = "laptop",
    tables: Annotated[Path | None, typer.Option(help="Folder for the tables.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for Figure 6.")] = None,
    pinned: Annotated[bool, typer.Option("--pinned", help="From results/throughput instead of build/.")] = False,
) -> None:
    """Make Figure 6 and its tables from the rows of `bench`."""
    from analysis.throughput import build_throughput

    paths = session.paths
    source = paths.results / "throughput" if pinned else folder_of(settings_of(tier))
    folder = paths.work / "pinned" if pinned else paths.work
    name = "throughput" if pinned else tier
    tables, plots = tables or folder / "tables" / name, plots or folder / "plots" / name
    for path in build_throughput(source, tables, plots):
        print(path)
