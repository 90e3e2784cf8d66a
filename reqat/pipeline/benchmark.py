"""The benchmark of kernels and decoding: its sections, each measured in its own process.

A section is measured in a fork (:mod:`reqat.pipeline.isolation`). So its memory is free again before the next one
starts, and code of others that dies (a protection fault inside ggml, say) costs its own rows: the section is measured
again without it, and the record says so.
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from reqat.config import machine
from reqat.config.errors import ReqatError
from reqat.config.files import read_json, write_file
from reqat.config.paths import Paths
from reqat.config.throughput import (
    FILE,
    LEAST_MEMORY_MB,
    AgreementBench,
    DecodeBench,
    EntropyBench,
    Throughput,
    TrainStepBench,
    load_throughput,
    sources,
)
from reqat.pipeline.isolation import Died, Mark, isolated
from reqat.records import provenance, record

CSV = "throughput.csv"
_ERROR_PREFIX = "reqat: error: "
_FIRST_READINGS = 10  # of the probe, so that a short run knows its roofline too


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


@dataclass
class Section:
    """A part of a benchmark that is measured in one go: rows, what is missing and why, agreement where it was asked."""

    result: Any
    probe_bytes_per_s: list[float]
    agreement: list[dict[str, Any]]
    peak_memory_bytes: int = 0


@dataclass
class Bench:
    """What the measuring of a section needs: settings, memory in bytes, a folder for files, that of the pinned base,
    whom to tell, and whom to leave out."""

    settings: Throughput
    memory: int
    out: Path
    base: Path
    say: Callable[[str], None]
    mark: Mark = field(default_factory=Mark)
    avoid: set[str] = field(default_factory=set)

    @cached_property
    def probe(self) -> Any:
        """The bandwidth probe of this process, read a few times already."""
        from reqat_kernels.bench.machine import DEVICES, Probe

        probe = Probe(DEVICES["cpu"].probe_bytes(self.memory))
        for _ in range(_FIRST_READINGS):
            probe()
        return probe


def measure_all(
    settings: Throughput, out: Path, paths: Paths, say: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Measure what the settings ask for and write `throughput.csv` into `out`; returns the record's metrics.

    Raises `ReqatError` where memory is short or a section cannot be measured.
    """
    import pandas as pd

    from reqat_kernels.bench.machine import last_level_cache_bytes
    from reqat_kernels.bench.measure import Result, against_roofline

    if sys.modules.get("torchao", ...) is None:  # start_computing keeps it from other verbs; here it is a peer
        del sys.modules["torchao"]
    bench = Bench(settings, memory_of(settings), out, paths.base, say or (lambda _: None))
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
    made, hardware = provenance.commit(paths.root), provenance.hardware()
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


def measured(name: str, work: Callable[[Bench], tuple[Any, list[Any]]], bench: Bench) -> Section:
    """Measure a section in its own process; repeat it without a provider that crashed that process.

    Raises `ReqatError` if the process ended otherwise, and what ``work`` raises.
    """

    def section() -> Section:
        result, agreed = work(bench)
        rates = bench.probe.rates if "probe" in vars(bench) else []
        return Section(result, rates, agreed)

    lost: list[str] = []
    while True:
        try:
            found, peak = isolated(section, bench.mark)
        except Died as died:
            if not died.mark or died.mark in bench.avoid:
                raise ReqatError(
                    f"section {name} of the benchmark ended: {died.how}. Free some memory if that is short, and run it "
                    "again."
                ) from None
            bench.avoid.add(died.mark)
            lost.append(f"{name}, {died.mark}, not timed: its process died, {died.how}.")
            bench.say(f"{lost[-1]} {name} starts again without it")
            continue
        bench.avoid.clear()
        found.result.refused += lost
        found.peak_memory_bytes = peak
        return found


def preload(settings: Throughput) -> None:
    """Import what the sections need, once for all of them. Nothing may be computed here: what follows is forked."""
    import reqat_kernels.bench  # noqa: F401

    if settings.decode or settings.entropy or settings.train_step or settings.agreement:
        import reqat.evaluation.agreement
        import reqat.evaluation.collection_cost
        import reqat.evaluation.throughput
        import reqat.tasks
        import reqat.training.throughput  # noqa: F401


def sections(settings: Throughput) -> dict[str, Callable[[Bench], tuple[Any, list[Any]]]]:
    """Name -> function that measures it, giving a `Result` and a list of agreements, in the order to be run.

    What takes microseconds comes first; what takes seconds a call can bear a neighbour.
    """
    asked: dict[str, Callable[[Bench], tuple[Any, list[Any]]]] = {}
    for name in ("linear", "attention", "fake_quantize", "table"):
        if getattr(settings, name) is not None:
            asked[name] = partial(timed, name)
    for i, wanted in enumerate(settings.decode):
        asked[f"decode-{i}"] = partial(decode, wanted)
    for i, step in enumerate(settings.train_step):
        asked[f"train_step-{i}"] = partial(train_step, step)
    for i, collected in enumerate(settings.entropy):
        asked[f"entropy-{i}"] = partial(entropy, collected)
    for i, compared in enumerate(settings.agreement):
        asked[f"agreement-{i}"] = partial(agreement, compared)
    if settings.sem_loss is not None:
        for shape in settings.sem_loss.shapes:
            asked[f"sem_loss-{shape}"] = partial(timed, f"sem_loss-{shape}")
    return asked


