"""Two positions of a pair of models' traces with what both models would have said there, for a figure."""

from __future__ import annotations

import numpy as np
import pandas as pd

from reqat.evaluation.low_entropy import LOW_NATS
from reqat.evaluation.trace_folder import TraceFolder

_CONTEXT_TOKENS = 8


def examples(
    folder: TraceFolder, reference: str, candidate: str, divergences: pd.DataFrame, wrong: pd.DataFrame
) -> pd.DataFrame:
    """What both models would say next at two telling positions, one row a model and rank.

    ``derailment``: of the first wrong tokens (``wrong``, see :func:`derailments`) where the reference's entropy is
    below 0.6 nats, the one whose probability rose most from reference to candidate. ``high entropy``: of the first
    divergences, the one where the reference's entropy is highest. Both rules pick an extreme, not a typical position.

    Columns: ``example``, ``problem``, ``seed``, ``position``, ``context`` (the text just before), ``taken`` (the token
    that stands there), ``entropy_reference``, ``entropy_candidate`` (nats), ``label``, ``rank`` (0: most likely),
    ``token``, ``probability``. Empty where there is no such position.
    """
    at = _example_positions(folder, reference, candidate, divergences, wrong)
    token = folder.column("token")
    entropies = {label: folder.entropy(label) for label in (reference, candidate)}
    out = []
    for name, n in at.items():
        trace = int(folder.trace_index[n])
        start = int(folder.starts[trace])
        before = token[max(start, n - _CONTEXT_TOKENS) : n]
        for label in (reference, candidate):
            for rank, (id, probability) in enumerate(zip(*folder.top_at(label, n), strict=True)):
                out.append(
                    {
                        "example": name,
                        "problem": folder.traces["problem"].iloc[trace],
                        "seed": int(folder.traces["seed"].iloc[trace]),
                        "position": n - start,
                        "context": "".join(folder.vocabulary[i] for i in before),
                        "taken": folder.vocabulary[token[n]],
                        "entropy_reference": float(entropies[reference][n]),
                        "entropy_candidate": float(entropies[candidate][n]),
                        "label": label,
                        "rank": rank,
                        "token": folder.vocabulary[id],
                        "probability": float(probability),
                    }
                )
    columns = ["example", "problem", "seed", "position", "context", "taken", "entropy_reference", "entropy_candidate"]
    return pd.DataFrame(out, columns=[*columns, "label", "rank", "token", "probability"])


def _example_positions(
    folder: TraceFolder, reference: str, candidate: str, divergences: pd.DataFrame, wrong: pd.DataFrame
) -> dict[str, int]:
    """Example -> token, of the N; ties go to the first."""
    row_of = {int(trace): i for i, trace in enumerate(folder.traces["trace"])}
    out = {}
    sure = wrong[(wrong["position"] >= 0) & (wrong["entropy"] < LOW_NATS)]
    if len(sure):
        at = np.array([folder.starts[row_of[t]] + p for t, p in zip(sure["trace"], sure["position"], strict=True)])
        rise = folder.column(f"prob_{candidate}")[at] - folder.column(f"prob_{reference}")[at]
        out["derailment"] = int(at[int(rise.argmax())])
    parted = divergences[divergences["entropy"].notna()]
    if len(parted):
        row = parted.loc[parted["entropy"].idxmax()]
        out["high entropy"] = int(folder.starts[row_of[int(row["trace_reference"])]] + int(row["position"]))
    return out
