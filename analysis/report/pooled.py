"""Several sets of problems as one: entries of the same models on other problems, joined run by run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.report.cells import Entry, Results
from analysis.report.rows import measured_row
from reqat.config.errors import ReqatError

if TYPE_CHECKING:
    from reqat.evaluation.outcomes import Outcomes
    from reqat.evaluation.statistics import Difference, Estimate


def joined(results: Results, parts: Sequence[Entry]) -> list[Outcomes]:
    """Outcomes of all parts together, one a training seed. Raises `ReqatError` if the parts differ in these, or share a
    problem."""
    from reqat.evaluation.outcomes import Outcomes

    seeds = {part.training_seeds for part in parts}
    if len(seeds) != 1:
        raise ReqatError(f"{parts[0]} and its other sets of problems differ in training seeds: {sorted(seeds)}")
    out = []
    for runs in zip(*(results.outcomes(part) for part in parts), strict=True):
        out.append(
            Outcomes(
                problem_id=tuple(id for run in runs for id in run.problem_id),
                family=tuple(name for run in runs for name in run.family),
                seed=np.concatenate([run.seed for run in runs]),
                correct=np.concatenate([run.correct for run in runs]),
                n_tokens=np.concatenate([run.n_tokens for run in runs]),
                finished=np.concatenate([run.finished for run in runs]),
            )
        )
    return out


def estimate(results: Results, parts: Sequence[Entry]) -> Estimate:
    """Accuracy (a fraction) over the problems of all parts, with its 95% interval."""
    from reqat.evaluation.statistics import accuracy

    return accuracy(joined(results, parts))


def paired(results: Results, a: Sequence[Entry], b: Sequence[Entry]) -> Difference:
    """Accuracy of `a` minus that of `b` over the problems of all parts; the parts of both are on the same sets."""
    from reqat.evaluation.statistics import paired

    cut = [results.common(one, other) for one, other in zip(a, b, strict=True)]
    return paired(*(joined(results, [pair[side] for pair in cut]) for side in (0, 1)))


def pooled_row(results: Results, parts: Sequence[Entry]) -> dict[str, Any]:
    """A row of the tidy CSV: accuracy over the problems of all parts, in percent."""
    e = estimate(results, parts)
    return measured_row(results, parts[0]) | {
        "problems": " ".join(part.problems for part in parts),
        "value": 100 * e.value,
        "lo": 100 * e.lo,
        "hi": 100 * e.hi,
        "unfinished": e.n_unfinished / e.n_responses,
        "n_problems": e.n_problems,
        "evaluations": " ".join(cell.evaluation for part in parts for cell in part.cells),
    }
