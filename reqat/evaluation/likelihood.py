"""Likelihood of given texts: log-likelihoods of continuations, choice among options, perplexity.

A problem whose family names :meth:`~reqat.tasks.Family.options` is not answered by generation: the model chooses the
option that it finds most likely after the prompt, by the sum of log-probabilities of its tokens (as ``acc`` of
lm-eval). Everything is of the raw logits at temperature 1, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reqat.config.errors import ReqatError
from reqat.data import encode_prompt
from reqat.evaluation.forcing import Row, batches_by_length, forced_logits
from reqat.models import check_length, check_token_ids
from reqat.models.modes import evaluating
from reqat.tasks import Problem, options_of

_BATCH_TOKENS = 8192


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel,
    rows: Sequence[Row],
    *,
    batch_tokens: int = _BATCH_TOKENS,
    autocast: torch.dtype | None = None,
) -> NDArray[np.float64]:
    """Log-likelihood in nats of each continuation given what precedes it, summed over its tokens in float64; [rows].

    ``rows`` are (token ids read, token ids of the continuation), neither of them empty. Raises ``ReqatError`` for an
    empty part, an unknown token id, a row that is too long for the model, or a likelihood that is NaN.
    """
    for i, (prompt, continuation) in enumerate(rows):
        if not prompt or not continuation:
            raise ReqatError(
                f"row {i}: {len(prompt)} tokens to read and {len(continuation)} to score; give one of each"
            )
        check_token_ids(model, (*prompt, *continuation), f"row {i}")
        check_length(model.config, len(prompt) + len(continuation) - 1, f"row {i}")
    out = np.empty(len(rows), dtype=np.float64)
    sizes = [len(prompt) + len(continuation) - 1 for prompt, continuation in rows]
    with evaluating(model):
        for batch in batches_by_length(sizes, batch_tokens):
            chosen = [rows[i] for i in batch]
            parts: list[Tensor] = []
            for _, logits_NV, tokens_N in forced_logits(model, chosen, autocast):
                picked_N = logits_NV.log_softmax(dim=-1).gather(-1, tokens_N[:, None])[:, 0]
                parts.append(picked_N.double().cpu())
            lengths = [len(continuation) for _, continuation in chosen]
            out[batch] = [float(part.sum()) for part in torch.cat(parts).split(lengths)]
    if np.isnan(out).any():  # the first of several options would be chosen without a word
        raise ReqatError(
            f"row {int(np.isnan(out).argmax())}: its likelihood is NaN: check the model's weights for NaN and infinity"
        )
    return out


@dataclass(frozen=True)
class Choice:
    """The option that a model finds most likely: its text, its tokens, and the log-likelihood of every option, nats."""

    text: str
    n_tokens: int
    nats: tuple[float, ...]


def choose(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    autocast: torch.dtype | None = None,
) -> list[Choice]:
    """The most likely option of each problem (of equally likely ones the first). Raises as :func:`log_likelihoods`."""
    rows: list[Row] = []
    texts = [options_of(problem) for problem in problems]
    for problem, options in zip(problems, texts, strict=True):
        prompt = encode_prompt(tokenizer, problem.prompt)
        rows += [(prompt, tokenizer(option, add_special_tokens=False)["input_ids"]) for option in options]
    nats = iter(log_likelihoods(model, rows, autocast=autocast).tolist())
    lengths = iter([len(continuation) for _, continuation in rows])
    out = []
    for options in texts:
        found = [(next(nats), next(lengths), text) for text in options]
        best = max(found, key=lambda option: option[0])
        out.append(Choice(best[2], best[1], tuple(value for value, _, _ in found)))
    return out


def perplexity(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    *,
    batch_tokens: int = _BATCH_TOKENS,
    autocast: torch.dtype | None = None,
) -> float:
    """``exp`` of the mean negative log-likelihood (nats) of every token but the first of each sequence of token ids.

    Raises as :func:`log_likelihoods`; a sequence has two tokens at least.
    """
    rows: list[Row] = [(sequence[:1], sequence[1:]) for sequence in sequences]
    if not rows:
        raise ReqatError("perplexity of no sequences; give one at least")
    total = log_likelihoods(model, rows, batch_tokens=batch_tokens, autocast=autocast).sum()
    return math.exp(-float(total) / sum(len(sequence) - 1 for sequence in sequences))
