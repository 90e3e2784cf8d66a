"""Runs of several models over the same verified solutions, one pair of models in memory at a time.

What is done of a run that was killed lies in its checkpoints: a file a model, named by the weights of that model and of
its reference, so that a stage trained again in between is read again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reqat.config.base import digest
from reqat.config.progress import bar
from reqat.config.studies import REFERENCE, LikelihoodStudy

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from reqat.evaluation.entropies import ForcedTrace

FILE = "likelihood.parquet"
"""Of a finished study: a row a model's run and trace, as `reqat.evaluation.held_out.likelihood_sums` with the columns
`label`, `seed` (of training; missing where nothing was trained, or no seed was asked for) and `threshold_nats`."""


@dataclass(frozen=True)
class ModelRun:
    """A model at one training seed, and the role of the reference that it is read beside."""

    label: str
    seed: int | None
    role: str
    reference: str


def model_runs(settings: LikelihoodStudy, roles: Mapping[str, Any]) -> list[ModelRun]:
    """Every run of every model among the ``roles`` of a planned study, those of one reference together.

    A run is read beside the reference of its own seed, where there is one, else beside the first.
    """
    runs = settings.runs()
    references = {seed: role for seed in runs.pop(REFERENCE) if (role := settings.role(REFERENCE, seed)) in roles}
    first = next(iter(references.values()))
    found = [
        ModelRun(label, seed, role, references.get(seed, first))
        for label, by_seed in runs.items()
        for seed in by_seed
        if (role := settings.role(label, seed)) in roles
    ]
    order = list(references.values())
    return sorted(found, key=lambda run: order.index(run.reference))


def part_of(run: ModelRun, weights: Mapping[str, str], checkpoints: Path) -> Path:
    """Where a run's sums are kept until the result is safe: named by the weights of both models that were read. The
    study's id, and thus the folder, covers all else."""
    return checkpoints / f"{digest([run.role, weights[run.role], weights[run.reference]], 16)}.parquet"


def run_likelihood(
    runs: Sequence[ModelRun],
    load: Callable[[str], tuple[Any, Any]],
    weights: Mapping[str, str],
    traces: Sequence[ForcedTrace],
    out: Path,
    *,
    percentile: float,
    checkpoints: Path,
    autocast: torch.dtype | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Read ``traces`` with every model; write `FILE` into ``out`` and return the record's metrics.

    Args:
        runs: those of one reference stand together.
        load: role -> model and tokenizer.
        weights: role -> what tells its model from another, such as the digest of its stage's outputs.
        percentile: of the reference's entropies over all tokens; below it a token is a low-entropy one.
        checkpoints: where finished models are kept until the result is safe.
        autocast: e.g. ``torch.bfloat16`` to run the models under ``torch.autocast``.
        progress: whether to show it.

    Raises `ReqatError` for models of different tokenizers, and as `likelihood_sums`.
    """
    import numpy as np
    import pandas as pd

    from reqat.evaluation.held_out import Reference, likelihood_sums
    from reqat.pipeline.task import same_tokens

    checkpoints.mkdir(parents=True, exist_ok=True)
    tokens = sum(len(trace.response_ids) for trace in traces)
    parts: list[pd.DataFrame] = []
    with bar("likelihood", tokens * len(runs), "tokens", enabled=progress) as shown:
        beside, reference = None, None
        for run in runs:
            part = part_of(run, weights, checkpoints)
            if part.is_file():
                parts.append(pd.read_parquet(part))
                shown.update(tokens)
                continue
            if beside != run.reference:
                reference = None  # one at a time in memory
                model, tokenizer = load(run.reference)
                reference = Reference(model, traces, autocast=autocast)
                del model
                threshold = float(np.percentile(np.concatenate(reference.entropies), percentile))
                beside = run.reference
            model, other = load(run.role)
            same_tokens(tokenizer, other, (run.reference, run.role))
            assert reference is not None
            sums = likelihood_sums(model, reference, threshold, told=shown.update)
            del model
            sums = sums.assign(threshold_nats=threshold)
            sums.insert(0, "seed", pd.array([run.seed] * len(sums), dtype="Int64"))
            sums.insert(0, "label", run.label)
            unfinished = part.with_suffix(".part")
            sums.to_parquet(unfinished, index=False)
            unfinished.replace(part)
            parts.append(sums)
    whole = pd.concat(parts, ignore_index=True)
    whole.to_parquet(out / FILE, index=False)
    means = {
        run.role: float((part["nll_low"] + part["nll_high"]).sum() / tokens)
        for run, part in zip(runs, parts, strict=True)
    }
    return {"traces": len(traces), "tokens": tokens, "nll_nats": means}
