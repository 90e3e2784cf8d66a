"""Prompt lookup: several tokens a step without a second model, the same tokens as one a step.

Reasoning repeats itself: numbers of the problem, names, whole phrases come back. So the tokens that followed the last
tokens when they stood in the text before are guessed to follow again (prompt lookup decoding, Saxena 2023; the method
of Leviathan et al., arXiv 2211.17192, with a table in place of the small model). The model reads its last token and all
guesses in one pass; each position's token is chosen by the policy as ever, greedily or with the random number of its
step, and guesses count as long as they are what was chosen. What follows the first other token is taken out of the
cache again.

A response is that of :func:`reqat.generation.generate` wherever a token's numbers do not depend on the tokens beside
it: in a packed model on a CPU with ``row`` or ``static`` global scales, bit for bit up to 7 guesses (see
:mod:`reqat.inference.packed_decoder`; more rows than eight a dense head multiplies by PyTorch, whose sums depend on
their number in the last bits, as those of a model that is not packed do everywhere). With ``dynamic`` scales the tokens
of one pass share a scale, and responses differ.

One row alone: a batch has its gain already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from reqat.config.errors import ReqatError
from reqat.config.policy import Decoding
from reqat.generation.batches import Generation, RunningBatch, check_arguments
from reqat.generation.sampling import greedy_tokens, row_state, sample_tokens, uniforms
from reqat.models.modes import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Most guesses a step: beyond, the kernels read the weights more than once, and few guesses hold so long.
MOST_GUESSES = 63
#: Tokens that must have stood before in this order; the longest of these that did is followed.
_NGRAMS = (3, 2)


@dataclass(frozen=True)
class Guessed:
    """A response, and what guessing gave: ``steps`` passes of the model after the prompt's, ``guesses`` tokens read
    ahead in them, ``accepted`` of these in the response."""

    generation: Generation
    steps: int
    guesses: int
    accepted: int

    @property
    def accepted_per_step(self) -> float:
        """Guesses that held, a step; 0 where the response ended with the prompt's pass."""
        return self.accepted / self.steps if self.steps else 0.0


class Table:
    """The text so far, and where each sequence of a few tokens stood last, by what it was followed."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        self.extend(ids)

    def extend(self, ids: Sequence[int]) -> None:
        """Append ``ids``."""
        for token in ids:
            # A sequence is entered when its next token is known, so that a look-up never finds the text's own end.
            for n in _NGRAMS:
                if len(self.ids) >= n:
                    self._after[tuple(self.ids[-n:])] = len(self.ids)
            self.ids.append(token)

    def guess(self, most: int) -> list[int]:
        """At most ``most`` tokens that followed the text's last tokens before; none where they are new."""
        for n in _NGRAMS:
            at = self._after.get(tuple(self.ids[-n:]))
            if at is not None:
                return self.ids[at : at + max(0, most)]
        return []


def generate_with_lookup(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Sequence[int],
    *,
    guesses: int,
    seed: int,
    row_key: str,
    decoding: Decoding,
    max_new_tokens: int,
    eos_id: int | Sequence[int] | None = None,
) -> Guessed:
    """The response to one prompt (token ids), up to ``guesses`` tokens guessed a step; see the module.

    Other arguments as for :func:`reqat.generation.generate`. Raises ReqatError as that does, for ``guesses`` below 1 or
    above 63, and for a policy that follows the text step by step (``reset``).
    """
    eos_ids = check_arguments(
        model, tokenizer, [prompt], [seed], [row_key], decoding, max_new_tokens, eos_id, batch_rows=None
    )
    if not 1 <= guesses <= MOST_GUESSES:
        raise ReqatError(f"prompt lookup of {guesses} tokens: give 1 to {MOST_GUESSES}")
    if decoding.rule is not None:
        raise ReqatError(
            f"prompt lookup with decoding {decoding}: the policy must see each token before the next: take greedy or "
            "sample(...), or leave prompt lookup out"
        )
    state_1 = np.array([row_state(seed, row_key)], dtype=np.uint64)
    with evaluating(model), torch.no_grad():
        batch = RunningBatch(model, [prompt], max_new_tokens, None)
        table, logits_TV = Table(prompt), batch.logits
        read: list[int] = []  # guesses among what the last pass read
        made = steps = guessed = accepted = 0
        while True:
            if decoding.is_greedy:
                chosen = greedy_tokens(logits_TV).tolist()
            else:
                uniforms_T = uniforms(state_1, made, len(logits_TV))[:, 0].to(logits_TV.device)
                chosen = sample_tokens(logits_TV, uniforms_T, decoding.temperature, decoding.top_p).tolist()
            held = next((i for i, guess in enumerate(read) if guess != chosen[i]), len(read))
            new = chosen[: held + 1]
            end = next((i for i, token in enumerate(new) if token in eos_ids), None)
            new = new if end is None else new[: end + 1]
            accepted += min(held, len(new))
            table.extend(new)
            made += len(new)
            if end is not None or made == max_new_tokens:
                break
            batch.forget(len(read) - held)
            read = table.guess(min(guesses, max_new_tokens - made - 1))
            steps, guessed = steps + 1, guessed + len(read)
            logits_TV = batch.step_tokens([new[-1], *read])
    response = table.ids[len(prompt) :]
    ended = response[-1] if end is not None else None
    generation = Generation(tuple(response if ended is None else response[:-1]), ended is not None, ended)
    return Guessed(generation, steps, guessed, accepted)
