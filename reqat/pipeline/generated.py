"""Trace stores that task families generate: problems, their verified traces, and the tokenizer that counts them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from reqat.config.errors import ReqatError
from reqat.config.stage import DataSettings, Stage
from reqat.data import Trace, TraceStore, build_tokenizer, encode_prompt, with_bos, without_bos, write_store
from reqat.models import load_tokenizer
from reqat.tasks import Problem, get_family, write_trace
from reqat.tasks.family import stream

#: What stages leave in their folders.
MODEL, TOKENIZER, STORE = "model", "tokenizer", "train"
# Problems of each family whose words make the vocabulary; the families' phrase books are small, so this covers them
# many times over.
_VOCABULARY_PROBLEMS = 3000
_VOCABULARY_SEED = 0


def generated(stage: Stage, inputs: Mapping[str, Path], out: Path, checkpoints: Path, progress: bool) -> dict[str, Any]:
    """Carry out a `data` stage of generated traces: its store and tokenizer go into ``out``; returns metrics."""
    settings = stage.settings
    assert isinstance(settings, DataSettings)
    assert settings.source == "generated"  # a file's are imported: reqat.pipeline.imported
    if settings.tokenizer == "model":
        tokenizer = with_bos(load_tokenizer(inputs["parent"] / MODEL))
    else:
        rng = random.Random(_VOCABULARY_SEED)
        sample = (
            text
            for family, options in settings.families.items()
            for problem in itertools.islice(stream(family, "train", _VOCABULARY_SEED, options), _VOCABULARY_PROBLEMS)
            for text in (problem.prompt, write_trace(problem, rng) or "")
        )
        tokenizer = build_tokenizer(sample)
    tokenizer.save_pretrained(out / TOKENIZER)
    counts = dict.fromkeys(settings.families, 0)

    def counted() -> Iterator[Trace]:
        total = 0
        for trace in traces(settings, tokenizer):
            if total >= settings.tokens:
                return
            counts[trace.family] += 1
            total += trace.n_tokens
            yield trace

    write_store(out, {STORE: counted()})
    store = TraceStore.read(out)
    return {
        "tokens": store.n_tokens,
        "traces": len(store.traces),
        "vocabulary": len(tokenizer),
        "longest_trace_tokens": int(store.traces.lengths.max()),
        "digest": store.digest,
        **{f"traces_{family}": n for family, n in counts.items()},
    }


def _round(settings: DataSettings) -> list[str]:
    """The families of one round, each as often as its share says, spread evenly; in order of their names without
    shares."""
    shares = {family: settings.shares.get(family, 1) for family in settings.families}
    size = sum(shares.values())
    taken = dict.fromkeys(shares, 0)
    out = []
    for i in range(1, size + 1):
        family = max(shares, key=lambda f: shares[f] * i / size - taken[f])
        taken[family] += 1
        out.append(family)
    return out


def traces(settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> Iterator[Trace]:
    """Verified traces without end, the families in turn; a pure function of ``settings.families``, ``split`` and
    ``seed``.

    Raises ``ReqatError`` where a family runs out of problems, or the tokenizer has no end-of-sequence token.
    """
    rng = random.Random(settings.seed)

    def begin(family: str) -> Iterator[Problem]:
        return stream(family, settings.split, settings.seed, settings.families[family])

    streams = {family: begin(family) for family in settings.families}
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ReqatError("the tokenizer has no eos_token, so no trace could end: set it in tokenizer_config.json")
    for index, family in enumerate(itertools.cycle(_round(settings))):
        while True:
            problem = next(streams[family], None)
            if problem is None and get_family(family).closed:
                streams[family] = begin(family)
                problem = next(streams[family], None)
            if problem is None:
                raise ReqatError(
                    f"task family {family!r} ran out of distinct problems after {index} traces; widen its options."
                )
            if (response := write_trace(problem, rng)) is not None:
                break
        response_ids = [*tokenizer(response, add_special_tokens=False)["input_ids"], eos]
        has_bos, prompt_ids = without_bos(tokenizer, encode_prompt(tokenizer, problem.prompt))
        yield Trace(
            f"{index:08d}-{problem.id}",
            problem.id,
            family,
            problem.prompt,
            response,
            tuple(prompt_ids),
            tuple(response_ids),
            has_bos,
        )
