"""Scores of k responses to one problem, by our own graders.

lm-eval averages what :func:`score` returns over problems and takes the standard error of that mean. Since each number
is of one problem, whatever k is, the error is clustered by problem.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reqat.lm_eval.generated import problem_of
from reqat.tasks import get_family, verify
from reqat.tasks.answers import announced, grade, same_answer


def keep_all(responses: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A filter of lm-eval: every response to every problem."""
    return [list(of_one) for of_one in responses]


def graded(doc: Mapping[str, Any], response: str) -> tuple[str | None, bool]:
    """The answer that a response to a row of a task gives, if any, and whether it is right.

    Rows of our generators are graded by their family's verifier, others by :mod:`reqat.tasks.answers`, those that are
    ``boxed`` by what is in the last box.
    """
    if "entry" not in doc:
        boxed = bool(doc.get("boxed"))
        return announced(response, boxed=boxed), grade(response, doc["answer"], boxed=boxed)
    return get_family(doc["family"]).extract(response), verify(problem_of(doc), response)


def score(doc: Mapping[str, Any], results: Sequence[Sequence[str]]) -> dict[str, float]:
    """``process_results`` of a task: share of right responses, whether any is right, whether the majority is.

    The majority is the answer that most responses give; of several, the one that was given first. Answers are told
    apart as they are graded (1/2 and 0.5 are one). Responses without an answer have no vote.
    """
    (responses,) = results
    found = [graded(doc, response) for response in responses]
    right = [is_right for _, is_right in found]
    votes: list[list[Any]] = []  # answer, whether it is right, votes
    for answer, is_right in found:
        if answer is None:
            continue
        same = next((vote for vote in votes if vote[0] == answer or same_answer(answer, vote[0])), None)
        if same is None:
            votes.append([answer, is_right, 1])
        else:
            same[2] += 1
    winner = max(votes, key=lambda vote: vote[2], default=None)  # the first of equals
    return {
        "avg@k": sum(right) / len(right),
        "pass@k": float(any(right)),
        "maj@k": float(winner is not None and winner[1]),
    }
