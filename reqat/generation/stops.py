"""Responses that end at a text: "Question:" after an answer, a blank line, a closing tag.

A model ends its responses with a token; some benchmarks end them with a text instead, which may lie anywhere within
tokens. The processor below looks at the text of each row's last tokens, and lets a row that holds such a text say
nothing but the end-of-sequence token, so that it leaves the batch. The text and what follows it are for the caller to
cut off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import LogitsProcessor

from reqat.config.errors import ReqatError
from reqat.generation.processors import BatchStart

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class StopTexts(LogitsProcessor):
    """Ends a row once its response holds one of ``texts``; a logits processor of :func:`reqat.generation.generate`.

    Where the model has no end-of-sequence token, rows go on to their length limit. Raises ``ReqatError`` for no text
    or an empty one, which every response holds.
    """

    def __init__(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        if not texts or not all(texts):
            raise ReqatError(f"texts that end a response: {list(texts)}; give at least one, and no empty one")
        self.texts, self.tokenizer = tuple(texts), tokenizer
        # A token is a byte at least, and the text may begin and end within tokens.
        self.window = max(len(text.encode()) for text in texts) + 1
        self._prompt_tokens, self._end = 0, -1

    def begin_batch(self, start: BatchStart) -> None:
        """A new batch begins: what is behind its padded prompts is responses."""
        self._prompt_tokens = start.input_ids.shape[1]
        self._end = start.eos_ids[0] if start.eos_ids else -1

    def select_rows(self, index: Tensor) -> None:
        """Rows keep no state."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """``scores`` [B, V]; in rows of ``input_ids`` [B, T] that hold a text, all but the end is -inf."""
        first = max(self._prompt_tokens, input_ids.shape[1] - self.window)
        if self._end < 0 or first == input_ids.shape[1]:
            return scores
        tails = self.tokenizer.batch_decode(input_ids[:, first:], skip_special_tokens=True)
        ended = [any(text in tail for text in self.texts) for tail in tails]
        if not any(ended):
            return scores
        only_end = torch.full_like(scores[0], -torch.inf)
        only_end[self._end] = 0
        return torch.where(torch.tensor(ended, device=scores.device)[:, None], only_end, scores)
