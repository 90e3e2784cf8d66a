"""Grading under an intervention in decoding: routing between two models, or noise on logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import LogitsProcessorList

from reqat.config.errors import ReqatError
from reqat.evaluation.grading import evaluate
from reqat.evaluation.outcomes import Outcomes
from reqat.generation.interventions import LogitNoise, Noise, Router, Routing

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from reqat.tasks import Problem


@dataclass(frozen=True)
class Intervened:
    """Graded responses, and what the intervention did to them.

    ``touched`` is the share of all tokens that the candidate chose (routing) or that met noise, ``low`` the share of
    tokens below the threshold (None where nothing measured it).
    """

    outcomes: Outcomes
    touched: float
    low: float | None = None


def evaluate_routed(
    reference: PreTrainedModel,
    candidate: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    routing: Routing,
    *,
    autocast: torch.dtype | None = None,
    **options: Any,
) -> Intervened:
    """Grade a routing policy; ``options`` are those of :func:`reqat.evaluation.evaluate`.

    Where one model chooses everything the other is not run: the tokens are those of a plain evaluation, and ``low`` is
    None.

    Raises ``ReqatError`` for vocabularies of different sizes, and as ``evaluate`` does.
    """
    sizes = reference.config.vocab_size, candidate.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ReqatError(
            f"the reference has {sizes[0]} tokens and the candidate {sizes[1]}: route between models of one vocabulary"
        )
    if routing.low == routing.high:
        alone = reference if routing.low == "reference" else candidate
        outcomes = evaluate(alone, tokenizer, problems, autocast=autocast, **options)
        return Intervened(_named(outcomes, routing), float(routing.low == "candidate"))
    router = Router(candidate, routing, autocast=autocast)
    outcomes = evaluate(
        reference, tokenizer, problems, autocast=autocast, processors=LogitsProcessorList([router]), **options
    )
    decided_N2 = np.concatenate(router.decisions(outcomes.n_tokens.tolist()))
    low, theirs = decided_N2.mean(axis=0).tolist()
    return Intervened(_named(outcomes, routing), theirs, low)


def evaluate_noisy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    noise: Noise,
    **options: Any,
) -> Intervened:
    """Grade a model under logit noise; ``options`` are those of :func:`reqat.evaluation.evaluate`. Raises as that."""
    processor = LogitNoise(noise)
    outcomes = evaluate(model, tokenizer, problems, processors=LogitsProcessorList([processor]), **options)
    return Intervened(
        _named(outcomes, noise), float(np.concatenate(processor.decisions(outcomes.n_tokens.tolist())).mean())
    )


def _named(outcomes: Outcomes, intervention: Routing | Noise) -> Outcomes:
    return dataclasses.replace(outcomes, metadata={**outcomes.metadata, "intervention": str(intervention)})
