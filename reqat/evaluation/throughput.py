"""Decoding throughput of whole models: tokens per second through ``generate()``, and memory of weights and cache.

The kernels' benchmark (:mod:`reqat_kernels.bench`) knows no models, so decoding is timed here and gives the same rows.
Each step of a generation is a sample: the clock is read where transformers asks whether to stop. Providers, each in a
process of its own, take whole generations in turns, with a reading of the bandwidth probe between them. Before it is
timed a provider has to generate what the reference agrees with.

Throughput counts decoding alone: B rows times the steps after the first token, over their time. A generation of T
tokens holds the shorter ones, so one run gives a row for every output length. Reading a prompt has rows of its own
(``prefill``): its tokens over the time to the first new one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reqat.config.vocabulary import format_of
from reqat.evaluation import llama_cpp
from reqat.evaluation.decoders import (
    CHECKED_PROMPT_TOKENS,
    CHECKED_TOKENS,
    Decoder,
    Entry,
    Judge,
    ServedDecoders,
    Steps,
)
from reqat.formats import quantize_dequantize
from reqat.inference import memory, pack
from reqat.models import calibrate_static, load_model, prepare
from reqat.models.adapters import blocks_of
from reqat.models.folder import CheckpointNotFoundError, weight_headers
from reqat.models.loading import PACKAGE, local_folder, package_gguf
from reqat_kernels.bench.machine import Bandwidth, Neighbours, waited_ns
from reqat_kernels.bench.measure import Result, Row, failed_row, percentile, undisturbed
from reqat_kernels.bench.turns import WORKER_BYTES, Roofline, reason_of
from reqat_kernels.bench.worker import (
    PATIENCE_S,
    Died,
    Moved,
    Worker,
    check_threads,
    peak_above_bytes,
    private_bytes,
    resident_bytes,
)

SEED = 6

# Calibrated once, as engines serve it: a token's codes depend on that token alone, so that decoding can be held against
# one pass over the whole sequence, and the cache stores no scale a token.
_GLOBAL_SCALE = "static"

_EAGER_TOKENS = 2048
_SIZES = {False: ("out_features", "in_features"), True: ("num_embeddings", "embedding_dim")}
_PREFILL_ROUNDS = 3  # a prompt is one sample
# Side by side: the reference in float32 and a rounded copy of it (8), transformers' bfloat16 (2), the packed model and
# what it is made from (3, see below), llama.cpp's four files (3); loading one more of them in float32 (4).
_BYTES_A_PARAMETER = 20
_BYTES_A_PACKED_PARAMETER = 3  # of each packed model beyond the first
_BYTES_A_LLAMA_PARAMETER = 9  # llama.cpp's four files, as they are mapped and packed anew


class _Clock:
    """A stopping criterion that never stops and reads the clock."""

    def __init__(self) -> None:
        self.stamps_ns: list[int] = []
        self.waits_ns: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.stamps_ns.append(time.perf_counter_ns())
        self.waits_ns.append(waited_ns())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def timed_generate(model: Any, ids: Tensor, tokens: int) -> Steps:
    """Greedy ``model.generate`` of exactly ``tokens`` new tokens for ids [B, P], on the clock.

    No end of sequence is looked for, as in llama.cpp's loop.
    """
    from transformers import GenerationConfig, StoppingCriteriaList

    clock, configured, begun = _Clock(), model.generation_config, time.perf_counter_ns()
    model.generation_config = GenerationConfig()  # with the model's own, its end of sequence comes back
    try:
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            use_cache=True,
            return_dict_in_generate=True,
            stopping_criteria=StoppingCriteriaList([clock]),
            pad_token_id=0,
        )
    finally:
        model.generation_config = configured
    return Steps(out.sequences[:, ids.shape[1] :], clock.stamps_ns, clock.waits_ns, out.past_key_values, begun)


def allocated_bytes(*roots: Any) -> int:
    """Bytes of all storages that the tensors inside ``roots`` hold, each storage once.

    Looks into modules, mappings, sequences and plain objects' attributes: a packed weight or cache is one of those.
    """
    storages: dict[int, int] = {}
    seen: set[int] = set()
    pending = list(roots)
    while pending:
        item = pending.pop()
        if id(item) in seen or item is None or isinstance(item, str | bytes | int | float | type):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            pending += item.values()
        elif isinstance(item, list | tuple | set):
            pending += item
        elif hasattr(item, "__dict__") and not callable(item):
            pending += vars(item).values()
        elif isinstance(item, torch.nn.Module):
            pending += [*item.parameters(), *item.buffers()]
    return sum(storages.values())


def transformers_entries(path: str, prompt_tokens: int, skipped: list[str]) -> list[Entry]:
    """transformers' own bfloat16 model, with each of its attention functions that runs here."""

    @cache
    def model() -> Any:
        return load_model(path, dtype=torch.bfloat16)

    def entry(attention: str) -> Entry:
        def generate(ids: Tensor, tokens: int) -> Steps:
            model().set_attn_implementation(attention)
            return timed_generate(model(), ids, tokens)

        def make(_: Tensor) -> Decoder:
            return Decoder(
                generate, allocated_bytes(*model().parameters(), *model().buffers()), allocated_bytes, (16,) * 3
            )

        return Entry(f"transformers, {attention}", "BF16", make, library="transformers")

    found = [entry("sdpa")]
    if prompt_tokens > _EAGER_TOKENS:
        skipped.append(
            f"decode, transformers, eager: left out for prompts of more than {_EAGER_TOKENS:,} tokens, where it "
            "holds a matrix of tokens by tokens for each head."
        )
    else:
        found.append(entry("eager"))
    return found