def timed(name: str, bench: Bench) -> tuple[Any, list[Any]]:
    """The rows of a kernel's cases."""
    from reqat_kernels.bench import attention, fake_quantize, kernels, linear, loss, measure, table
    from reqat_kernels.bench.measure import Result

    settings, ring = bench.settings, bench.settings.ring_bytes
    if name == "linear" and settings.linear is not None:
        rounds, cases = settings.linear.rounds, linear.cases(settings.linear.m, settings.linear.nk, ring_bytes=ring)
    elif name == "attention" and settings.attention is not None:
        asked = settings.attention
        rounds, cases = asked.rounds, attention.cases(asked.batches, asked.contexts, ring_bytes=ring)
    elif name == "fake_quantize" and settings.fake_quantize is not None:
        rounds = settings.fake_quantize.rounds
        cases = fake_quantize.cases(settings.fake_quantize.sizes, ring_bytes=ring)
    elif name == "table" and settings.table is not None:
        rounds, cases = settings.table.rounds, table.cases(settings.table.sizes)
    else:
        assert settings.sem_loss is not None
        rounds, cases = settings.sem_loss.rounds, loss.cases(name.removeprefix("sem_loss-"))
    result = Result()
    for case in (replace(case, memory_bytes=bench.memory) for case in cases):
        bench.say(f"{case.kernel}, {case.label}")
        found = measure(
            case,
            kernels()[case.kernel].providers,
            rounds=rounds,
            burst_s=settings.burst_ms / 1e3,
            probe=bench.probe,
            avoid=bench.avoid,
            entering=bench.mark,
        )
        result.add(found)
    return result, []


def model_path(model: str, bench: Bench) -> str:
    """Folder of a benchmark's model."""
    return str(bench.base / "model") if model == "pinned" else model


def train_step(asked: TrainStepBench, bench: Bench) -> tuple[Any, list[Any]]:
    """The rows of a BF16 and a QAT step."""
    import torch

    from reqat.models.loading import CheckpointNotFoundError
    from reqat.training.throughput import measure_steps
    from reqat_kernels.bench.machine import Neighbours
    from reqat_kernels.bench.measure import Result, Row, percentile

    shape, probe = f"{asked.model} B={asked.rows} T={asked.row_tokens}", bench.probe
    if asked.autocast != "bf16":
        shape += f" autocast={asked.autocast}"
    bench.say(f"train_step, {shape}")
    watch, first = Neighbours(), len(probe.rates)
    try:
        seconds = measure_steps(
            model_path(asked.model, bench),
            asked.precision,
            rows=asked.rows,
            row_tokens=asked.row_tokens,
            rounds=asked.rounds,
            autocast=asked.autocast,
            before=probe,
        )
    except CheckpointNotFoundError as error:
        return Result(skipped=[f"train_step: {error}"]), []
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
                threads=torch.get_num_threads(),
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
                cold=False,  # activations and optimizer states: nobody counted them
                neighbour_cores=load.neighbour_cores,
                steal=load.steal,
                waited=nan,
                set_aside=0,
                ours=fmt != "BF16",
                tokens_per_s=asked.rows * asked.row_tokens / percentile(us, 0.5) * 1e6,
            )
        )
    return result, []


def entropy(asked: EntropyBench, bench: Bench) -> tuple[Any, list[Any]]:
    """The rows of generation with and without collecting entropies."""
    from reqat.evaluation.collection_cost import measure_collection
    from reqat.models.loading import CheckpointNotFoundError
    from reqat_kernels.bench.measure import Result

    try:
        result = measure_collection(
            model_path(asked.model, bench),
            batch=asked.batch,
            prompt_tokens=asked.prompt_tokens,
            output_tokens=asked.output_tokens,
            rounds=asked.rounds,
            probe=bench.probe,
            scratch=bench.out,
            say=bench.say,
        )
    except CheckpointNotFoundError as error:
        result = Result(skipped=[f"entropy: {error}"])
    return result, []


def agreement(asked: AgreementBench, bench: Bench) -> tuple[Any, list[Any]]:
    """How many greedy responses of the packed model are its twin's; one scale a row, so that rows stand alone."""
    from reqat.data import encode_prompt
    from reqat.evaluation.agreement import agreement as compare
    from reqat.models import load_tokenizer
    from reqat.models.loading import CheckpointNotFoundError
    from reqat.tasks import problems
    from reqat_kernels.bench.measure import Result

    path = model_path(asked.model, bench)
    asked_for = asked.model_dump()
    bench.say(f"agreement, {asked.model}: {asked.prompts} prompts")
    try:
        tokenizer = load_tokenizer(path)
        prompts = [
            encode_prompt(tokenizer, problem.prompt)
            for problem in problems(asked.families, "test", asked.prompts, seed=0)
        ]
        found = compare(
            path,
            tokenizer,
            prompts,
            asked.precision,
            max_new_tokens=asked.max_new_tokens,
            batch_rows=asked.batch_rows,
            global_scale="row",
            override=True,
        )
    except CheckpointNotFoundError as error:
        return Result(), [asked_for | {"skipped": str(error)}]
    return Result(), [asked_for | {"global_scale": "row"} | dataclasses.asdict(found)]


def decode(asked: DecodeBench, bench: Bench) -> tuple[Any, list[Any]]:
    """The rows of decoding with a whole model; none, and a sentence, where its weights are not installed."""
    from reqat.evaluation.throughput import measure_decoding
    from reqat.models.loading import CheckpointNotFoundError
    from reqat_kernels.bench.measure import Result

    path = model_path(asked.model, bench)
    scratch = bench.out.with_name(f"{bench.out.name}-weights")
    try:
        result = measure_decoding(
            path,
            asked.precision,
            batches=asked.batches,
            prompt_tokens=asked.prompt_tokens,
            output_tokens=asked.output_tokens,
            rounds=asked.rounds,
            probe=bench.probe,
            scratch=scratch,
            say=bench.say,
            avoid=bench.avoid,
            entering=bench.mark,
        )
    except CheckpointNotFoundError as error:
        result = Result(skipped=[f"decode: {error}"])
    return result, []
