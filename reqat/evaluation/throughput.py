"""Decoding throughput of whole models: tokens per second through ``generate()``, and memory of weights and cache.

The kernels' benchmark (:mod:`reqat_kernels.bench`) knows no models, so decoding is timed here and
gives the same rows. Each step of a generation is a sample: the clock is read where transformers asks whether to
stop. Providers take whole generations in turns, with a reading of the bandwidth probe between them. Before it is
timed a provider has to generate what the reference agrees with.

Throughput counts decoding alone: B rows times the steps after the first token, over their time. A generation of T
tokens holds the shorter ones, so one run gives a row for every output length.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reqat.evaluation import llama_cpp
from reqat.evaluation.decoders import CHECKED_PROMPT_TOKENS, CHECKED_TOKENS, Decoder, Steps, agrees
from reqat.inference import memory, pack
from reqat.models import calibrate_static, load_model, prepare
from reqat_kernels.bench.machine import Neighbours, Probe, last_level_cache_bytes, waited_ns
from reqat_kernels.bench.measure import Result, Row, percentile, undisturbed

SEED = 6

# Calibrated once, as engines serve it: a token's codes depend on that token alone, so that decoding can be held against
# one pass over the whole sequence, and the cache stores no scale a token.
_GLOBAL_SCALE = "static"

_EAGER_TOKENS = 2048


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

    clock, configured = _Clock(), model.generation_config
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
    return Steps(out.sequences[:, ids.shape[1] :], clock.stamps_ns, clock.waits_ns, out.past_key_values)


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


def transformers_decoders(
    path: str, reference: Any, ids: Tensor, prompt_tokens: int, skipped: list[str]
) -> Iterator[Decoder]:
    """transformers' own bfloat16 model, with each of its attention functions that runs here, checked on ``ids``."""
    model: Any = load_model(path, dtype=torch.bfloat16)
    weights = allocated_bytes(*model.parameters(), *model.buffers())
    for attention in ("sdpa", "eager"):
        if attention == "eager" and prompt_tokens > _EAGER_TOKENS:
            skipped.append(
                f"decode, transformers, eager: left out for prompts of more than {_EAGER_TOKENS:,} tokens, where it "
                "holds a matrix of tokens by tokens for each head."
            )
            continue

        def generate(ids: Tensor, tokens: int, attention: str = attention) -> Steps:
            model.set_attn_implementation(attention)
            return timed_generate(model, ids, tokens)

        name = f"transformers, {attention}"
        agrees(reference, ids, generate(ids, CHECKED_TOKENS).tokens, name)
        yield Decoder(name, "BF16", generate, weights, allocated_bytes)


def packed_decoder(path: str, precision: str, ids: Tensor) -> Decoder:
    """Our packed model, held against the same model fake-quantized."""

    def prepared() -> Any:
        model: Any = load_model(path, dtype=torch.bfloat16)
        prepare(model, precision, override=True, global_scale=_GLOBAL_SCALE)
        calibrate_static(model, [ids])
        return model

    packed: Any = pack(prepared())
    steps = timed_generate(packed, ids, CHECKED_TOKENS)
    fake = prepared()
    agrees(fake, ids, steps.tokens, "reqat.pack")
    del fake

    def cache_bytes(cache: Any) -> int:
        return int(memory(packed, cache).cache_bytes)

    taken = memory(packed)
    return Decoder(
        "reqat.pack",
        precision,
        lambda ids, tokens: timed_generate(packed, ids, tokens),
        taken.total_bytes,
        cache_bytes,
        ours=True,
    )