def bits(model: Any) -> tuple[float, float, float]:
    """Bits a number, scales included, of a model's decoder matrices, its output head and its embeddings, as stored."""

    def of(module: Any) -> float:
        stored = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        rows, columns = (getattr(module, name) for name in _SIZES[hasattr(module, "embedding_dim")])
        return 8 * sum(tensor.nbytes for tensor in stored if tensor.ndim) / (rows * columns)

    inner: list[Any] = [
        part for block in blocks_of(model) for part in block.module.modules() if hasattr(part, "out_features")
    ]
    numbers = sum(part.out_features * part.in_features for part in inner)
    outside = (model.get_output_embeddings(), model.get_input_embeddings())
    found = (8 * memory(model).linear_bytes / numbers, *(of(module) for module in outside))
    return tuple(round(number, 2) for number in found)  # type: ignore[return-value]


def packed_entry(path: str, precision: str, head: str | None = None) -> Entry:
    """Our packed model, held against the same model fake-quantized; both are calibrated on the prompt of the check.

    ``head``: as for :func:`reqat.pack`, of embeddings that are tied to it, too. The fake-quantized model's head is
    rounded likewise (its input is not): what that changes is measured in :mod:`reqat.evaluation.heads`.
    """

    def prepared(ids: Tensor) -> Any:
        model: Any = load_model(path, dtype=torch.bfloat16)
        prepare(model, precision, override=True, global_scale=_GLOBAL_SCALE)
        calibrate_static(model, [ids])
        return model

    def rounded(ids: Tensor) -> Any:
        model = prepared(ids)
        fmt = None if head is None else format_of(head)
        if fmt is not None:
            weight = model.get_output_embeddings().weight.data
            weight.copy_(quantize_dequantize(weight.float(), fmt))
        return model

    def make(ids: Tensor) -> Decoder:
        packed: Any = pack(prepared(ids), head=head)
        return Decoder(
            lambda ids, tokens: timed_generate(packed, ids, tokens),
            memory(packed).total_bytes,
            lambda cache: int(memory(packed, cache).cache_bytes),
            bits(packed),
        )

    name = precision if head is None else f"{precision}, head {head}"
    return Entry("reqat.pack", name, make, lambda _, ids: rounded(ids), "reqat", ours=True)


