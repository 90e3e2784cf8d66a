"""Evaluation: problems times sampling seeds through the one generation path, each response graded by its own verifier.

A row's random numbers are named by its problem and seed, so every method meets the same problems with the same numbers:
that is what the paired comparison in :mod:`reqat.evaluation.statistics` rests on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from reqat.config.errors import ReqatError
from reqat.config.policy import Decoding
from reqat.data import encode_prompt
from reqat.evaluation.likelihood import choose
from reqat.evaluation.outcomes import Outcomes
from reqat.generation.batches import generate
from reqat.tasks import Problem, options_of
from reqat.tasks import verify as verify_by_family
from reqat.tasks.problem_files import Given, grade

if TYPE_CHECKING:
    from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase


def verified(problem: Problem | Given, response: str) -> bool:
    """Whether a response is right: by the verifier of a problem's family, or the answer of a problem of a file.

    Raises `ReqatError` for a problem of a file without one.
    """
    correct = verify_by_family(problem, response) if isinstance(problem, Problem) else grade(problem, response)
    if correct is None:
        raise ReqatError(f"problem {problem.id} has no answer to grade by; give each an `answer`.")
    return correct


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem | Given],
    *,
    seeds: Sequence[int],
    decoding: Decoding | str,
    max_new_tokens: int,
    batch_rows: int | None = None,
    autocast: torch.dtype | None = None,
    eos_id: int | Sequence[int] | None = None,
    processors: LogitsProcessorList | None = None,
    keep_responses: bool = True,
    kept: Path | None = None,
    progress: bool | str = False,
    verify: Callable[[Any, str], bool] = verified,
) -> Outcomes:
    """Generate and grade ``len(problems) * len(seeds)`` responses; rows ordered by problem, then seed.

    The model reads :func:`reqat.data.encode_prompt` of the problem's prompt. The response is decoded without
    special tokens and graded by ``verify(problem, response)``. A response without an end is graded as it stands and
    counted as unfinished. Problems of families with options are answered by likelihood instead
    (:mod:`reqat.evaluation.likelihood`), the same for every seed. The other arguments are those of
    :func:`reqat.generation.batches.generate`.

    Raises:
        ValueError: for no problems or seeds, a repeated problem or seed, several seeds with greedy decoding (they would
            give one response several times: take ``decoding.effective_seeds(seeds)``), and as ``generate`` does.
    """
    decoding = Decoding.parse(decoding) if isinstance(decoding, str) else decoding
    _check(problems, seeds, decoding)
    scored = [problem for problem in problems if isinstance(problem, Problem) and options_of(problem)]
    if scored and processors is not None:
        raise ReqatError(
            f"{scored[0].id}: its family answers by likelihood, which logits processors do not change; leave such "
            "families out"
        )
    chosen = dict(zip(scored, choose(model, tokenizer, scored, autocast=autocast) if scored else [], strict=True))
    asked = [problem for problem in problems if problem not in chosen]
    prompts = [encode_prompt(tokenizer, problem.prompt) for problem in asked]
    generations = (
        generate(
            model,
            tokenizer,
            [prompt for prompt in prompts for _ in seeds],
            seeds=[seed for _ in asked for seed in seeds],
            row_keys=[problem.id for problem in asked for _ in seeds],
            decoding=decoding,
            max_new_tokens=max_new_tokens,
            eos_id=eos_id,
            processors=processors,
            batch_rows=batch_rows,
            autocast=autocast,
            kept=kept,
            progress=progress,
        )
        if asked
        else []
    )
    texts = tokenizer.batch_decode([list(g.token_ids) for g in generations], skip_special_tokens=True) if asked else []
    generated = iter([(text, g.n_tokens, g.finished) for text, g in zip(texts, generations, strict=True)])
    rows = [problem for problem in problems for _ in seeds]
    # A choice takes no random numbers, so it is the same for all seeds.
    answers = [
        (chosen[problem].text, chosen[problem].n_tokens, True) if problem in chosen else next(generated)
        for problem in rows
    ]
    return Outcomes(
        problem_id=tuple(problem.id for problem in rows),
        family=tuple(problem.family for problem in rows),
        seed=np.array([seed for _ in problems for seed in seeds]),
        correct=np.array([verify(problem, text) for problem, (text, _, _) in zip(rows, answers, strict=True)]),
        n_tokens=np.array([n_tokens for _, n_tokens, _ in answers]),
        finished=np.array([finished for _, _, finished in answers]),
        response=tuple(text for text, _, _ in answers) if keep_responses else None,
        metadata={"decoding": str(decoding), "max_new_tokens": str(max_new_tokens)},
    )


def _check(problems: Sequence[Problem | Given], seeds: Sequence[int], decoding: Decoding) -> None:
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
