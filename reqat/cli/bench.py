"""Verbs about speed: `bench` measures, `throughput` makes Figure 6 and its tables of what was measured."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from reqat.cli.app import Quiet, Tier, app, session, start_computing
from reqat.cli.results import Replace, Rewrite, rendering
from reqat.cli.run import Force, finished, locked
from reqat.config.base import digest
from reqat.config.errors import ReqatError
from reqat.config.files import write_file
from reqat.config.targets import making
from reqat.config.throughput import (
    AgreementBench,
    DecodeBench,
    EntropyBench,
    Throughput,
    TrainStepBench,
    load_throughput,
)
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


def kept_sections(settings: Throughput, threads: int) -> Path | None:
    """Where measured sections wait for the others: those of one commit, number of threads and CPU go together.

    None for code that no commit holds.
    """
    made = provenance.commit(session.paths.root)
    if made["dirty"] is not False:
        return None
    where = digest([made["commit"], threads, provenance.hardware()["cpu"]], 12)
    return session.paths.work / "throughput" / f".{settings.id}.sections" / where


@app.command()
def bench(
    id: Annotated[str | None, typer.Argument(help="Id of the tier's benchmark (default: what config/ says).")] = None,
    tier: Tier = "laptop",
    quiet: Quiet = False,
    force: Force = False,
    threads: Annotated[int, typer.Option(help="Threads to compute with (0: as the benchmark says).")] = 0,
) -> None:
    """Time kernels and decoding, ours beside others' in one process. Run it alone: it says who disturbed it.

    Interrupted, it goes on with the section that was cut off (where the code is committed).
    """
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
            kept = kept_sections(settings, threads or settings.threads)
            if kept is not None and force:
                shutil.rmtree(kept, ignore_errors=True)
            say = None if quiet else lambda line: print(line, flush=True)
            job.metrics = measure_all(settings, job.partial, say, kept)
            job.resumed = job.metrics["resumed_sections"] > 0
        if kept is not None:
            shutil.rmtree(kept.parent, ignore_errors=True)
    print(f"{settings.id}: done, {out}")


@dataclass
class Section:
    """A part of a benchmark that is measured in one go: rows, what is missing and why, agreement where it was asked."""

    result: Any
    probe_bytes_per_s: list[float]
    agreement: list[dict[str, Any]]


def measure_all(settings: Throughput, out: Path, say: Any = None, kept: Path | None = None) -> dict[str, Any]:
    """Measure what the settings ask for and write `throughput.csv` into `out`; returns the record's metrics.

    A finished section is written into the folder `kept` at once, and read from there if it is already in it.
    """
    import pandas as pd

    from reqat_kernels.bench.machine import Probe, last_level_cache_bytes
    from reqat_kernels.bench.measure import Result, against_roofline

    say = say or (lambda _: None)
    if sys.modules.get("torchao", ...) is None:  # start_computing keeps it from other verbs; here it is a peer
        del sys.modules["torchao"]
    probe, whole = Probe(), Section(Result(), [], [])
    for _ in range(_FIRST_READINGS):
        probe()
    resumed = 0
    for name, measured in sections(settings, probe, out, say).items():
        file = None if kept is None else kept / f"{name}.json"
        if file is not None and file.is_file():
            say(f"{name}: measured before, kept")
            section, resumed = _read_section(file), resumed + 1
        else:
            first = len(probe.rates)
            result, agreed = measured()
            section = Section(result, probe.rates[first:], agreed)
            if file is not None:
                _write_section(file, section)
            section.probe_bytes_per_s = []  # the probe remembers its own
        whole.result.add(section.result)
        whole.probe_bytes_per_s += section.probe_bytes_per_s
        whole.agreement += section.agreement
    rates = [*probe.rates, *whole.probe_bytes_per_s]
    rows = against_roofline(whole.result.rows, max(rates))
    table = pd.DataFrame([dataclasses.asdict(row) for row in rows])
    made, machine = provenance.commit(session.paths.root), provenance.hardware()
    versions = provenance.versions()
    names = ("python", "torch", "transformers", "triton", "llama-cpp-python", "torchao")
    table["commit"] = f"{made['commit']}{'+changes' if made['dirty'] else ''}"
    table["versions"] = "; ".join(f"{name} {versions[name]}" for name in names if name in versions)
    table["hardware"] = f"{machine['cpu']}, {machine['cores']} cores"
    write_file(out / CSV, table.to_csv(index=False, lineterminator="\n"))
    for line in [*whole.result.skipped, *whole.result.refused]:
        print(f"reqat: warning: {line}", file=sys.stderr)
    return {
        "rows": len(rows),
        "skipped": whole.result.skipped,
        "refused": whole.result.refused,
        "roofline_bytes_per_s": max(rates),
        "probe_bytes_per_s": {"n": len(rates), "min": min(rates)},
        "last_level_cache_bytes": last_level_cache_bytes(),
        "agreement": whole.agreement,
        "resumed_sections": resumed,
    }


def _write_section(file: Path, section: Section) -> None:
    write_file(file, json.dumps(dataclasses.asdict(section), default=float))  # NaN stays NaN


def _read_section(file: Path) -> Section:
    from reqat_kernels.bench.measure import Result, Row

    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        given = found["result"]
        result = Result([Row(**row) for row in given["rows"]], given["skipped"], given["refused"])
        return Section(result, found["probe_bytes_per_s"], found["agreement"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ReqatError(f"{file}: damaged ({error}); remove it, and it is measured again.") from None


def sections(settings: Throughput, probe: Any, out: Path, say: Any) -> dict[str, Any]:
    """Name -> function that measures it, giving a `Result` and a list of agreements, in the order to be run.

    What takes microseconds comes first; what takes seconds a call can bear a neighbour.
    """
    from reqat_kernels.bench import attention, fake_quantize, kernels, linear, loss, measure
    from reqat_kernels.bench.measure import Result

    ring, known = settings.ring_bytes, kernels()

    def timed(rounds: int, cases: Any) -> tuple[Any, list[Any]]:
        result = Result()
        for case in cases:
            say(f"{case.kernel}, {case.label}")
            providers, burst_s = known[case.kernel].providers, settings.burst_ms / 1e3
            result.add(measure(case, providers, rounds=rounds, burst_s=burst_s, probe=probe))
        return result, []

    asked: dict[str, Any] = {}
    if settings.linear is not None:
        cases = linear.cases(settings.linear.m, settings.linear.nk, ring_bytes=ring)
        asked["linear"] = partial(timed, settings.linear.rounds, cases)
    if settings.attention is not None:
        cases = attention.cases(settings.attention.batches, settings.attention.contexts, ring_bytes=ring)
        asked["attention"] = partial(timed, settings.attention.rounds, cases)
    if settings.fake_quantize is not None:
        cases = fake_quantize.cases(settings.fake_quantize.sizes, ring_bytes=ring)
        asked["fake_quantize"] = partial(timed, settings.fake_quantize.rounds, cases)
    for i, wanted_decode in enumerate(settings.decode):
        asked[f"decode-{i}"] = lambda wanted=wanted_decode: (decode(wanted, probe, out, say), [])
    for i, step in enumerate(settings.train_step):
        asked[f"train_step-{i}"] = lambda step=step: (train_step(step, settings.threads, probe, say), [])
    for i, collected in enumerate(settings.entropy):
        asked[f"entropy-{i}"] = lambda collected=collected: (entropy(collected, probe, out, say), [])
    for i, compared in enumerate(settings.agreement):
        asked[f"agreement-{i}"] = lambda compared=compared: (Result(), [agreement(compared, say)])
    if settings.sem_loss is not None:
        for shape in settings.sem_loss.shapes:
            asked[f"sem_loss-{shape}"] = partial(timed, settings.sem_loss.rounds, loss.cases(shape))
    return asked


def model_path(model: str) -> str:
    """Where a benchmark's model lies."""
    return str(session.paths.base / "model") if model == "pinned" else model