def measure_decoding(
    path: str,
    precision: str,
    *,
    batches: Sequence[int],
    prompt_tokens: int,
    output_tokens: Sequence[int],
    rounds: int = 1,
    probe: Probe | None = None,
    scratch: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
    avoid: Collection[str] = (),
    entering: Callable[[str], object] = lambda name: None,
) -> Result:
    """Time every decoder that runs here on one model.

    Args:
        path: as for :func:`reqat.models.load_model`.
        precision: of our packed model.
        batches: rows decoded together, prompts of ``prompt_tokens`` random tokens each.
        output_tokens: a row for each, from generations of the longest.
        scratch: folder for the files that llama.cpp reads its weights from; None: llama.cpp is left out.
        say: told what is being measured.
        avoid: names (:attr:`Decoder.label`) of decoders of llama.cpp to leave out.
        entering: told the name of the decoder whose code runs next if it is one of llama.cpp, and "" after that.

    Raises Wrong if our packed model does not generate what the fake-quantized one agrees with.
    """
    probe, out = probe or Probe(), Result()
    reference: Any = load_model(path)
    vocabulary = int(reference.config.vocab_size)
    ids = torch.randint(0, vocabulary, (max(batches), prompt_tokens), generator=torch.Generator().manual_seed(SEED))
    checked = ids[:1, :CHECKED_PROMPT_TOKENS]
    decoders = list(transformers_decoders(path, reference, checked, prompt_tokens, out.skipped))
    decoders.append(packed_decoder(path, precision, checked))
    longest = max(output_tokens)
    if scratch is not None:
        context = prompt_tokens + max(longest, CHECKED_TOKENS)
        decoders += llama_cpp.decoders(
            path, scratch, reference, checked, out.skipped, out.refused, context=context, avoid=avoid, entering=entering
        )
        entering("")
    del reference
    for batch in batches:
        able = [decoder for decoder in decoders if decoder.batches is None or batch in decoder.batches]
        watch, first = Neighbours(), len(probe.rates)
        caches: dict[int, int | None] = {}
        for turn in range(rounds):
            at = turn % len(able)
            for decoder in able[at:] + able[:at]:
                say(f"decode, batch {batch}: {decoder.label}")
                probe()
                entering(decoder.label if decoder.foreign else "")
                steps = decoder.generate(ids[:batch], longest)
                entering("")
                caches[id(decoder)] = decoder.cache_bytes(steps.cache)
                steps.cache = None
                decoder.samples.setdefault(batch, []).append(steps)
        load, rate = watch.load(), percentile(probe.rates[first:], 0.5)
        for decoder in able:
            for tokens in sorted(output_tokens):
                row = _row(decoder, batch, prompt_tokens, tokens, longest, caches[id(decoder)])
                out.rows.append(
                    Row(**row, probe_gb_per_s=rate / 1e9, neighbour_cores=load.neighbour_cores, steal=load.steal)
                )
    return out


def _row(
    decoder: Decoder, batch: int, prompt: int, tokens: int, longest: int, cache_bytes: int | None
) -> dict[str, Any]:
    runs = decoder.samples[batch]
    durations = [us for steps in runs for us in steps.durations_us(tokens)]
    waits = [wait for steps in runs for wait in steps.waits(tokens)]
    kept = undisturbed(durations, waits)
    median = percentile(kept, 0.5)
    # The cache grows evenly, so half of what the last step reads is what an average one does beyond the prompt's.
    read = 0 if cache_bytes is None else cache_bytes * (prompt + tokens / 2) / (prompt + longest)
    moved = round(decoder.weight_bytes + read)
    return {
        "kernel": "decode",
        "provider": decoder.name,
        "shape": f"B={batch} P={prompt} T={tokens}",
        "m": batch,
        "format": decoder.format,
        "device": "cpu",
        "arithmetic": "native",
        "threads": torch.get_num_threads(),
        "n": len(kept),
        "median_us": median,
        "min_us": min(kept, default=math.nan),
        "p10_us": percentile(kept, 0.1),
        "p90_us": percentile(kept, 0.9),
        "bytes_moved": moved,
        "gb_per_s": moved / median / 1e3,
        "roofline_gb_per_s": math.nan,
        "roofline_fraction": math.nan,
        "cold": decoder.weight_bytes > last_level_cache_bytes(),
        "waited": sum(w * d for w, d in zip(waits, durations, strict=True)) / sum(durations),
        "set_aside": len(durations) - len(kept),
        "ours": decoder.ours,
        "output_tokens": tokens,
        "tokens_per_s": batch * len(kept) / sum(kept) * 1e6,
        "weight_bytes": decoder.weight_bytes,
        "cache_bytes": cache_bytes,
        "working_set_bytes": decoder.weight_bytes,
        "last_level_cache_bytes": last_level_cache_bytes(),
    }