def model_bytes(path: str, cached_tokens: int, packed: int = 1) -> int:
    """Bytes of memory that :func:`measure_decoding` takes at most for the models of its processes, ``packed`` packed
    ones among them, and for a cache of so many tokens. An estimate from above, made of the sizes in the headers of the
    weights' files."""
    if path.startswith(PACKAGE):
        import gguf

        shapes = [tuple(map(int, tensor.shape)) for tensor in gguf.GGUFReader(package_gguf(path)).tensors]
    else:
        shapes = [tuple(header.shape) for header in weight_headers(local_folder(path)).values()]
    parameters = sum(math.prod(shape) for shape in shapes)
    # Of a decoder as wide and deep as this: a layer has some 7 matrices, keys and values are no wider than its input.
    width = max((min(shape) for shape in shapes if len(shape) == 2), default=0)
    layers = sum(len(shape) == 2 for shape in shapes) / 7
    each = _BYTES_A_PARAMETER + _BYTES_A_PACKED_PARAMETER * (packed - 1)
    of_models = (each + (_BYTES_A_LLAMA_PARAMETER if find_spec("llama_cpp") else 0)) * parameters
    processes = 3 + len(llama_cpp.TYPES)  # the reference's, transformers', ours
    return round(processes * WORKER_BYTES + of_models + 3 * 2 * 2 * layers * width * cached_tokens)


@dataclass(eq=False)
class _Contender:
    """The parent's side of an entry: the worker that serves it, and its samples by (threads, batch)."""

    entry: Entry
    which: int
    worker: Worker
    weight_bytes: int = 0
    bits: tuple[float, float, float] | None = None
    samples: dict[tuple[int, int], list[Steps]] = field(default_factory=dict)
    prompts: dict[tuple[int, int], list[Steps]] = field(default_factory=dict)
    """By (threads, tokens of the prompt)."""

    def generate(self, ids: Tensor, tokens: int, threads: int) -> Steps:
        """A generation in its process."""
        return self.worker("generate", self.which, ids, tokens, threads)  # type: ignore[no-any-return]