def train_step(asked: TrainStepBench, threads: int, probe: Any, say: Any) -> Any:
    """The rows of a BF16 and a QAT step."""
    from reqat.models.loading import CheckpointNotFoundError
    from reqat.training.throughput import measure_steps
    from reqat_kernels.bench.machine import Neighbours
    from reqat_kernels.bench.measure import Result, Row, percentile

    shape = f"{asked.model} B={asked.rows} T={asked.row_tokens}"
    say(f"train_step, {shape}")
    watch, first = Neighbours(), len(probe.rates)
    try:
        seconds = measure_steps(
            model_path(asked.model),
            asked.precision,
            rows=asked.rows,
            row_tokens=asked.row_tokens,
            rounds=asked.rounds,
            before=probe,
        )
    except CheckpointNotFoundError as error:
        return Result(skipped=[f"train_step: {error}"])
    load, nan, result = watch.load(), float("nan"), Result()
    for fmt, samples in seconds.items():
        us = [1e6 * s for s in samples]
        result.rows.append(
            Row(
                kernel="train_step",
                provider="fine-tuning" if fmt == "BF16" else "QAT",
                shape=shape,
                m=asked.rows,
                format=fmt,
                device="cpu",
                arithmetic="native" if fmt == "BF16" else "emulated",
                threads=threads,
                n=len(us),
                median_us=percentile(us, 0.5),
                min_us=min(us),
                p10_us=percentile(us, 0.1),
                p90_us=percentile(us, 0.9),
                bytes_moved=0,
                gb_per_s=nan,
                roofline_gb_per_s=nan,
                roofline_fraction=nan,
                probe_gb_per_s=percentile(probe.rates[first:], 0.5) / 1e9,
                cold=True,
                neighbour_cores=load.neighbour_cores,
                steal=load.steal,
                waited=nan,
                set_aside=0,
                ours=fmt != "BF16",
                tokens_per_s=asked.rows * asked.row_tokens / percentile(us, 0.5) * 1e6,
            )
        )
    return result


