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
from reqat.evaluation.forcing import Row, batches_by_length, forced_hidden, forced_logits, logits_of
from reqat.models import check_length, check_token_ids
from reqat.models.modes import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens of a batch: at most so many, and at most so many bytes of one model's logits in float32.
_BATCH_TOKENS = 8192
_BATCH_BYTES = 256 * 2**20
_KEPT_BYTES = 2**30  # of a reference's hidden states
_FLOAT64_BYTES = 2**21  # of the logits that are compared at a time
SUMS = ("tokens_low", "tokens_high", "nll_low", "nll_high", "kl_low", "kl_high")
"""Columns of `likelihood_sums` besides what names a trace."""
Told = Callable[[int], object]
"""Called with the tokens of each batch."""


class Reference:
    """A model that others are held against. It reads the traces once, when it is made, and keeps what its output head
    needs for the logits, up to a gigabyte; what does not fit is read again.

    Attributes: `entropies`, in nats, of the distribution before each response token, one float32 array [tokens] a
    trace; `batches`, numbers of traces of like length and what is read of them.
    """

    @torch.no_grad()
    def __init__(
        self, model: PreTrainedModel, traces: Sequence[ForcedTrace], *, autocast: torch.dtype | None = None
    ) -> None:
        """Read ``traces``, under ``torch.autocast`` where ``autocast`` is a dtype.

        Raises `ReqatError` naming the trace that the model cannot read, or whose distributions are not finite.
        """
        self.model, self.traces, self.autocast = model, traces, autocast
        _check(traces, model)
        self.batches = list(_batches(traces, model.config.vocab_size))
        self.entropies: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(traces)
        self._kept: dict[int, Tensor] = {}  # number of a batch -> [N, H]
        with evaluating(model):
            for number, (batch, rows) in enumerate(self.batches):
                parts = [entropy_nats(logits_NV).cpu() for _, logits_NV, _ in self.logits(number)]
                for i, entropy in zip(batch, torch.cat(parts).split(_lengths(rows)), strict=True):
                    self.entropies[i] = entropy.numpy()
                    _finite(entropy.numpy(), traces[i], "reference")

    @torch.no_grad()
    def logits(self, number: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The logits of the batch of that number, as `forced_logits` gives them; the model is in evaluation mode."""
        _, rows = self.batches[number]
        hidden_NH = self._kept.get(number)
        if hidden_NH is None:
            hidden_NH = forced_hidden(self.model, rows, self.autocast)
            if sum(one.nbytes for one in self._kept.values()) + hidden_NH.nbytes <= _KEPT_BYTES:
                self._kept[number] = hidden_NH.cpu()
        return logits_of(self.model, hidden_NH.to(self.model.device), rows, self.autocast)


@torch.no_grad()
def likelihood_sums(
    model: PreTrainedModel, reference: Reference, threshold_nats: float, *, told: Told | None = None
) -> pd.DataFrame:
    """A row a trace of the reference's, in order: `problem`, `family`, and sums over its response tokens (`SUMS`).

    `nll` is the negative log-likelihood under ``model``, `kl` the forward divergence ``KL(reference || model)``, both
    in nats (float64); `tokens` counts. `low` are the tokens where the reference's entropy is below
    ``threshold_nats``, `high` the others. Of logits, one batch's are in memory.

    Raises `ReqatError` for models of different vocabularies, a trace that a model cannot read, or a likelihood that is
    not finite, naming the trace.
    """
    traces, widths = reference.traces, (model.config.vocab_size, reference.model.config.vocab_size)
    if widths[0] != widths[1]:
        raise ReqatError(
            f"the model has {widths[0]} logits, the reference {widths[1]}; compare models of one tokenizer and one "
            "width."
        )
    _check(traces, model)
    sums = np.zeros((len(traces), len(SUMS)))
    with evaluating(model, reference.model):
        for number, (batch, rows) in enumerate(reference.batches):
            # One after the other: a forward pass under autocast is a region of its own.
            theirs_NV = torch.cat([logits_NV for _, logits_NV, _ in reference.logits(number)])
            nll, kl = [], []
            for first, logits_NV, tokens_N in forced_logits(model, rows, reference.autocast):
                nll_N, kl_N = compared(theirs_NV[first : first + len(logits_NV)], logits_NV, tokens_N)
                nll.append(nll_N.cpu())
                kl.append(kl_N.cpu())
            lengths = _lengths(rows)
            pieces = zip(batch, torch.cat(nll).split(lengths), torch.cat(kl).split(lengths), strict=True)
            for i, nll_N, kl_N in pieces:
                _finite((nll_N + kl_N).numpy(), traces[i], "model")
                low_N = reference.entropies[i] < threshold_nats
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
    found = [_compared(theirs_NV[piece], logits_NV[piece], tokens_N[piece]) for piece in _pieces(logits_NV)]
    return torch.cat([nll_N for nll_N, _ in found]), torch.cat([kl_N for _, kl_N in found])


def _pieces(logits_NV: Tensor) -> list[slice]:
    """A few tokens at a time: on a CPU their float64 then stays in the cache, which is four times as fast.

    None is a token by itself, unless there is one alone: its sum would be split among threads, to other bits.
    """
    N, V = logits_NV.shape
    few = max(2, _FLOAT64_BYTES // (8 * V)) if logits_NV.is_cpu else N
    starts = list(range(0, max(1, N - 1), few))
    return [slice(low, high) for low, high in zip(starts, [*starts[1:], N], strict=True)]


def _compared(theirs_NV: Tensor, logits_NV: Tensor, tokens_N: Tensor) -> tuple[Tensor, Tensor]:
    log_q_NV = logits_NV.double().log_softmax(dim=-1)
    log_p_NV = theirs_NV.double().log_softmax(dim=-1)
    p_NV = log_p_NV.exp()
    # A token that the reference rules out (-inf) adds nothing.
    kl_N = torch.where(p_NV > 0, p_NV * (log_p_NV - log_q_NV), 0.0).sum(dim=-1)
    return -log_q_NV.gather(-1, tokens_N[:, None])[:, 0], kl_N


def _lengths(rows: Sequence[Row]) -> list[int]:
    return [len(response) for _, response in rows]


def _check(traces: Sequence[ForcedTrace], model: PreTrainedModel) -> None:
    for trace in traces:
        if not trace.prompt_ids or not trace.response_ids:
            raise ReqatError(f"{trace.info.name}: an empty prompt or response; give each at least one token.")
        check_token_ids(model, (*trace.prompt_ids, *trace.response_ids), trace.info.name)
        check_length(model.config, _size(trace), trace.info.name)


def _size(trace: ForcedTrace) -> int:
    return len(trace.prompt_ids) + len(trace.response_ids) - 1


def _batches(traces: Sequence[ForcedTrace], width: int) -> Iterator[tuple[list[int], list[Row]]]:
    """Indices of traces of like length, and what is read of them, where a token has ``width`` logits."""
    fitting = max(1, _BATCH_BYTES // (4 * width))
    for batch in batches_by_length([_size(trace) for trace in traces], min(_BATCH_TOKENS, fitting)):
        yield batch, [(traces[i].prompt_ids, traces[i].response_ids) for i in batch]


def _finite(values_N: NDArray[Any], trace: ForcedTrace, who: str) -> None:
    bad_N = ~np.isfinite(values_N)
    if bad_N.any():
        raise ReqatError(
            f"{trace.info.name}: the {who}'s distribution at position {int(bad_N.argmax())} is not finite "
            f"({int(bad_N.sum())} of {len(bad_N)} positions); look for NaN weights or a diverged run."
        )
