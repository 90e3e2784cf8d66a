"""Evaluation: problems times sampling seeds through the one generation path, each response graded by its own verifier.

A row's random numbers are named by its problem and seed, so every method meets the same problems with the same numbers:
that is what the paired comparison in :mod:`reqat.evaluation.statistics` rests on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from reqat.config.errors import ReqatError
from reqat.config.policy import Decoding
from reqat.data import encode_prompt
from reqat.evaluation.outcomes import Outcomes
from reqat.generation.batches import generate
from reqat.tasks import Problem
from reqat.tasks import verify as verify_by_family

if TYPE_CHECKING:
    from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    seeds: Sequence[int],
    decoding: Decoding | str,
    max_new_tokens: int,
    batch_rows: int | None = None,
    autocast: torch.dtype | None = None,
    eos_id: int | Sequence[int] | None = None,
    processors: LogitsProcessorList | None = None,
    keep_responses: bool = True,
    progress: bool | str = False,
    verify: Callable[[Problem, str], bool] = verify_by_family,
) -> Outcomes:
    """Generate and grade ``len(problems) * len(seeds)`` responses; rows ordered by problem, then seed.

    The model reads :func:`reqat.data.encode_prompt` of the problem's prompt. The response is decoded without
    special tokens and graded by ``verify(problem, response)``. A response without an end is graded as it stands and
    counted as unfinished. The other arguments are those of :func:`reqat.generation.batches.generate`.

    Raises:
        ValueError: for no problems or seeds, a repeated problem or seed, several seeds with greedy decoding (they would
            give one response several times: take ``decoding.effective_seeds(seeds)``), and as ``generate`` does.
    """
    decoding = Decoding.parse(decoding) if isinstance(decoding, str) else decoding
    _check(problems, seeds, decoding)
    prompts = [encode_prompt(tokenizer, problem.prompt) for problem in problems]
    generations = generate(
        model,
        tokenizer,
        [prompt for prompt in prompts for _ in seeds],
        seeds=[seed for _ in problems for seed in seeds],
        row_keys=[problem.id for problem in problems for _ in seeds],
        decoding=decoding,
        max_new_tokens=max_new_tokens,
        eos_id=eos_id,
        processors=processors,
        batch_rows=batch_rows,
        autocast=autocast,
        progress=progress,
    )
    responses = tokenizer.batch_decode([list(g.token_ids) for g in generations], skip_special_tokens=True)
    rows = [problem for problem in problems for _ in seeds]
    return Outcomes(
        problem_id=tuple(problem.id for problem in rows),
        family=tuple(problem.family for problem in rows),
        seed=np.array([seed for _ in problems for seed in seeds]),
        correct=np.array([verify(problem, text) for problem, text in zip(rows, responses, strict=True)]),
        n_tokens=np.array([g.n_tokens for g in generations]),
        finished=np.array([g.finished for g in generations]),
        response=tuple(responses) if keep_responses else None,
        metadata={"decoding": str(decoding), "max_new_tokens": str(max_new_tokens)},
    )


def _check(problems: Sequence[Problem], seeds: Sequence[int], decoding: Decoding) -> None:
    if not problems or not seeds:
        raise ReqatError(
            f"nothing to evaluate: {len(problems)} problems and {len(seeds)} seeds; give at least one of each"
        )
    for what, values in (("problem", [problem.id for problem in problems]), ("seed", [str(seed) for seed in seeds])):
        repeated = [value for value, count in Counter(values).items() if count > 1]
        if repeated:
            raise ReqatError(f"{what} {', '.join(repeated[:3])} is given more than once; give each {what} once")
    if decoding.is_greedy and len(seeds) > 1:
        raise ReqatError(
            f"greedy decoding gives the same response for all {len(seeds)} seeds {list(seeds)}; pass one seed "
            "(decoding.effective_seeds(seeds))"
        )
