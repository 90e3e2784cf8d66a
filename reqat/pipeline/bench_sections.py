"""The sections of the benchmark: what each measures, in which processes, and what memory it plans with.

Kernels and decoding: every provider in a worker process, in turns. Training steps, entropies and agreement, which know
only our code and torch: the section as a whole in one process (:func:`apart`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from reqat.config.errors import ReqatError
from reqat.config.throughput import (
    FILE,
    AgreementBench,
    DecodeBench,
    EntropyBench,
    HeadsBench,
    SpeculationBench,
    Throughput,
    TrainStepBench,
)

_FIRST_READINGS = 10  # of the probe, so that a short run knows its roofline too


@dataclass
class Section:
    """A part of a benchmark: rows, what is missing and why; comparisons that are no rows (agreement, heads,
    speculation), each under its name; what the probe read in
    another process than :attr:`Bench.probe`'s; the most memory that was held, in bytes."""

    result: Any
    compared: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    peak_memory_bytes: int = 0


@dataclass
class Bench:
    """What the measuring of a section needs: settings, memory in bytes, a folder for files, that of the pinned base,
    and whom to tell. ``threads``: in place of what the settings say, where it is not 0."""

    settings: Throughput
    memory: int
    out: Path
    base: Path
    say: Callable[[str], None]
    threads: int = 0
    held: list[int] = field(default_factory=list)
    """Bytes that all processes of the running section held together, now and then."""
    earlier: dict[int, list[float]] = field(default_factory=dict)
    """What the probe read in an earlier attempt, during sections that are kept: threads -> bytes a second."""

    @cached_property
    def bandwidth(self) -> Any:
        """How fast buffers of growing size are read here: where the caches end."""
        from reqat_kernels.bench.machine import DEVICES
        from reqat_kernels.bench.worker import isolated

        return isolated(partial(DEVICES["cpu"].bandwidth, self.memory))[0]

    @cached_property
    def probe(self) -> Any:
        """The bandwidth probe, in a process of its own."""
        from reqat_kernels.bench.turns import Roofline

        return Roofline("cpu", self.memory, self.bandwidth)

    def own_rates(self) -> dict[int, list[float]]:
        """What the probe read in this attempt: threads -> bytes a second."""
        return self.probe.rates if "probe" in vars(self) else {}

    def read_rates(self) -> dict[int, list[float]]:
        """What the probe read in all attempts: threads -> bytes a second."""
        own = self.own_rates()
        return {n: [*self.earlier.get(n, []), *own.get(n, [])] for n in {**self.earlier, **own}}

    def stop(self) -> None:
        """End the probe's process, if it was started."""
        if "probe" in vars(self):
            self.probe.stop()

    def able(self, name: str, asked: Sequence[int], result: Any) -> list[int]:
        """The numbers of threads that this machine has CPUs for; of the others, a sentence into ``result``."""
        from reqat_kernels.bench.worker import cpus

        have = len(cpus())
        for n in (n for n in asked if not self.threads and n > have):
            result.skipped.append(
                f"{name}, {n} threads: {have} CPUs may be used here; give it more (taskset, the container's cpuset)."
            )
        return [self.threads] if self.threads else [n for n in asked if n <= have]