def entropy(asked: EntropyBench, probe: Any, out: Path, say: Any) -> Any:
    """The rows of generation with and without collecting entropies."""
    from reqat.evaluation.collection_cost import measure_collection
    from reqat.models.loading import CheckpointNotFoundError
    from reqat_kernels.bench.measure import Result

    try:
        return measure_collection(
            model_path(asked.model),
            batch=asked.batch,
            prompt_tokens=asked.prompt_tokens,
            output_tokens=asked.output_tokens,
            rounds=asked.rounds,
            probe=probe,
            scratch=out,
            say=say,
        )
    except CheckpointNotFoundError as error:
        return Result(skipped=[f"entropy: {error}"])


def agreement(asked: AgreementBench, say: Any) -> dict[str, Any]:
    """How many greedy responses of the packed model are its twin's; one scale a row, so that rows stand alone."""
    from reqat.data import prompt_ids
    from reqat.evaluation.agreement import agreement as compare
    from reqat.models import load_tokenizer
    from reqat.models.loading import CheckpointNotFoundError
    from reqat.tasks import problems

    path = model_path(asked.model)
    asked_for = asked.model_dump()
    say(f"agreement, {asked.model}: {asked.prompts} prompts")
    try:
        tokenizer = load_tokenizer(path)
        prompts = [
            prompt_ids(tokenizer, problem.prompt) for problem in problems(asked.families, "test", asked.prompts, seed=0)
        ]
        found = compare(
            path,
            tokenizer,
            prompts,
            asked.precision,
            max_new_tokens=asked.max_new_tokens,
            batch_rows=asked.batch_rows,
            global_scale="row",
        )
    except CheckpointNotFoundError as error:
        return asked_for | {"skipped": str(error)}
    return asked_for | {"global_scale": "row"} | dataclasses.asdict(found)


def decode(asked: DecodeBench, probe: Any, out: Path, say: Any) -> Any:
    """The rows of decoding with a whole model; none, and a sentence, where its weights are not installed."""
    from reqat.evaluation.throughput import measure_decoding
    from reqat.models.loading import CheckpointNotFoundError
    from reqat_kernels.bench.measure import Result

    path = model_path(asked.model)
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
    pinned: Annotated[bool, typer.Option("--pinned", help="From results/throughput/ instead of build/.")] = False,
    force: Rewrite = False,
) -> None:
    """Make Figure 6 and its tables from the rows of `bench`."""
    from analysis.throughput import build_throughput

    paths = session.paths
    source = paths.results / "throughput" / tier if pinned else folder_of(settings_of(tier))
    folder = paths.work / "pinned" if pinned else paths.work
    name = f"throughput-{tier}" if pinned else tier
    tables, plots = tables or folder / "tables" / name, plots or folder / "plots" / name
    with rendering(tables, force=force) as table_draft, rendering(plots, force=force) as plot_draft:
        build_throughput(source, table_draft, plot_draft)


@app.command("pin-throughput")
def pin_throughput(
    tier: Tier = "laptop",
    allow_dirty: Annotated[bool, typer.Option("--allow-dirty", help="Keep rows of uncommitted code, too.")] = False,
    force: Replace = False,
) -> None:
    """Keep a tier's finished benchmark, its tables and its figure in results/throughput/<tier>."""
    from analysis.throughput import build_throughput

    source, target = folder_of(settings_of(tier)), session.paths.results / "throughput" / tier
    made = record.verify(source)
    if made["dirty"] is not False and not allow_dirty:
        raise ReqatError(
            f"{source} was measured with uncommitted changes; commit and measure again, or pass --allow-dirty."
        )
    with making(target, pinned_rows, replace=force) as draft:
        shutil.copytree(source, draft, dirs_exist_ok=True)
        build_throughput(draft, draft / "tables", draft / "plots")
    print(f"pinned: {target}")


def pinned_rows(folder: Path) -> Collection[str]:
    """The files of a pinned benchmark. Raises `ReqatError` if the folder holds something else."""
    drawn = [path.relative_to(folder).as_posix() for kind in ("tables", "plots") for path in folder.glob(f"{kind}/*")]
    return {*record.belongs("throughput")(folder), *drawn}
