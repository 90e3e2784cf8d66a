"""Accuracy by length of the response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.entropy.frames import frame_of, problem_numbers
from reqat.evaluation.statistics import clustered_means
from reqat.evaluation.trace_folder import TraceFolder


def length_edges(tokens_T: NDArray[Any], bins: int) -> list[int]:
    """Ends of equal-count bins of response lengths: bin i holds lengths above ``edges[i]`` up to ``edges[i + 1]``.

    Lengths are whole numbers with many ties, so that bins are only about equal; fewer than ``bins`` come out where
    quantiles coincide.
    """
    quantiles = np.quantile(tokens_T, np.linspace(0, 1, bins + 1), method="higher").astype(np.int64)
    return np.unique(np.append(tokens_T.min() - 1, quantiles[1:])).tolist()


def length_bins(tokens_T: NDArray[Any], edges: Sequence[int]) -> NDArray[np.int64]:
    """The bin of each length between ascending ``edges`` (see :func:`length_edges`); -1 outside of them."""
    bin_T = np.searchsorted(np.asarray(edges), tokens_T, side="left") - 1
    bin_T[(bin_T < 0) | (bin_T >= len(edges) - 1)] = -1
    return bin_T


def accuracy_by_length(folder: TraceFolder, *, edges: Sequence[int] | None = None, bins: int = 4) -> pd.DataFrame:
    """Accuracy by response length in tokens, for each source.

    The bins are the same for all sources: between ``edges`` (``[0, 8000, 16000]`` means up to 8000, up to 16000), or
    equal-count over all graded responses. Columns: ``source``, ``length_lo``, ``length_hi`` (both included).
    """
    graded = folder.traces["correct"].notna().to_numpy()
    if not graded.any():
        return pd.DataFrame(columns=["source", "length_lo", "length_hi", "value", "lo", "hi", "n", "clusters"])
    length = folder.traces["tokens"].to_numpy()[graded]
    edges = length_edges(length, bins) if edges is None else edges
    bin_T = length_bins(length, edges)
    problem = problem_numbers(folder)[graded]
    correct = folder.traces["correct"].to_numpy()[graded].astype(bool)
    source = folder.traces["source"].to_numpy()[graded]
    low, high = np.asarray(edges[:-1]) + 1, np.asarray(edges[1:])
    return pd.concat(
        [
            frame_of(
                clustered_means(correct, np.where(source == name, bin_T, -1), problem, len(low), proportion=True),
                source=name,
                length_lo=low,
                length_hi=high,
            )
            for name in sorted(set(source))
        ],
        ignore_index=True,
    )


def accuracies(folder: TraceFolder) -> pd.DataFrame:
    """Accuracy of each source over its graded traces; columns ``source`` and the share of correct ones."""
    whole = accuracy_by_length(folder, edges=[-1, 2**31 - 1])
    return whole.drop(columns=["length_lo", "length_hi"])
