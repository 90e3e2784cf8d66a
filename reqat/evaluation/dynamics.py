"""Entropy dynamics of training: one teacher-forced pass of several models over the same verified traces.

Fine-tuning and QAT move a model's entropies, and not evenly: ReQAT (Figure 4) reads from the change at tokens where
the base was sure, or unsure, whether quantized training recovers what fine-tuning gave. For that all models must see
the same tokens, so the responses are verified solutions of problems that no training saw, and each model reads them at
the precision it is used at. The change itself is a statistic of the trace folder: ``analysis.entropy.entropy_change``.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reqat.config.errors import ReqatError
from reqat.config.precision import PrecisionSpec
from reqat.data import encode_prompt
from reqat.evaluation.entropies import ForcedTrace, force_traces, vocabulary_of
from reqat.evaluation.loading import load_at
from reqat.evaluation.trace_files import TraceInfo, TraceWriter
from reqat.models import load_tokenizer
from reqat.tasks import problems, write_trace

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def verified_traces(
    families: Mapping[str, Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    n: int,
    split: str = "validation",
    seed: int = 1,
) -> list[ForcedTrace]:
    """A verified solution of each of ``n`` problems of the families, in equal shares, with the end of sequence.

    Problems whose family writes no verified solution are left out, so there may be fewer. Raises ``ValueError`` as
    :func:`reqat.tasks.problems` does, `ReqatError` where no problem has a solution.
    """
    rng = random.Random(seed)
    eos = tokenizer.eos_token_id
    out = []
    for problem in problems(families, split, n, seed):
        response = write_trace(problem, rng)
        if response is None:
            continue
        ids = [*tokenizer(response, add_special_tokens=False)["input_ids"], *([] if eos is None else [eos])]
        info = TraceInfo(
            problem=problem.id,
            family=problem.family,
            seed=seed,
            source="given",
            prompt=problem.prompt,
            response=response,
            answer=problem.answer,
            correct=True,
            finished=True,
        )
        out.append(ForcedTrace(info, tuple(encode_prompt(tokenizer, problem.prompt)), tuple(ids)))
    if not out:
        raise ReqatError(
            f"none of {n} problems of {', '.join(families)} has a verified solution; choose other families."
        )
    return out


def run_dynamics(
    models: Mapping[str, tuple[Path, PrecisionSpec]],
    traces: Iterable[ForcedTrace],
    out: Path,
    *,
    metadata: Mapping[str, Any] | None = None,
    autocast: torch.dtype | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Entropies of every model over every trace, as a trace folder in ``out``; returns counts.

    Args:
        models: label -> the model's folder and the precision it reads at, the base first.
        traces: the same for all, tokenized by the tokenizer that all share.
        out: where ``tokens.parquet``, ``traces.parquet`` and ``meta.json`` go.
        metadata: further entries of ``meta.json``.
        autocast: e.g. ``torch.bfloat16`` to run the models under ``torch.autocast``.
        progress: whether to print it.

    Raises `ReqatError` for fewer than two models, models with different tokenizers, static global scales (which need
    a calibration that this pass has not), or a trace at fault, naming it.
    """
    if len(models) < 2:
        raise ReqatError(f"entropy dynamics compare models with a base; got {', '.join(models) or 'none'}.")
    for label, (_, spec) in models.items():
        if spec.global_scale == "static":
            raise ReqatError(f"{label}: static global scales need a calibration; take row or dynamic ones here.")
    known = {label: load_tokenizer(folder).get_vocab() for label, (folder, _) in models.items()}
    base = next(iter(models))
    for label, words in known.items():
        if words != known[base]:
            raise ReqatError(f"{label} and {base} have different tokenizers; their tokens cannot be compared.")
    loaded: dict[str, PreTrainedModel] = {}
    for label, (folder, spec) in models.items():
        loaded[label] = load_at(folder, spec.name, override=True, **spec.for_prepare())
    width = max(int(model.config.vocab_size) for model in loaded.values())
    about = {"precisions": {label: spec.name for label, (_, spec) in models.items()}, **(metadata or {})}
    vocabulary = vocabulary_of(load_tokenizer(models[base][0]), width)
    with TraceWriter(out, tuple(models), vocabulary, metadata=about) as writer:
        force_traces(
            loaded,
            traces,
            writer,
            autocast=autocast,
            progress=(lambda n, tokens: print(f"{n} traces, {tokens} tokens", flush=True)) if progress else None,
        )
        return {"labels": list(models), "traces": writer.n_traces, "tokens": writer.n_tokens}
