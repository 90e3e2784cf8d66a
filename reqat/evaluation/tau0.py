"""ReSET's threshold ``tau0``: a percentile of the quantized model's token entropies on held-out problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import LogitsProcessorList

from reqat.config.decoding import SAMPLE
from reqat.config.errors import ReqatError
from reqat.config.policy import Decoding
from reqat.evaluation.grading import evaluate
from reqat.generation.reset import EntropyLog

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from reqat.tasks import Problem


@dataclass(frozen=True)
class EntropyQuantile:
    """A percentile of token entropies (nats) with a 95% interval from resampling whole problems.

    With few problems the interval is a hint at best; ``n_problems``, ``n_seeds`` and ``n_tokens`` say what it rests on.
    """

    value: float
    lo: float
    hi: float
    quantile: float
    n_problems: int
    n_seeds: int
    n_tokens: int

    def __str__(self) -> str:
        """Nats, with what they rest on."""
        return (
            f"{self.value:.4f} nats [{self.lo:.4f}, {self.hi:.4f}], {100 * self.quantile:g}th percentile of "
            f"{self.n_tokens:,} tokens ({self.n_problems} problems, {self.n_seeds} sampling seeds)"
        )


def fit_tau0(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    seeds: Sequence[int] = (0,),
    decoding: Decoding | str = SAMPLE,
    max_new_tokens: int,
    quantile: float = 0.8,
    resamples: int = 2000,
    **options: Any,
) -> EntropyQuantile:
    """The ``quantile`` of ``model``'s token entropies while it answers ``problems``: ReSET's ``tau0`` at 0.8.

    Args:
        model: quantized as it will be used.
        problems: held out from the evaluation (the validation split).
        decoding: how the responses are drawn; entropies are those of the raw logits, whatever it is.
        quantile: in (0, 1), interpolated linearly between order statistics.
        resamples: of the bootstrap behind the interval.
        options: of :func:`reqat.evaluation.evaluate` (``batch_rows``, ``autocast``, ``progress``).

    Raises ``ReqatError`` for a quantile out of range, and as ``evaluate`` does.
    """
    if not 0 < quantile < 1:
        raise ReqatError(f"quantile={quantile} must lie between 0 and 1; ReSET's is 0.8")
    recorder = EntropyLog()
    outcomes = evaluate(
        model,
        tokenizer,
        problems,
        seeds=seeds,
        decoding=decoding,
        max_new_tokens=max_new_tokens,
        processors=LogitsProcessorList([recorder]),
        keep_responses=False,
        **options,
    )
    rows = recorder.of_rows(outcomes.n_tokens.tolist())
    S = len(seeds)
    by_problem = [np.concatenate(rows[i : i + S]) for i in range(0, len(rows), S)]
    rng = np.random.default_rng(0)
    draws = rng.integers(len(by_problem), size=(resamples, len(by_problem)))
    lo, hi = np.quantile(
        [np.quantile(np.concatenate([by_problem[i] for i in d]), quantile) for d in draws], [0.025, 0.975]
    )
    everything = np.concatenate(by_problem)
    return EntropyQuantile(
        value=float(np.quantile(everything, quantile)),
        lo=float(lo),
        hi=float(hi),
        quantile=quantile,
        n_problems=len(by_problem),
        n_seeds=S,
        n_tokens=len(everything),
    )
