"""What the statistics of trace folders share: which traces and tokens they read, and the form of their results.

A result is a tidy data frame: one row a number, with ``value``, a 95% interval ``lo`` to ``hi``, the tokens (or
responses) ``n`` behind it and the problems ``clusters``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from reqat.config.errors import unknown
from reqat.evaluation.statistics import ClusteredMeans
from reqat.evaluation.trace_folder import TraceFolder


def problem_numbers(folder: TraceFolder) -> NDArray[np.int64]:
    """A number for each problem, by trace."""
    return pd.factorize(folder.traces["problem"])[0].astype(np.int64)


def tokens_of(folder: TraceFolder, source: str | None) -> NDArray[np.bool_]:
    """Which tokens belong to traces of ``source`` (None: all). Raises `ReqatError` if there is no such trace."""
    sources = folder.traces["source"]
    if source is None:
        return np.ones(folder.n_tokens, dtype=bool)
    if source not in set(sources):
        raise unknown("source of traces", source, set(sources), str(folder.folder))
    return folder.select((sources == source).to_numpy())


def trace_source(folder: TraceFolder, reference: str) -> str | None:
    """The traces on which models are held against each other: the reference's own, else those given, else all."""
    sources = set(folder.traces["source"])
    return next((source for source in (reference, "given") if source in sources), None)


def frame_of(means: ClusteredMeans, **columns: Any) -> pd.DataFrame:
    """A row a group of ``means``, beside ``columns``."""
    return pd.DataFrame(
        {
            **columns,
            "value": means.value_G,
            "lo": means.lo_G,
            "hi": means.hi_G,
            "n": means.n_G,
            "clusters": means.clusters_G,
        }
    )
