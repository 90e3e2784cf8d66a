"""Cost of computing entropies during generation: without them, collecting them, and using them (ReSET), in alternation.

Providers, from plain to everything:

* ``generate``: sampling alone;
* ``+ EntropyRecorder``: each step's entropy, tail mass, most likely tokens and the probability of the one taken;
* ``+ written``: these handed on to a :class:`~reqat.evaluation.trace_files.TraceWriter`, parquet files and all;
* ``+ ReSET``: sampling at a temperature that follows the entropy (:class:`~reqat.generation.reset.ReSET`). Its tables
  of step ends, made once a tokenizer, are not in the time.

A sample is one whole generation, from the call to the moment when nothing is left to do (spooled steps handed over,
files closed), over its steps: what a run pays, not what a step in the middle does. No row ends early, so that all do
the same work; every generation takes the same tokens, which is checked, but for ReSET's, whose purpose is to take
others. The ratio of two rows' medians is the
overhead; as all are measured in turns, a neighbour on the machine slows all alike.

Source of the bound that is asked of it: none; at most a tenth is what makes collecting worth leaving on.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from reqat.config.errors import ReqatError
from reqat.config.policy import Decoding
from reqat.evaluation.entropies import EntropyRecorder, RecordedTrace
from reqat.evaluation.throughput import allocated_bytes
from reqat.evaluation.trace_files import TraceInfo, TraceWriter
from reqat.generation.batches import Generation, generate
from reqat.generation.reset import ReSET
from reqat.models import freeze, load_model, load_tokenizer, prepare
from reqat_kernels.bench.machine import Bandwidth, Neighbours, Probe, waited_ns
from reqat_kernels.bench.measure import Result, Row, Wrong, percentile, undisturbed

SEED = 6
PLAIN, RECORDED, WRITTEN = "generate", "generate + EntropyRecorder", "generate + EntropyRecorder, written"
RESET = "generate + ReSET"


def measure_collection(
    path: str,
    *,
    probe: Probe,
    bandwidth: Bandwidth,
    batch: int,
    prompt_tokens: int,
    output_tokens: int,
    rounds: int = 5,
    precision: str = "BF16",
    decoding: str = "sample(temperature=0.6, top_p=0.95)",
    reset: str = "reset(t_low=0.3, tau0=0.6, top_p=0.95)",
    k: int = 5,
    scratch: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Result:
    """Time generation with and without entropies on one model in bfloat16; a row of kernel ``entropy`` a provider.

    Args:
        path: as for :func:`reqat.models.load_model`; its tokenizer tells ReSET where steps end.
        batch: rows decoded together, prompts of ``prompt_tokens`` random tokens each.
        output_tokens: that every row generates, at least 2.
        rounds: generations of each provider that are timed, after one that is not.
        precision: that the model is prepared for.
        decoding: of all providers but ReSET.
        reset: ReSET's rule; what it costs does not depend on its numbers.
        k: most likely tokens that are kept.
        probe: the bandwidth probe, read before each generation; ``bandwidth``: where caches end.
        scratch: folder for the files that one provider writes and the recorder spools to; None: the system's.
        say: told what is being measured.

    Raises ValueError for fewer than 2 tokens, no round or a ``reset`` that is none, and Wrong if recording changes a
    token.
    """
    if output_tokens < 2 or rounds < 1:
        raise ReqatError(f"output_tokens={output_tokens}, rounds={rounds}: give at least 2 tokens and a round")
    policy, led = Decoding.parse(decoding), Decoding.parse(reset)
    if led.rule is None:
        raise ReqatError(f"reset={reset!r} has no rule; write reset(t_low=..., tau0=...)")
    out = Result()
    model: Any = load_model(path, dtype=torch.bfloat16)
    prepare(model, precision, override=True)
    freeze(model)
    vocabulary = int(model.config.vocab_size)
    ids = torch.randint(0, vocabulary, (batch, prompt_tokens), generator=torch.Generator().manual_seed(SEED)).tolist()
    names = [str(row) for row in range(batch)]
    processor = ReSET(led.rule, load_tokenizer(path))

    def run(processors: Any = None, decoding: Decoding = policy) -> list[Generation]:
        return generate(
            model,
            None,
            ids,
            seeds=[0] * batch,
            row_keys=names,
            decoding=decoding,
            max_new_tokens=output_tokens,
            eos_id=(),  # no token ends a row
            processors=processors,
            batch_rows=batch,
        )

    def recorded(on_trace: Callable[[RecordedTrace], object]) -> list[Generation]:
        from transformers import LogitsProcessorList

        recorder = EntropyRecorder(on_trace, k=k, names=names, spool=scratch)
        found = run(LogitsProcessorList([recorder]))  # type: ignore[list-item]
        recorder.close()
        return found

    def written() -> list[Generation]:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            texts = [str(i) for i in range(vocabulary)]
            with TraceWriter(Path(folder) / "traces", [precision], texts, k=k) as writer:

                def keep(trace: RecordedTrace) -> None:
                    info = TraceInfo(names[trace.row], "random", 0, precision, "", "", "", None, trace.finished)
                    writer.add(info, trace.tokens, {precision: trace.columns})

                return recorded(keep)

    def by_entropy() -> list[Generation]:
        from transformers import LogitsProcessorList

        # As `generate` itself does for a policy of this kind, but for making the processor.
        return run(LogitsProcessorList([processor]), Decoding.sample(led.temperature, led.top_p))  # type: ignore[list-item]

    providers: dict[str, Callable[[], list[Generation]]] = {
        PLAIN: run,
        RECORDED: lambda: recorded(lambda trace: None),
        WRITTEN: written,
        RESET: by_entropy,
    }
    expected = run()
    for name, provider in providers.items():
        if provider() != expected and name != RESET:
            raise Wrong(f"{name} took other tokens than generation alone")
    samples_us: dict[str, list[float]] = {name: [] for name in providers}
    waits: dict[str, list[float]] = {name: [] for name in providers}
    watch, first = Neighbours(), len(probe.rates)
    order = list(providers)
    for turn in range(rounds):
        at = turn % len(order)
        for name in order[at:] + order[:at]:
            say(f"entropy, batch {batch}: {name}, round {turn + 1} of {rounds}")
            probe()
            waited, began = waited_ns(), time.perf_counter_ns()
            providers[name]()
            elapsed = time.perf_counter_ns() - began
            samples_us[name].append(elapsed / 1e3 / output_tokens)
            waits[name].append((waited_ns() - waited) / max(1, elapsed))
    load, rate = watch.load(), percentile(probe.rates[first:], 0.5)
    weights = allocated_bytes(*model.parameters(), *model.buffers())
    for name in providers:
        kept = undisturbed(samples_us[name], waits[name])
        median = percentile(kept, 0.5)
        out.rows.append(
            Row(
                kernel="entropy",
                provider=name,
                shape=f"B={batch} P={prompt_tokens} T={output_tokens}",
                m=batch,
                format=precision,
                device="cpu",
                arithmetic="native" if precision == "BF16" else "emulated",
                threads=torch.get_num_threads(),
                n=len(kept),
                median_us=median,
                min_us=min(kept),
                p10_us=percentile(kept, 0.1),
                p90_us=percentile(kept, 0.9),
                bytes_moved=weights,
                gb_per_s=weights / median / 1e3,
                roofline_gb_per_s=float("nan"),
                roofline_fraction=float("nan"),
                probe_gb_per_s=rate / 1e9,
                cold=bandwidth.is_cold(weights),
                neighbour_cores=load.neighbour_cores,
                steal=load.steal,
                waited=sum(w * s for w, s in zip(waits[name], samples_us[name], strict=True)) / sum(samples_us[name]),
                set_aside=rounds - len(kept),
                ours=name != PLAIN,
                output_tokens=output_tokens,
                tokens_per_s=batch / median * 1e6,
                weight_bytes=weights,
                ring_bytes=weights,
                ring_gb_per_s=bandwidth.rate(weights) / 1e9,
            )
        )
    return out
