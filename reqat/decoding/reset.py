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
(:data:`STEP_ENDS` has other ends, for traces without blank lines).

The state of a row is a few sums, and every decision is made for all rows at once, however many tokens each has. Means
are compared that are often *equal* by definition (up to token ``window`` the window is the whole trace), so rounding
must not decide: entropies are rounded to 2^-32 nats, whose float64 sums are exact up to two million nats, and every
mean is one division of such.

Source: arXiv:2606.13233. That raw logits are those *after* other processors (routing, noise) is inferred.

Shapes: B rows, V vocabulary, W window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from reqat.config.errors import ReqatError
from reqat.config.policy import ReSETRule

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


def step_tables(tokenizer: Any, ends: StepEnds) -> tuple[Tensor, Tensor]:
    """Of each token of a Hugging Face tokenizer, whether its text ends a step, and whether it is the text that does so
    when doubled; bool [V]."""
    texts = tokenizer.batch_decode(
        [[token] for token in range(len(tokenizer))], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    holds = [any(mark in text for mark in ends.holds) for text in texts]
    return torch.tensor(holds), torch.tensor([text == ends.doubled for text in texts])


@dataclass(eq=False)
class ResetState:
    """What ReSET remembers of each of B rows. Every tensor has the rows last; :meth:`begin` makes it."""

    tokens_B: Tensor  # int64: entropies seen
    sum_B: Tensor  # float64: of all of them
    step_start_B: Tensor  # float64: the sum where the step began
    step_tokens_B: Tensor  # int64: those of the step
    earlier_WB: Tensor  # float64: the sum before each of the last W tokens, a ring

    @classmethod
    def begin(cls, rows: int, window: int, device: torch.device | str = "cpu") -> ResetState:
        """The state of ``rows`` rows of which nothing was seen."""
        zeros_B = torch.zeros(rows, dtype=torch.float64, device=device)
        none_B = torch.zeros(rows, dtype=torch.int64, device=device)
        return cls(none_B, zeros_B, zeros_B, none_B, zeros_B.new_zeros(window, rows))

    def rows(self, index: Tensor) -> ResetState:
        """The state of the rows ``index`` alone, in that order."""
        return ResetState(*(tensor[..., index] for tensor in vars(self).values()))

    @classmethod
    def joined(cls, states: list[ResetState]) -> ResetState:
        """The rows of several states of one window, one after the other."""
        return cls(*(torch.cat(parts, -1) for parts in zip(*(vars(state).values() for state in states), strict=True)))

    def temperatures(self, rule: ReSETRule, entropies_B: Tensor, ended_B: Tensor) -> Tensor:
        """The temperature of each row's next token, float64 [B]; takes note of its entropy.

        ``entropies_B`` are nats; ``ended_B`` says whether the tokens before ended a step (ignored of a first token).
        """
        W, t_B = rule.window, self.tokens_B
        entropies_B = (entropies_B.double() / _GRID).round_() * _GRID
        self.step_start_B = torch.where(ended_B, self.sum_B, self.step_start_B)
        self.step_tokens_B = self.step_tokens_B.masked_fill(ended_B, 0)
        slot_1B = (t_B % W)[None]
        # Until the ring is full, its next slot still holds the 0 before the first token.
        window_B = (self.sum_B - self.earlier_WB.gather(0, slot_1B)[0]) / t_B.clamp(1, W)
        within_B = (self.sum_B - self.step_start_B) / self.step_tokens_B.clamp(min=1)
        first_B = t_B == 0
        step_B = torch.where(first_B, entropies_B, torch.where(self.step_tokens_B < W, window_B, within_B))
        mean_B = torch.where(first_B, entropies_B, self.sum_B / t_B.clamp(min=1))
        threshold_B = torch.where(step_B <= mean_B, rule.tau0, step_B)
        self.earlier_WB = self.earlier_WB.scatter(0, slot_1B, self.sum_B[None])
        self.sum_B = self.sum_B + entropies_B
        self.step_tokens_B = self.step_tokens_B + 1
        self.tokens_B = t_B + 1
        high = entropies_B.new_tensor(rule.t_high)
        return torch.where(entropies_B >= threshold_B, high, rule.t_low)
