"""Routed decoding and logit noise, graded condition by condition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from reqat.config.decoding import SAMPLE, Threshold

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reqat.pipeline.conditions import Conditions
from reqat.pipeline.task import Grading


def nats(text: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, grading: Grading) -> float:
    """A threshold: nats as they are, or `p75`, the percentile of the model's entropies on held-out problems."""
    threshold = Threshold.parse(text)
    if not threshold.is_percentile:
        return threshold.value
    return entropy_percentile(threshold.value, model, tokenizer, grading)


def entropy_percentile(
    percentile: float, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, grading: Grading
) -> float:
    """A percentile of the model's entropies (nats) on the held-out problems, sampled once each."""
    from reqat.evaluation.tau0 import fit_tau0

    options = grading.options("measuring entropies", SAMPLE, [0])
    found = fit_tau0(model, tokenizer, grading.validation(), quantile=percentile / 100, **options)
    print(f"threshold p{percentile:g}: {found}", flush=True)
    return found.value


def grade_routes(
    conditions: Conditions,
    reference: PreTrainedModel,
    candidate: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    grading: Grading,
    names: Sequence[str],
    threshold_nats: float,
) -> None:
    """Grade each of the routing policies `names`."""
    from reqat.evaluation.intervened import evaluate_routed
    from reqat.generation.interventions import policies

    problems, given = grading.problems(), policies(threshold_nats)
    for name in names:
        told = grading.options(name)
        conditions.grade(name, partial(evaluate_routed, reference, candidate, tokenizer, problems, given[name], **told))


def noise_ends(
    by: str, share: float, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, grading: Grading
) -> dict[str, float | None]:
    """Below and above which entropy (nats) a decision meets noise; None where each step's batch says it."""
    ends: dict[str, float | None] = {"low": None, "high": None}
    if by == "percentile":
        for side, percentile in (("low", 100 * share), ("high", 100 * (1 - share))):
            ends[side] = entropy_percentile(percentile, model, tokenizer, grading)
    return ends


def grade_noise(
    conditions: Conditions,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    grading: Grading,
    sigmas: Sequence[float],
    share: float,
    ends: Mapping[str, float | None],
) -> None:
    """Grade no noise, and noise of every size at either end."""
    from reqat.evaluation import evaluate
    from reqat.evaluation.intervened import evaluate_noisy
    from reqat.generation.interventions import Noise

    problems = grading.problems()
    conditions.grade("none", partial(evaluate, model, tokenizer, problems, **grading.options("no noise")))
    for sigma in sigmas:
        for side in ("low", "high"):
            given = Noise(sigma, side, share, ends[side])  # type: ignore[arg-type]
            name = f"{side}-{sigma:g}"
            told = grading.options(name)
            conditions.grade(name, partial(evaluate_noisy, model, tokenizer, problems, given, **told))