def measure_decoding(
    path: str,
    precision: str,
    *,
    batches: Sequence[int],
    prompt_tokens: int,
    output_tokens: Sequence[int],
    prefill_tokens: Sequence[int] = (),
    threads: Sequence[int] = (1,),
    heads: Sequence[str] = (),
    rounds: int = 1,
    probe: Roofline,
    scratch: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
    peak: Callable[[int], object] = lambda bytes: None,
    patience_s: float = 4 * PATIENCE_S,
    more: Sequence[Entry] = (),
) -> Result:
    """Time every decoder that runs here on one model, each in a process of its own, in turns.

    Args:
        path: as for :func:`reqat.models.load_model`.
        precision: of our packed model.
        batches: rows decoded together, prompts of ``prompt_tokens`` random tokens each.
        output_tokens: a row for each, from generations of the longest.
        prefill_tokens: lengths of one prompt; a row of kernel ``prefill`` for each, from the prompt to the first token.
        threads: rows for each number of threads.
        heads: ways to store our packed model's output head, each an entry beside the one in bfloat16.
        scratch: folder for the files that llama.cpp reads its weights from; None: llama.cpp is left out.
        say: told what is being measured.
        peak: told the bytes that all processes hold together, whenever that may have grown.
        patience_s: seconds after which a generation counts as one without end.
        more: further entries.

    A decoder of others that crashes, hangs, raises or is wrong gets rows that say so.

    Raises Wrong if our packed model does not generate what the fake-quantized one agrees with, Died if it crashes;
    ValueError for more threads than CPUs.
    """
    for n in threads:
        check_threads(n)
    out, longest = Result(), max(output_tokens)
    entries = [*transformers_entries(path, max([prompt_tokens, *prefill_tokens]), out.skipped)]
    entries += [packed_entry(path, precision, head) for head in (None, *heads)]
    if scratch is not None:
        context = max(prompt_tokens + max(longest, CHECKED_TOKENS), 1 + max(prefill_tokens, default=0))
        entries += llama_cpp.entries(path, scratch, out.skipped, context=context)
    if find_spec("vllm") is not None:
        out.skipped.append("decode, vLLM: it is installed, but not timed here: its engine starts processes of its own.")
    entries += more
    contenders: list[_Contender] = []
    shapes = [(b, _shape(b, prompt_tokens, t)) for b in batches for t in sorted(output_tokens)]

    def attempt(contender: _Contender, act: Callable[[], None]) -> None:
        """Do something that may fail; then note why, and leave the decoder out from there on."""
        entry = contender.entry
        try:
            act()
            return
        except CheckpointNotFoundError:
            raise
        except Exception as error:
            if entry.ours and not isinstance(error, Moved):
                if isinstance(error, Died):
                    raise Died(f"decode, {entry.label}: {error}") from error
                raise
            reason = reason_of(error)
        out.refused.append(f"decode, {entry.label}, not timed: {reason}")
        able = [(b, shape) for b, shape in shapes if entry.batches is None or b in entry.batches]
        asked = [("decode", *shape) for shape in able] + [("prefill", 1, _shape(1, p)) for p in prefill_tokens]
        out.rows += [
            failed_row(kernel, entry.name, entry.format, shape, b, n, reason, ours=entry.ours)
            for n in threads
            for kernel, b, shape in asked
        ]
        contenders.remove(contender)
        if all(other.worker is not contender.worker for other in contenders):
            contender.worker.stop()

    workers: dict[str, Worker] = {}
    judge = Worker(lambda: Judge(lambda: load_model(path), entries), patience_s)
    try:
        vocabulary = judge("vocabulary")
        size = (max(batches), max([prompt_tokens, *prefill_tokens]))
        ids = torch.randint(0, vocabulary, size, generator=torch.Generator().manual_seed(SEED))
        checked = ids[:1, : min(prompt_tokens, CHECKED_PROMPT_TOKENS)]
        for which, entry in enumerate(entries):
            library = entry.library or entry.label
            if library not in workers:
                workers[library] = Worker(lambda: ServedDecoders(entries), patience_s)
            contender = _Contender(entry, which, workers[library])
            contenders.append(contender)

            def ready(contender: _Contender = contender) -> None:
                contender.weight_bytes = contender.worker("prepare", contender.which, checked)
                contender.bits = contender.worker("bits", contender.which)
                chosen = [contender.generate(checked, CHECKED_TOKENS, n).tokens for n in threads]
                judge("judge", contender.which, checked, chosen)

            attempt(contender, ready)
            processes = [judge, *workers.values()]
            above = max(peak_above_bytes(worker.pid) for worker in processes)
            peak(resident_bytes() + probe.bytes + sum(private_bytes(worker.pid) for worker in processes) + above)
        judge.stop()
        for batch in batches:
            prompts = ids[:batch, :prompt_tokens]
            able = [c for c in contenders if c.entry.batches is None or batch in c.entry.batches]

            def decoded(c: _Contender, n: int, prompts: Tensor = prompts, batch: int = batch) -> None:
                c.samples.setdefault((n, batch), []).append(c.generate(prompts, longest, n))

            load, rates = _turns(able, contenders, rounds, threads, probe, attempt, decoded, say, f"batch {batch}")
            for contender in (c for c in able if c in contenders):
                for n, tokens in ((n, t) for n in threads for t in sorted(output_tokens)):
                    row = _row(contender, n, batch, prompt_tokens, tokens, longest, probe.bandwidth)
                    out.rows.append(Row(**row, **load, probe_gb_per_s=rates[n] / 1e9))
        for tokens in prefill_tokens:

            def read(c: _Contender, n: int, tokens: int = tokens) -> None:
                c.prompts.setdefault((n, tokens), []).append(c.generate(ids[:1, :tokens], 1, n))

            turns = max(rounds, _PREFILL_ROUNDS)
            load, rates = _turns(list(contenders), contenders, turns, threads, probe, attempt, read, say, "prefill")
            for contender, n in ((c, n) for c in contenders for n in threads):
                row = _prefill_row(contender, n, tokens, probe.bandwidth)
                out.rows.append(Row(**row, **load, probe_gb_per_s=rates[n] / 1e9))
    finally:
        for worker in (judge, *workers.values()):
            worker.stop()
    return out


