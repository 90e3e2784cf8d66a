"""ReSET (:mod:`reqat.decoding.reset`) as a logits processor, and what fits its threshold.

``tau0`` is the 80th percentile of the quantized model's own token entropies on a few held-out problems:
:func:`reqat.evaluation.tau0.fit_tau0`. That it samples with the usual policy is inferred.

Trade-off: transformers has no hook for rows that beam search reorders or for tokens that an assistant proposes; both
are out of scope. Source: arXiv:2606.13233.

Shapes: B rows, V vocabulary, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LogitsProcessor

from reqat.config.errors import ReqatError
from reqat.config.policy import ReSETRule
from reqat.decoding import STEP_ENDS, ResetState, StepEnds, entropy_nats, step_tables
from reqat.generation.processors import BatchStart

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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

    _ids_BT: Tensor | None  # of the call before, of the rows that are left
    _state: ResetState

    def __init__(
        self, rule: ReSETRule, tokenizer: PreTrainedTokenizerBase, *, step_ends: StepEnds | None = None
    ) -> None:
        self.rule = rule
        self.ends_V, self.doubled_V = step_tables(tokenizer, step_ends or STEP_ENDS[rule.step])
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
        self._ids_BT, self._state = self._ids_BT[index], self._state.rows(index)

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
            self._state = ResetState.begin(len(ids_BT), self.rule.window, ids_BT.device)
            self.ends_V, self.doubled_V = self.ends_V.to(ids_BT.device), self.doubled_V.to(ids_BT.device)
        self._ids_BT = ids_BT
        ended_B = torch.zeros(len(ids_BT), dtype=torch.bool, device=ids_BT.device)
        if goes_on:  # before the first token there may be no id to look at (a prompt of embeddings)
            ended_B = self.ends_V[ids_BT[:, -1]]
        if goes_on and ids_BT.shape[1] > 1:
            ended_B = ended_B | (self.doubled_V[ids_BT[:, -1]] & self.doubled_V[ids_BT[:, -2]])
        return self._state.temperatures(self.rule, entropies_B, ended_B)

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
