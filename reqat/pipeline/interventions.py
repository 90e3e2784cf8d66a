"""Routed decoding and logit noise, graded condition by condition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from reqat.config.decoding import SAMPLE, Threshold

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reqat.pipeline.conditions import Conditions
from reqat.pipeline.task import Task


def nats(text: str, model: PreTrainedModel, tokenizer: Any, task: Task, n: int, quiet: bool) -> float:
    """A threshold: nats as they are, or `p75`, the percentile of the model's entropies on held-out problems."""
    threshold = Threshold.parse(text)
    if not threshold.is_percentile:
        return threshold.value
    return entropy_percentile(threshold.value, model, tokenizer, task, n, quiet)


def entropy_percentile(
    percentile: float, model: PreTrainedModel, tokenizer: Any, task: Task, n: int, quiet: bool
) -> float:
    """A percentile of the model's entropies (nats) on the first `n` held-out problems."""
    from reqat.evaluation.tau0 import fit_tau0

    options = task.options([0], SAMPLE, quiet, "measuring entropies")
    found = fit_tau0(model, tokenizer, task.problems(n, "validation"), quantile=percentile / 100, **options)
    print(f"threshold p{percentile:g}: {found}", flush=True)
    return found.value


def grade_routes(
    conditions: Conditions,
    reference: PreTrainedModel,
    candidate: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    names: Sequence[str],
    threshold_nats: float,
    n: int,
    seeds: Sequence[int],
    decoding: str,
    quiet: bool,
) -> None:
    """Grade each of the policies `names` on the first `n` problems."""
    from reqat.evaluation.intervened import evaluate_routed
    from reqat.generation.interventions import policies

    asked, given = task.problems(n), policies(threshold_nats)
    for name in names:
        options = task.options(seeds, decoding, quiet, name)
        found = evaluate_routed(reference, candidate, tokenizer, asked, given[name], **options)
        conditions.add_intervened(name, found)


def noise_ends(
    by: str,
    share: float,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    held_out: int,
    quiet: bool,
) -> dict[str, float | None]:
    """Below and above which entropy (nats) a decision meets noise; None where each step's batch says it."""
    ends: dict[str, float | None] = {"low": None, "high": None}
    if by == "percentile":
        for side, percentile in (("low", 100 * share), ("high", 100 * (1 - share))):
            ends[side] = entropy_percentile(percentile, model, tokenizer, task, held_out, quiet)
    return ends


def grade_noise(
    conditions: Conditions,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    sigmas: Sequence[float],
    share: float,
    ends: Mapping[str, float | None],
    n: int,
    seeds: Sequence[int],
    decoding: str,
    quiet: bool,
) -> None:
    """Grade no noise, and noise of every size at either end, on the first `n` problems."""
    from reqat.evaluation import evaluate
    from reqat.evaluation.intervened import evaluate_noisy
    from reqat.generation.interventions import Noise

    asked = task.problems(n)
    options = task.options(seeds, decoding, quiet, "no noise")
    conditions.add("none", evaluate(model, tokenizer, asked, **options))
    for sigma in sigmas:
        for side in ("low", "high"):
            given = Noise(sigma, side, share, ends[side])  # type: ignore[arg-type]
            name = f"{side}-{sigma:g}"
            options = task.options(seeds, decoding, quiet, name)
            conditions.add_intervened(name, evaluate_noisy(model, tokenizer, asked, given, **options))