def planned_bytes(bench: Bench) -> dict[str, int]:
    """Section -> bytes of memory that it takes at most, of those for which that follows from shapes and the size of a
    model; told before the first one starts.

    Raises `ReqatError` where it is more than the benchmark may take.
    """
    from reqat_kernels.bench import kernels
    from reqat_kernels.bench.turns import plan, with_ring

    settings, planned = bench.settings, dict[str, int]()
    for name in sections(settings):
        if name.startswith("decode-"):
            planned[name] = decoding_bytes(settings.decode[int(name.removeprefix("decode-"))], bench)
        elif not name.startswith(("train_step-", "entropy-", "agreement-", "heads-", "speculation-")):
            cases = cases_of(name, bench)
            kernel = kernels()[cases[0].kernel]
            planned[name] = max(plan(kernel, with_ring(kernel, case, bench.probe), bench.probe) for case in cases)
    told = ", ".join(f"{name} {bytes / 1e9:.1f}" for name, bytes in planned.items())
    if told:
        bench.say(f"memory: at most {bench.memory / 1e9:.1f} GB, planned: {told} GB")
    for name, bytes in planned.items():
        if bytes > bench.memory:
            raise ReqatError(
                f"section {name} of the benchmark plans with {bytes / 1e9:.1f} GB of memory, it may take "
                f"{bench.memory / 1e9:.1f}: free some, set memory_mb in config/{FILE} to {math.ceil(bytes / 1e6)}, or "
                "ask for smaller sizes there."
            )
    return planned


def decoding_bytes(asked: DecodeBench, bench: Bench) -> int:
    """Memory of a section of decoding: its models, and the largest cache; 0 where its weights are not installed."""
    from reqat.evaluation.throughput import model_bytes
    from reqat.models.loading import CheckpointNotFoundError
    from reqat_kernels.bench.worker import resident_bytes

    tokens = max(asked.batches) * (asked.prompt_tokens + max(asked.output_tokens))
    try:
        return (
            resident_bytes()
            + int(bench.probe.bytes)
            + model_bytes(model_path(asked.model, bench), tokens, 1 + len(asked.heads))
        )
    except CheckpointNotFoundError:
        return 0


def preload(settings: Throughput) -> None:
    """Import what the sections need, once for all of them. Nothing may be computed here: what follows is forked."""
    import reqat_kernels.bench  # noqa: F401

    whole_models = (settings.decode, settings.entropy, settings.train_step, settings.agreement, settings.heads)
    if any(whole_models) or settings.speculation:
        import reqat.evaluation.agreement
        import reqat.evaluation.collection_cost
        import reqat.evaluation.heads
        import reqat.evaluation.speculation
        import reqat.evaluation.throughput
        import reqat.tasks
        import reqat.training.throughput  # noqa: F401


def sections(settings: Throughput) -> dict[str, Callable[[Bench], Section]]:
    """Name -> function that measures it, in the order to be run.

    What takes microseconds comes first; what takes seconds a call can bear a neighbour.
    """
    asked: dict[str, Callable[[Bench], Section]] = {}
    for name in ("linear", "attention", "fake_quantize", "table"):
        if getattr(settings, name) is not None:
            asked[name] = partial(timed, name)
    for i, wanted in enumerate(settings.decode):
        asked[f"decode-{i}"] = partial(decode, wanted)
    for i, step in enumerate(settings.train_step):
        asked[f"train_step-{i}"] = partial(apart, partial(train_step, step))
    for i, collected in enumerate(settings.entropy):
        asked[f"entropy-{i}"] = partial(apart, partial(entropy, collected))
    for i, compared in enumerate(settings.agreement):
        asked[f"agreement-{i}"] = partial(apart, partial(agreement, compared))
    for i, chosen in enumerate(settings.heads):
        asked[f"heads-{i}"] = partial(apart, partial(heads, chosen))
    for i, guessed in enumerate(settings.speculation):
        asked[f"speculation-{i}"] = partial(apart, partial(speculation, guessed))
    if settings.sem_loss is not None:
        for shape in settings.sem_loss.shapes:
            asked[f"sem_loss-{shape}"] = partial(timed, f"sem_loss-{shape}")
    return asked


