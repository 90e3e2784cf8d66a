"""Responses that the candidate got wrong and the reference right: what first went wrong, and how sure the reference was
of the token there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.entropy.divergences import first_divergences, shares_below
from analysis.entropy.frames import frame_of
from analysis.entropy.mistakes import ERRORS, first_error, solution_steps, steps
from reqat.evaluation.statistics import clustered_means
from reqat.evaluation.trace_folder import TraceFolder


def derailments(folder: TraceFolder, reference: str, candidate: str) -> pd.DataFrame:
    """What first went wrong in each of the candidate's wrong responses to problems that the reference solved with the
    same seed.

    Columns: ``problem``, ``family``, ``seed``, ``trace``, ``error``, ``at`` (in the text), ``position`` (token, -1
    where the text does not tell), ``entropy`` (the reference's at that token, on the candidate's trace: everything
    before it is right), ``solution`` (whether a verified solution was at hand). Empty where there is none.
    """
    pairs = first_divergences(folder, reference, candidate)
    entropy, token = folder.entropy(reference), folder.column("token")
    row_of = {int(trace): i for i, trace in enumerate(folder.traces["trace"])}
    out = []
    for pair in pairs[pairs["derailed"]].itertuples():
        i, solved = row_of[pair.trace_candidate], row_of[pair.trace_reference]
        trace = folder.traces.iloc[i]
        expected = solution_steps(trace["family"], trace["prompt"])
        if expected is None:
            expected = steps(folder.traces["response"].iloc[solved]) or None
        error = first_error(trace["response"], expected, answer=trace["answer"], finished=bool(trace["finished"]))
        ids = token[folder.starts[i] : folder.starts[i] + folder.lengths[i]]
        position = token_at(folder, ids, trace["response"], error.at)
        at_entropy = float(entropy[folder.starts[i] + position]) if position >= 0 else np.nan
        out.append(
            {
                "problem": trace["problem"],
                "family": trace["family"],
                "seed": int(trace["seed"]),
                "trace": int(trace["trace"]),
                "error": error.kind,
                "at": error.at,
                "position": position,
                "entropy": at_entropy,
                "solution": expected is not None,
            }
        )
    columns = ["problem", "family", "seed", "trace", "error", "at", "position", "entropy", "solution"]
    return pd.DataFrame(out, columns=columns)


def token_at(folder: TraceFolder, ids: NDArray[Any], response: str, at: int) -> int:
    """The token of a response that holds the character ``at`` (or ends it); -1 where the tokens do not spell it."""
    ends = np.cumsum([len(folder.vocabulary[i]) for i in ids])
    spelled = "".join(folder.vocabulary[i] for i in ids)
    if spelled[: at + 1] != response[: at + 1]:
        return -1
    return min(int(np.searchsorted(ends, at, side="right")), len(ids) - 1)


def derailment_shares(found: pd.DataFrame, low: pd.DataFrame) -> pd.DataFrame:
    """Share of each kind of error, and of errors whose token is below each threshold of :func:`low_entropy`.

    Columns: ``statistic`` (``error`` or ``low entropy``), ``which`` (the kind, or the threshold) and ``chance``.
    """
    problem = pd.factorize(found["problem"])[0]
    zero = np.zeros(len(found), dtype=np.int64)
    frames = [
        frame_of(
            clustered_means((found["error"] == kind).to_numpy(), zero, problem, 1, proportion=True),
            statistic="error",
            which=kind,
        )
        for kind in ERRORS
    ]
    below = shares_below(found["entropy"].to_numpy(dtype=float), np.ones(len(found), dtype=bool), problem, low)
    frames.append(below.rename(columns={"threshold": "which"}).assign(statistic="low entropy"))
    return pd.concat(frames, ignore_index=True)
