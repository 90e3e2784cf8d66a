"""ReSET: the sampling temperature follows the entropy of reasoning steps; low-entropy steps are sampled more greedily.

Quantization moves probability mass into the tail. Where a model is sure, that mass is error, and a low temperature
takes it away; where it weighs alternatives, the mass is exploration, and stays. What counts as sure is decided token by
token, from the entropy ``H_t`` (nats, raw logits):

* ``H_step``, the mean entropy of the reasoning step so far; a step shorter than ``window`` tokens is stood for by the
  last ``window`` tokens, whatever steps they belong to. The current token is in neither. At the first token: ``H_t``.
* ``Hbar``, the mean of all earlier entropies; at the first token ``H_step``.
* The threshold is ``tau0`` where ``H_step <= Hbar`` (a step easier than the trace so far), else ``H_step``.
* The temperature is ``t_high`` where ``H_t >= threshold``, else ``t_low``.

A step ends where the last token's text holds a blank line, or the last two tokens are both a line feed
(:data:`STEP_ENDS` has other ends, for traces without blank lines). ``tau0`` is the 80th percentile of the quantized
model's own token entropies on a few held-out problems: :func:`fit_tau0`.

The state of a row is a few sums, and every decision is made for all rows at once. Means are compared that are often
*equal* by definition (up to token ``window`` the window is the whole trace), so rounding must not decide: entropies
are rounded to 2^-32 nats, whose float64 sums are exact up to two million nats, and every mean is one division of such.

Trade-off: transformers has no hook for rows that beam search reorders or for tokens that an assistant proposes; both
are out of scope. Source: arXiv:2606.13233. That raw logits are those *after* other processors (routing, noise), and
that ``fit_tau0`` samples with the usual policy, is inferred.

Shapes: B rows, V vocabulary, W window, N tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LogitsProcessor

from reqat.config.errors import ReqatError
from reqat.config.policy import ReSETRule
from reqat.generation.distributions import entropy_nats
from reqat.generation.processors import BatchStart

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Entropies are whole multiples of this many nats: sums of them are exact in float64 below 2^53 * 2^-32 nats.
_GRID = 2.0**-32


@dataclass(frozen=True)
class StepEnds:
    """Which tokens end a reasoning step.

    Those whose text holds one of ``holds``, and, where ``doubled`` is given, a token whose text is exactly that after
    another such token.
    """

    holds: tuple[str, ...]
    doubled: str | None = None

    def __post_init__(self) -> None:
        """An empty text is held by every token. Raises ``ReqatError``."""
        if not all(self.holds) or self.doubled == "" or not (self.holds or self.doubled):
            raise ReqatError(f"{self}: give at least one text that ends a step, and no empty one")


STEP_ENDS: Final[Mapping[str, StepEnds]] = {
    "paragraph": StepEnds(("\n\n",), doubled="\n"),
    "line": StepEnds(("\n",)),
    # One-line traces. A decimal point ends a "sentence" too where the tokenizer makes it a token of its own.
    "sentence": StepEnds((".", "?", "!", "\n")),
}


class ReSET(LogitsProcessor):
    """Divides each row's logits by the temperature that ReSET gives it; for transformers' ``generate`` and for ours.

    Args:
        rule: temperatures, threshold, window.
        tokenizer: gives the text of every token, once, for tables of those that end a step.
        step_ends: in place of the rule's named ones.

    A call takes the ids so far [B, T] (left padding is never looked at: at the first token there is no step to end,
    afterwards the last two ids are a row's own) and logits [B, V] of any float dtype, and returns new ones. It goes on
    with the trace of the call before where the ids are those of that call and one more token, else it starts anew;
    :meth:`forget` starts anew even so. Rows that transformers goes on padding after their end have a temperature that
    nobody uses. Ours drops rows, and says so through :meth:`select_rows`.

    Raises ``ReqatError`` for ids and logits of different numbers of rows.
    """

    # The state, of the rows that are left.
    _ids_BT: Tensor | None
    _sum_B: Tensor
    _step_start_B: Tensor
    _step_tokens_B: Tensor
    _earlier_WB: Tensor

    def __init__(
        self, rule: ReSETRule, tokenizer: PreTrainedTokenizerBase, *, step_ends: StepEnds | None = None
    ) -> None:
        self.rule = rule
        self.ends_V, self.doubled_V = _tables(tokenizer, step_ends or STEP_ENDS[rule.step])
        self.forget()

    def forget(self) -> None:
        """The next call begins a new trace."""
        self._ids_BT = None

    def begin_batch(self, start: BatchStart) -> None:
        """A new batch begins."""
        self.forget()

    def select_rows(self, index: Tensor) -> None:
        """Only the rows ``index`` go on, in that order."""
        if self._ids_BT is None:
            return
        self._ids_BT = self._ids_BT[index]
        for name in ("_sum_B", "_step_start_B", "_step_tokens_B"):
            setattr(self, name, getattr(self, name)[index])
        self._earlier_WB = self._earlier_WB[:, index]

    def _begin(self, rows: int, device: torch.device) -> None:
        zeros_B = torch.zeros(rows, dtype=torch.float64, device=device)
        self._tokens = 0  # entropies seen; the same for all rows
        self._sum_B = zeros_B  # of all of them
        self._step_start_B = zeros_B  # the sum where the step began
        self._step_tokens_B = torch.zeros(rows, dtype=torch.int64, device=device)
        self._earlier_WB = zeros_B.new_zeros(self.rule.window, rows)  # the sum before each of the last W tokens
        self.ends_V, self.doubled_V = self.ends_V.to(device), self.doubled_V.to(device)

    def temperatures(self, input_ids: Tensor, entropies_B: Tensor) -> Tensor:
        """The temperature of each row's next token, float64 [B], from its entropy in nats; takes note of both."""
        ids_BT, before = input_ids, self._ids_BT
        goes_on = (
            before is not None
            and ids_BT.shape == (before.shape[0], before.shape[1] + 1)
            and ids_BT.device == before.device
            and torch.equal(ids_BT[:, :-1], before)
        )
        if not goes_on:
            self._begin(len(ids_BT), ids_BT.device)
        self._ids_BT = ids_BT
        rule, t, W = self.rule, self._tokens, self.rule.window
        entropies_B = (entropies_B.double() / _GRID).round_() * _GRID
        if t == 0:
            step_B = mean_B = entropies_B
        else:
            ended_B = self.ends_V[ids_BT[:, -1]]
            if ids_BT.shape[1] > 1:
                ended_B = ended_B | (self.doubled_V[ids_BT[:, -1]] & self.doubled_V[ids_BT[:, -2]])
            self._step_start_B = torch.where(ended_B, self._sum_B, self._step_start_B)
            self._step_tokens_B = self._step_tokens_B.masked_fill(ended_B, 0)
            # Until the ring is full, its next slot still holds the 0 before the first token.
            window_B = (self._sum_B - self._earlier_WB[t % W]) / min(t, W)
            within_B = (self._sum_B - self._step_start_B) / self._step_tokens_B.clamp(min=1)
            step_B = torch.where(self._step_tokens_B < W, window_B, within_B)
            mean_B = self._sum_B / t
        threshold_B = torch.where(step_B <= mean_B, rule.tau0, step_B)
        self._earlier_WB[t % W] = self._sum_B
        self._sum_B = self._sum_B + entropies_B
        self._step_tokens_B = self._step_tokens_B + 1
        self._tokens = t + 1
        high = entropies_B.new_tensor(rule.t_high)
        return torch.where(entropies_B >= threshold_B, high, rule.t_low)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Tempered logits, [B, V] in the dtype of ``scores``."""
        if len(input_ids) != len(scores):
            raise ReqatError(f"ReSET got ids of {len(input_ids)} rows and logits of {len(scores)}")
        if scores.shape[-1] > len(self.ends_V):
            self._widen(scores.shape[-1])
        temperatures_B1 = self.temperatures(input_ids, entropy_nats(scores))[:, None]
        return scores / temperatures_B1.to(scores.dtype)

    def _widen(self, vocabulary: int) -> None:
        """Models pad their vocabulary with tokens that have no text, and end no step."""
        more = vocabulary - len(self.ends_V)
        self.ends_V, self.doubled_V = (
            torch.nn.functional.pad(table, (0, more)) for table in (self.ends_V, self.doubled_V)
        )


def _tables(tokenizer: PreTrainedTokenizerBase, ends: StepEnds) -> tuple[Tensor, Tensor]:
    """Of each token, whether its text ends a step, and whether it is the text that does so when doubled; bool [V]."""
    texts = tokenizer.batch_decode(
        [[token] for token in range(len(tokenizer))], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    holds = [any(mark in text for mark in ends.holds) for text in texts]
    return torch.tensor(holds), torch.tensor([text == ends.doubled for text in texts])


class EntropyLog:
    """A logits processor that changes nothing and keeps every row's token entropies, whatever batches it comes in."""

    def __init__(self) -> None:
        self._steps: list[tuple[NDArray[np.int64], Tensor]] = []

    def begin_batch(self, start: BatchStart) -> None:
        """A new batch begins."""
        self._rows = np.array(start.rows, dtype=np.int64)

    def select_rows(self, index: Tensor) -> None:
        """Only the rows ``index`` go on."""
        self._rows = self._rows[index.cpu().numpy()]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``scores`` as they are."""
        self._steps.append((self._rows, entropy_nats(scores).cpu()))
        return scores

    def of_rows(self, n_tokens: Sequence[int]) -> list[NDArray[np.float32]]:
        """Entropies of each row of the call to ``generate``, cut to its ``n_tokens`` (its end included)."""
        return collect_rows(self._steps, n_tokens)


def collect_rows(steps: Sequence[tuple[NDArray[np.int64], Tensor]], n_tokens: Sequence[int]) -> list[NDArray[Any]]:
    """Row by row what was noted step by step: (rows of the step, one value each), cut to each row's ``n_tokens``.

    A finished row stays in its batch for a while, and what is noted of it then is no token of its own.
    """
    rows = np.concatenate([rows for rows, _ in steps]) if steps else np.empty(0, dtype=np.int64)
    values = torch.cat([values for _, values in steps]).numpy() if steps else np.empty(0, dtype=np.float32)
    order = np.argsort(rows, kind="stable")  # by row, steps in order
    starts = np.searchsorted(rows[order], np.arange(len(n_tokens)))
    return [values[order[start : start + n]] for start, n in zip(starts.tolist(), n_tokens, strict=True)]
