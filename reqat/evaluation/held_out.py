"""How likely a model finds solutions that it never saw, and how far it is from a reference, token by token.

Accuracies of two methods differ by points that hundreds of problems hardly tell apart; the likelihood of verified
solutions is a mean over tens of thousands of tokens and separates the same methods with a tenth of the noise. It is
taken apart at the reference's entropies, because ReQAT's argument is about the tokens where a model is nearly sure: the
low-entropy ones, below a percentile. The same division holds for all models, or their means would be of other tokens.

The second number is the forward divergence ``KL(reference || model)`` of the next-token distributions. A model can be
likelier than its reference and still be another model; distillation aims at the divergence, fine-tuning at the
likelihood.

Everything is of raw logits at temperature 1, in nats, summed in float64 within a trace: a trace is one observation.
Shapes: N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from reqat.config.errors import ReqatError
from reqat.decoding.distributions import entropy_nats
from reqat.evaluation.entropies import ForcedTrace
from reqat.evaluation.forcing import batches_by_length, forced_logits
from reqat.models import check_length, check_token_ids
from reqat.models.modes import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens of a batch: at most so many, and at most so many bytes of one model's logits in float32.
_BATCH_TOKENS = 8192
_BATCH_BYTES = 256 * 2**20
SUMS = ("tokens_low", "tokens_high", "nll_low", "nll_high", "kl_low", "kl_high")
"""Columns of `likelihood_sums` besides what names a trace."""
Told = Callable[[int], object]
"""Called with the tokens of each batch."""


@torch.no_grad()
def reference_entropies(
    model: PreTrainedModel,
    traces: Sequence[ForcedTrace],
    *,
    autocast: torch.dtype | None = None,
    told: Told | None = None,
) -> list[NDArray[np.float32]]:
    """Entropy in nats of the distribution before each response token, one array [tokens] a trace.

    Raises `ReqatError` naming the trace that a model cannot read, or whose distributions are not finite.
    """
    out: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(traces)
    with evaluating(model):
        for batch, rows in _batches(traces, [model]):
            parts = [entropy_nats(logits_NV).cpu() for _, logits_NV, _ in forced_logits(model, rows, autocast)]
            lengths = [len(response) for _, response in rows]
            for i, entropy in zip(batch, torch.cat(parts).split(lengths), strict=True):
                out[i] = entropy.numpy()
                _finite(entropy.numpy(), traces[i], "reference")
            if told is not None:
                told(sum(lengths))
    return out


@torch.no_grad()
def likelihood_sums(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    traces: Sequence[ForcedTrace],
    entropies: Sequence[NDArray[np.float32]],
    threshold_nats: float,
    *,
    autocast: torch.dtype | None = None,
    told: Told | None = None,
) -> pd.DataFrame:
    """A row a trace, in order: `problem`, `family`, and sums over its response tokens (`SUMS`).

    `nll` is the negative log-likelihood under ``model``, `kl` the forward divergence ``KL(reference || model)``, both
    in nats (float64); `tokens` counts. `low` are the tokens where the reference's entropy is below
    ``threshold_nats``, `high` the others. Both models read a batch together; only its logits are in memory.

    Raises `ReqatError` for models of different vocabularies, a trace that a model cannot read, or a likelihood that is
    not finite, naming the trace.
    """
    if model.config.vocab_size != reference.config.vocab_size:
        raise ReqatError(
            f"the model has {model.config.vocab_size} logits, the reference {reference.config.vocab_size}; compare "
            "models of one tokenizer and one width."
        )
    sums = np.zeros((len(traces), len(SUMS)))
    with evaluating(model, reference):
        for batch, rows in _batches(traces, [reference, model]):
            # One after the other: a forward pass under autocast is a region of its own.
            theirs_NV = torch.cat([logits_NV for _, logits_NV, _ in forced_logits(reference, rows, autocast)])
            nll, kl = [], []
            for first, logits_NV, tokens_N in forced_logits(model, rows, autocast):
                nll_N, kl_N = compared(theirs_NV[first : first + len(logits_NV)], logits_NV, tokens_N)
                nll.append(nll_N.cpu())
                kl.append(kl_N.cpu())
            lengths = [len(response) for _, response in rows]
            pieces = zip(batch, torch.cat(nll).split(lengths), torch.cat(kl).split(lengths), strict=True)
            for i, nll_N, kl_N in pieces:
                _finite((nll_N + kl_N).numpy(), traces[i], "model")
                low_N = entropies[i] < threshold_nats
                split = [x[mask].sum() for x in (nll_N.numpy(), kl_N.numpy()) for mask in (low_N, ~low_N)]
                sums[i] = [low_N.sum(), (~low_N).sum(), *split]
            if told is not None:
                told(sum(lengths))
    found = pd.DataFrame(sums, columns=list(SUMS)).astype({"tokens_low": "int64", "tokens_high": "int64"})
    found.insert(0, "family", [trace.info.family for trace in traces])
    found.insert(0, "problem", [trace.info.problem for trace in traces])
    return found


def compared(theirs_NV: Tensor, logits_NV: Tensor, tokens_N: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each token, and the divergence from the reference's logits; float64 [N]."""
    log_q_NV = logits_NV.double().log_softmax(dim=-1)
    log_p_NV = theirs_NV.double().log_softmax(dim=-1)
    p_NV = log_p_NV.exp()
    # A token that the reference rules out (-inf) adds nothing.
    kl_N = torch.where(p_NV > 0, p_NV * (log_p_NV - log_q_NV), 0.0).sum(dim=-1)
    return -log_q_NV.gather(-1, tokens_N[:, None])[:, 0], kl_N


def _batches(traces: Sequence[ForcedTrace], models: Sequence[PreTrainedModel]) -> Iterator[tuple[list[int], list[Any]]]:
    """Indices of traces of like length, and what is read of them; each trace checked before any is read."""
    sizes = [len(trace.prompt_ids) + len(trace.response_ids) - 1 for trace in traces]
    for trace, size in zip(traces, sizes, strict=True):
        if not trace.prompt_ids or not trace.response_ids:
            raise ReqatError(f"{trace.info.name}: an empty prompt or response; give each at least one token.")
        for model in models:
            check_token_ids(model, (*trace.prompt_ids, *trace.response_ids), trace.info.name)
            check_length(model.config, size, trace.info.name)
    fitting = max(1, _BATCH_BYTES // (4 * int(models[0].config.vocab_size)))
    for batch in batches_by_length(sizes, min(_BATCH_TOKENS, fitting)):
        yield batch, [(traces[i].prompt_ids, traces[i].response_ids) for i in batch]


def _finite(values_N: NDArray[Any], trace: ForcedTrace, who: str) -> None:
    bad_N = ~np.isfinite(values_N)
    if bad_N.any():
        raise ReqatError(
            f"{trace.info.name}: the {who}'s distribution at position {int(bad_N.argmax())} is not finite "
            f"({int(bad_N.sum())} of {len(bad_N)} positions); look for NaN weights or a diverged run."
        )