def cases_of(name: str, bench: Bench) -> list[Any]:
    """The cases of a section that times a kernel."""
    from reqat_kernels.bench import attention, fake_quantize, linear, loss, table

    settings, ring = bench.settings, bench.settings.ring_bytes
    if name == "linear" and settings.linear is not None:
        cases = linear.cases(settings.linear.m, settings.linear.nk, ring_bytes=ring)
    elif name == "attention" and settings.attention is not None:
        cases = attention.cases(settings.attention.batches, settings.attention.contexts, ring_bytes=ring)
    elif name == "fake_quantize" and settings.fake_quantize is not None:
        cases = fake_quantize.cases(settings.fake_quantize.sizes, ring_bytes=ring)
    elif name == "table" and settings.table is not None:
        cases = table.cases(settings.table.sizes)
    else:
        cases = loss.cases(name.removeprefix("sem_loss-"))
    return [replace(case, memory_bytes=bench.memory) for case in cases]


def timed(name: str, bench: Bench) -> Section:
    """The rows of a kernel's cases, each provider in a process of its own."""
    from reqat_kernels.bench import kernels, measure
    from reqat_kernels.bench.measure import Result

    result, settings = Result(), bench.settings
    asked = getattr(settings, name.partition("-")[0])
    threads = bench.able(name, getattr(asked, "threads", [settings.threads]), result)
    for case in cases_of(name, bench) if threads else []:
        bench.say(f"{case.kernel}, {case.label}")
        found = measure(
            case,
            kernels()[case.kernel],
            rounds=asked.rounds,
            threads=threads if case.device == "cpu" else threads[:1],
            burst_s=settings.burst_ms / 1e3,
            probe=bench.probe,
            peak=bench.held.append,
        )
        result.add(found)
    return Section(result)


def apart(work: Callable[[Bench, Any], tuple[Any, dict[str, list[Any]]]], bench: Bench) -> Section:
    """What ``work`` measures in a process of its own, with a probe there: code of ours and of torch alone."""
    import torch

    from reqat_kernels.bench.machine import DEVICES, Probe
    from reqat_kernels.bench.worker import isolated

    size = DEVICES["cpu"].probe_bytes(bench.bandwidth, bench.memory)

    def run() -> Section:
        torch.set_num_threads(bench.threads or bench.settings.threads)
        probe = Probe(size)
        for _ in range(_FIRST_READINGS):
            probe()
        result, compared = work(bench, probe)
        return Section(result, compared, probe.rates)

    section, peak = isolated(run)
    section.peak_memory_bytes = peak
    return section  # type: ignore[no-any-return]


def model_path(model: str, bench: Bench) -> str:
    """Folder of a benchmark's model."""
    return str(bench.base / "model") if model == "pinned" else model


def train_step(asked: TrainStepBench, bench: Bench, probe: Any) -> tuple[Any, dict[str, list[Any]]]:
    """The rows of a BF16 and a QAT step."""
    import torch

    from reqat.models.loading import CheckpointNotFoundError
    from reqat.training.throughput import measure_steps
    from reqat_kernels.bench.machine import Neighbours
    from reqat_kernels.bench.measure import Result, Row, percentile

    shape = f"{asked.model} B={asked.rows} T={asked.row_tokens}"
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
        return Result(skipped=[f"train_step: {error}"]), {}
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
    return result, {}


def entropy(asked: EntropyBench, bench: Bench, probe: Any) -> tuple[Any, dict[str, list[Any]]]:
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
            probe=probe,
            bandwidth=bench.bandwidth,
            scratch=bench.out,
            say=bench.say,
        )
    except CheckpointNotFoundError as error:
        result = Result(skipped=[f"entropy: {error}"])
    return result, {}


def agreement(asked: AgreementBench, bench: Bench, probe: Any) -> tuple[Any, dict[str, list[Any]]]:
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
        return Result(), {"agreement": [asked_for | {"skipped": str(error)}]}
    return Result(), {"agreement": [asked_for | {"global_scale": "row"} | dataclasses.asdict(found)]}


