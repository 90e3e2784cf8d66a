"""How much sooner prompt lookup gives a response: tokens a second with and without it, one row, in turns.

Timed is the whole response, its prompt's pass included, as one who waits for it sees it. Every prompt is answered
greedily without guesses and with each number of guesses, whoever came first for one prompt last for the next; a packed
model must give the same tokens each time, and how many responses do is recorded beside the times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from reqat.config.errors import ReqatError
from reqat.config.policy import Decoding
from reqat.generation import Generation, generate, generate_with_lookup

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Speculation:
    """Responses with up to ``guesses`` guesses a step (0: none): their tokens, seconds, and passes of the model after
    the prompts'; guesses made and accepted; how many responses are those without guesses."""

    guesses: int
    prompts: int = 0
    tokens: int = 0
    seconds: float = 0.0
    steps: int = 0
    guessed: int = 0
    accepted: int = 0
    same_responses: int = 0
    seconds_each: list[float] = field(default_factory=list)

    def metrics(self) -> dict[str, Any]:
        """For a record; rates beside what they are made of."""
        return vars(self) | {
            "tokens_per_s": self.tokens / self.seconds if self.seconds else None,
            "accepted_per_step": self.accepted / self.steps if self.steps else None,
        }


def measure_speculation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    guesses: Sequence[int],
    *,
    max_new_tokens: int,
    say: Callable[[str], object] = lambda _: None,
) -> list[Speculation]:
    """Answer every prompt (token ids) with each number of guesses, and without; the first entry is without.

    Raises ReqatError without prompts, for a number of guesses below 1, and as generation does.
    """
    if not prompts or any(n < 1 for n in guesses):
        raise ReqatError(f"speculation needs prompts and numbers of guesses from 1 on, got {list(guesses)}")
    found = [Speculation(n) for n in (0, *guesses)]
    greedy: dict[str, Any] = {"decoding": Decoding.greedy(), "max_new_tokens": max_new_tokens}
    generate(model, tokenizer, [prompts[0]], seeds=[0], row_keys=["prompt"], **greedy)  # not timed: the first is slower
    for turn, prompt in enumerate(prompts):
        say(f"speculation: prompt {turn + 1} of {len(prompts)}")
        responses: dict[int, Generation] = {}
        at = turn % len(found)
        for row in [*found[at:], *found[:at]]:
            begun = time.perf_counter()
            if row.guesses == 0:
                (response,) = generate(model, tokenizer, [prompt], seeds=[0], row_keys=["prompt"], **greedy)
                row.steps += response.n_tokens - 1
            else:
                given = generate_with_lookup(
                    model, tokenizer, prompt, guesses=row.guesses, seed=0, row_key="prompt", **greedy
                )
                response = given.generation
                row.steps += given.steps
                row.guessed += given.guesses
                row.accepted += given.accepted
            took = time.perf_counter() - begun
            responses[row.guesses] = response
            row.prompts += 1
            row.tokens += response.n_tokens
            row.seconds += took
            row.seconds_each.append(took)
        for row in found:
            row.same_responses += responses[row.guesses] == responses[0]
    return found