def _turns(
    able: Sequence[_Contender],
    contenders: Sequence[_Contender],
    rounds: int,
    threads: Sequence[int],
    probe: Roofline,
    attempt: Callable[[_Contender, Callable[[], None]], None],
    act: Callable[[_Contender, int], None],
    say: Callable[[str], None],
    what: str,
) -> tuple[dict[str, Any], dict[int, float]]:
    """Let all take turns, whoever came first in one round last in the next. Returns what others took of the machine
    meanwhile, and the probe's median rate by number of threads."""
    watch = Neighbours()
    first = {n: len(probe.rates.get(n, ())) for n in threads}
    for turn in range(rounds):
        at = turn % max(1, len(able))
        for contender in [*able[at:], *able[:at]]:
            for n in threads:
                if contender in contenders:
                    say(f"decode, {what}: {contender.entry.label}")
                    probe(n)
                    attempt(contender, partial(act, contender, n))
    load = watch.load()
    rates = {n: percentile(probe.rates.get(n, [])[first[n] :], 0.5) for n in threads}
    return {"neighbour_cores": load.neighbour_cores, "steal": load.steal}, rates


def _shape(batch: int, prompt: int, tokens: int | None = None) -> str:
    return f"B={batch} P={prompt}" + ("" if tokens is None else f" T={tokens}")


def _row(
    contender: _Contender, threads: int, batch: int, prompt: int, tokens: int, longest: int, bandwidth: Bandwidth
) -> dict[str, Any]:
    runs, weights = contender.samples[threads, batch], contender.weight_bytes
    durations = [us for steps in runs for us in steps.durations_us(tokens)]
    waits = [wait for steps in runs for wait in steps.waits(tokens)]
    kept, cache_bytes = undisturbed(durations, waits), runs[-1].cache_bytes
    # The cache grows evenly, so half of what the last step reads is what an average one does beyond the prompt's.
    read = 0 if cache_bytes is None else cache_bytes * (prompt + tokens / 2) / (prompt + longest)
    return _timed(contender, threads, kept, round(weights + read), bandwidth) | {
        "kernel": "decode",
        "shape": _shape(batch, prompt, tokens),
        "m": batch,
        "waited": sum(w * d for w, d in zip(waits, durations, strict=True)) / sum(durations),
        "set_aside": len(durations) - len(kept),
        "output_tokens": tokens,
        "tokens_per_s": batch * len(kept) / sum(kept) * 1e6,
        "cache_bytes": cache_bytes,
    }


def _prefill_row(contender: _Contender, threads: int, tokens: int, bandwidth: Bandwidth) -> dict[str, Any]:
    """A prompt is one sample, so none is set aside."""
    runs = contender.prompts[threads, tokens]
    samples = [steps.prefill_us() for steps in runs]
    return _timed(contender, threads, samples, contender.weight_bytes, bandwidth) | {
        "kernel": "prefill",
        "shape": _shape(1, tokens),
        "m": 1,
        "waited": math.nan,
        "set_aside": 0,
        "tokens_per_s": tokens / percentile(samples, 0.5) * 1e6,
        "cache_bytes": runs[-1].cache_bytes,
    }


def _timed(
    contender: _Contender, threads: int, samples: Sequence[float], moved: int, bandwidth: Bandwidth
) -> dict[str, Any]:
    """What rows of decoding and of prompts have in common."""
    entry, median = contender.entry, percentile(samples, 0.5)
    return {
        "provider": entry.name,
        "format": entry.format,
        "device": "cpu",
        "arithmetic": "native",
        "threads": threads,
        "n": len(samples),
        "median_us": median,
        "min_us": min(samples, default=math.nan),
        "p10_us": percentile(samples, 0.1),
        "p90_us": percentile(samples, 0.9),
        "bytes_moved": moved,
        "gb_per_s": moved / median / 1e3,
        "roofline_gb_per_s": math.nan,
        "roofline_fraction": math.nan,
        "cold": bandwidth.is_cold(contender.weight_bytes),
        "ours": entry.ours,
        "bits": None if contender.bits is None else " / ".join(f"{number:g}" for number in contender.bits),
        "weight_bytes": contender.weight_bytes,
        "ring_bytes": contender.weight_bytes,
        "ring_gb_per_s": bandwidth.rate(contender.weight_bytes) / 1e9,
    }
