"""Problems of our own generators as data sets of lm-eval: made on the spot, the same ones that our evaluations ask."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from reqat.config.errors import ReqatError
from reqat.tasks import Problem, problems


def dataset(family: str, n_problems: object = 1000, problem_seed: object = 1, **metadata: Any) -> dict[str, Any]:
    """Test problems of a family, as ``custom_dataset`` of a task; :func:`problem_of` gives back each.

    Args:
        family: of `reqat.tasks`.
        n_problems, problem_seed: by ``--metadata``; the defaults are those of a tier (`evaluation.problem_seed`). The
            first ``n`` problems are the same whatever ``n_problems`` is.
        metadata: the family's name gives options of its generator (``{"chain_sum": {"min_terms": 10}}``).

    Raises ReqatError for an unknown family or option, and for more problems than the family has.
    """
    from datasets import Dataset

    for option, value in (("n_problems", n_problems), ("problem_seed", problem_seed)):
        if type(value) is not int or value < 0:
            raise ReqatError(f"--metadata {option}={value!r}: write a whole number")
    options = metadata.get(family) or {}
    if not isinstance(options, Mapping):
        raise ReqatError(f'--metadata {family}={options!r}: write options as JSON, \'{{"{family}": {{"name": 1}}}}\'')
    assert isinstance(n_problems, int) and isinstance(problem_seed, int)
    found = problems({family: options}, "test", n_problems, problem_seed)
    return {"test": Dataset.from_list([_doc(problem) for problem in found])}


def _doc(problem: Problem) -> dict[str, str]:
    return {
        "id": problem.id,
        "prompt": problem.prompt,
        "answer": problem.answer,
        "family": problem.family,
        "question": problem.question,
        # What the family's verifier reads. As text: a data set gives every row the keys of all.
        "entry": json.dumps(problem.entry),
    }


def problem_of(doc: Mapping[str, Any]) -> Problem:
    """The problem that a row of :func:`dataset` was made of."""
    return Problem(doc["id"], doc["family"], doc["question"], doc["answer"], json.loads(doc["entry"]))