def heads(asked: HeadsBench, bench: Bench, probe: Any) -> tuple[Any, dict[str, list[Any]]]:
    """What storing the head and the embeddings in fewer bits changes: a comparison for each choice."""
    from reqat.data.text import blocks, running_text
    from reqat.evaluation.heads import compare_heads
    from reqat.models import load_tokenizer
    from reqat.models.loading import CheckpointNotFoundError
    from reqat.tasks import problems
    from reqat_kernels.bench.measure import Result

    path, settings = model_path(asked.model, bench), asked.model_dump(exclude={"choices"})
    bench.say(f"heads, {asked.model}")
    try:
        tokenizer = load_tokenizer(path)
        rows = []
        if asked.text is not None:
            text, settings["text_sha256"] = running_text(asked.text)
            count = -(-asked.text_tokens // asked.row_tokens)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            rows = [(block[:1], block[1:]) for block in blocks(ids, asked.row_tokens, count)]
        found = compare_heads(
            path,
            tokenizer,
            asked.precision,
            [(choice.head, choice.embeddings) for choice in asked.choices],
            rows=rows,
            problems=problems(asked.families, "test", asked.prompts, seed=0) if asked.families else (),
            max_new_tokens=asked.max_new_tokens,
            batch_rows=asked.batch_rows,
            say=bench.say,
            global_scale="row",
            override=True,
        )
    except CheckpointNotFoundError as error:
        return Result(), {"heads": [settings | {"skipped": str(error)}]}
    return Result(), {"heads": [settings | {"global_scale": "row"} | dataclasses.asdict(one) for one in found]}


def speculation(asked: SpeculationBench, bench: Bench, probe: Any) -> tuple[Any, dict[str, list[Any]]]:
    """Responses with prompt lookup and without, an entry for each number of guesses."""
    import torch

    from reqat.data import encode_prompt
    from reqat.evaluation.loading import load_at
    from reqat.evaluation.speculation import measure_speculation
    from reqat.inference import pack
    from reqat.models import load_tokenizer
    from reqat.models.loading import CheckpointNotFoundError
    from reqat.tasks import problems
    from reqat_kernels.bench.measure import Result

    path, settings = model_path(asked.model, bench), asked.model_dump(exclude={"guesses", "prompts"})
    bench.say(f"speculation, {asked.model}")
    try:
        tokenizer, dtype = load_tokenizer(path), getattr(torch, asked.dtype)
        model = load_at(path, asked.precision, dtype=dtype, gpu=False, override=True, global_scale="row")
    except CheckpointNotFoundError as error:
        return Result(), {"speculation": [settings | {"skipped": str(error)}]}
    chosen = problems(asked.families, "test", asked.prompts, seed=0)
    found = measure_speculation(
        pack(model, head=asked.head),
        tokenizer,
        [encode_prompt(tokenizer, problem.prompt) for problem in chosen],
        asked.guesses,
        max_new_tokens=asked.max_new_tokens,
        say=bench.say,
    )
    shared = settings | {"global_scale": "row", "threads": torch.get_num_threads()}
    return Result(), {"speculation": [shared | one.metrics() for one in found]}


def decode(asked: DecodeBench, bench: Bench) -> Section:
    """The rows of decoding with a whole model; none, and a sentence, where its weights are not installed."""
    from reqat.evaluation.throughput import measure_decoding
    from reqat.models.loading import CheckpointNotFoundError
    from reqat_kernels.bench.measure import Result

    result = Result()
    threads = bench.able("decode", asked.threads, result)
    try:
        found = measure_decoding(
            model_path(asked.model, bench),
            asked.precision,
            batches=asked.batches,
            prompt_tokens=asked.prompt_tokens,
            output_tokens=asked.output_tokens,
            prefill_tokens=asked.prefill_tokens,
            threads=threads,
            heads=asked.heads,
            rounds=asked.rounds,
            probe=bench.probe,
            scratch=bench.out.with_name(f"{bench.out.name}-weights"),
            say=bench.say,
            peak=bench.held.append,
        )
    except CheckpointNotFoundError as error:
        found = Result(skipped=[f"decode: {error}"])
    result.add(found)
    return Section(result)
