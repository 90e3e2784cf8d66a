"""Entropies of single tokens: by token type, and by bin of the reference's entropy, of one model or of two.

Two models are compared on the same tokens: tail-mass ratio, top-1 mismatch and entropy change. What the paper leaves
open: the eps of the tail-mass ratio (here 1e-12, as in SEM; it decides wherever it is no longer small against the
mass), and how the ratio is averaged. A token that the reference is certain of has next to no mass to divide by: one
such token can make an arithmetic mean of ratios 1e9, which says nothing of the others, so there is none here. Given are
the geometric mean (Figure 2f), the ratio of the mean masses, and the quartiles.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.entropy.frames import frame_of, problem_numbers, tokens_of, trace_source
from reqat.config.errors import ReqatError
from reqat.evaluation.statistics import ClusteredMeans, clustered_means
from reqat.evaluation.trace_folder import TraceFolder

EPS = 1e-12
RARE = 100
"""A token type seen no more often has no mean entropy of its own in tables."""
# Resolution of 1 - p for a float32 p near 1: the least eps where a file has no tail column.
_EPS_OF_PROBABILITIES = 2.0**-24
QUARTILES = {"tail ratio (median)": 0.5, "tail ratio (lower quartile)": 0.25, "tail ratio (upper quartile)": 0.75}
"""Statistic of :func:`damage_by_bin` -> the share of a bin's tokens below it."""
KINDS = ("other", "digit", "operator")
_DIGITS = re.compile(r"\d+")
_OPERATORS = frozenset("+-*/=<>^%\u00d7\u00f7\u2212\u00b7\u2264\u2265\u2260\u00b1") | {
    "**",
    "==",
    "<=",
    ">=",
    "+=",
    "-=",
}


def token_kinds(vocabulary: Sequence[str]) -> NDArray[np.int8]:
    """Index into `KINDS` of each token: digits alone, an arithmetic operator or relation alone, or anything else."""
    kinds = np.zeros(len(vocabulary), dtype=np.int8)
    for i, text in enumerate(vocabulary):
        text = text.strip()
        kinds[i] = 1 if _DIGITS.fullmatch(text) else 2 if text in _OPERATORS else 0
    return kinds


def equal_count_bins(values_N: NDArray[Any], bins: int) -> NDArray[np.int64]:
    """The bin of each value, 0 to ``bins - 1`` from low to high; sizes differ by one at most.

    Equal values may fall into neighbouring bins, in their order. Raises `ReqatError` for fewer values than bins.
    """
    if bins < 1 or len(values_N) < bins:
        raise ReqatError(f"{len(values_N)} tokens do not fill {bins} bins; collect more, or ask for fewer bins.")
    out = np.empty(len(values_N), dtype=np.int64)
    out[np.argsort(values_N, kind="stable")] = np.arange(len(values_N)) * bins // len(values_N)
    return out


def entropy_by_token(
    folder: TraceFolder, label: str, *, more_than: int = RARE, source: str | None = None
) -> pd.DataFrame:
    """Mean entropy at each token type seen more than ``more_than`` times, lowest first.

    Columns: ``token`` (its text), ``id``, ``kind``, and the mean in nats.
    """
    keep = tokens_of(folder, source)
    token = folder.column("token")[keep]
    entropy = folder.entropy(label)[keep]
    problem = problem_numbers(folder)[folder.trace_index[keep]]
    counts = np.bincount(token, minlength=len(folder.vocabulary))
    ids = np.flatnonzero(counts > more_than)
    group_of = np.full(len(counts), -1, dtype=np.int64)
    group_of[ids] = np.arange(len(ids))
    means = clustered_means(entropy, group_of[token], problem, len(ids))
    kinds = token_kinds([folder.vocabulary[i] for i in ids])
    names = [folder.vocabulary[i] for i in ids]
    frame = frame_of(means, token=names, id=ids, kind=[KINDS[k] for k in kinds])
    return frame.sort_values(["value", "id"], ignore_index=True)


def kinds_by_bin(folder: TraceFolder, label: str, *, bins: int = 20, source: str | None = None) -> pd.DataFrame:
    """Share of digits and of operators in equal-count bins of ``label``'s entropy.

    Columns: ``kind``, ``bin`` (0 lowest), ``entropy_lo``, ``entropy_hi`` of the bin, and the share.
    """
    keep = tokens_of(folder, source)
    entropy = folder.entropy(label)[keep]
    bin_N = equal_count_bins(entropy, bins)
    kind = token_kinds(folder.vocabulary)[folder.column("token")[keep]]
    problem = problem_numbers(folder)[folder.trace_index[keep]]
    edges = _edges(entropy, bin_N, bins)
    return pd.concat(
        [
            frame_of(
                clustered_means(kind == code, bin_N, problem, bins, proportion=True),
                kind=KINDS[code],
                bin=np.arange(bins),
                **edges,
            )
            for code in (1, 2)
        ],
        ignore_index=True,
    )


def damage_by_bin(
    folder: TraceFolder,
    reference: str,
    candidate: str,
    *,
    bins: int = 20,
    eps: float = EPS,
    source: str | None = None,
) -> pd.DataFrame:
    """Tail-mass ratio and top-1 mismatch in equal-count bins of the reference's entropy, on the same tokens.

    ``rho = (M_candidate + eps) / (M_reference + eps)`` with ``M = 1 - p(top1)``, a token. ``statistic`` is one of
    ``tail ratio (geometric mean)``, ``tail ratio (of means)`` (of the bin's mean masses), ``tail ratio (median)``,
    ``tail ratio (lower quartile)``, ``tail ratio (upper quartile)`` (of the tokens, without intervals) and
    ``top-1 mismatch``. ``source``: which traces; those of :func:`trace_source` if None.
    """
    keep = tokens_of(folder, trace_source(folder, reference) if source is None else source)
    entropy = folder.entropy(reference)[keep]
    bin_N = equal_count_bins(entropy, bins)
    problem = problem_numbers(folder)[folder.trace_index[keep]]
    edges = _edges(entropy, bin_N, bins)
    eps = eps if folder.has_tail else max(eps, _EPS_OF_PROBABILITIES)
    mass_ref = folder.tail(reference)[keep] + eps
    mass_cand = folder.tail(candidate)[keep] + eps
    log_rho = np.log(mass_cand / mass_ref)
    log_mean = clustered_means(log_rho, bin_N, problem, bins)
    geometric = dataclasses.replace(
        log_mean, value_G=np.exp(log_mean.value_G), lo_G=np.exp(log_mean.lo_G), hi_G=np.exp(log_mean.hi_G)
    )
    mismatch = (folder.top1(reference) != folder.top1(candidate))[keep]
    found = {
        "tail ratio (geometric mean)": geometric,
        "tail ratio (of means)": _on_log_scale(clustered_means(mass_cand, bin_N, problem, bins, weights_N=mass_ref)),
        **{name: _quantiles(mass_cand / mass_ref, bin_N, share, log_mean) for name, share in QUARTILES.items()},
        "top-1 mismatch": clustered_means(mismatch, bin_N, problem, bins, proportion=True),
    }
    return pd.concat(
        [frame_of(means, statistic=name, bin=np.arange(bins), **edges) for name, means in found.items()],
        ignore_index=True,
    )


def entropy_change(
    folder: TraceFolder, base: str, label: str, *, bins: int = 4, source: str | None = None
) -> pd.DataFrame:
    """How far entropies moved from ``base`` to ``label``, in equal-count (percentile) bins of the base's entropy.

    ``statistic`` is ``change`` (mean difference in nats) or ``normalized`` (the bin's mean entropy over the base's).
    """
    keep = tokens_of(folder, source)
    before, after = folder.entropy(base)[keep].astype(np.float64), folder.entropy(label)[keep].astype(np.float64)
    bin_N = equal_count_bins(before, bins)
    problem = problem_numbers(folder)[folder.trace_index[keep]]
    edges = _edges(before, bin_N, bins)
    found = {
        "change": clustered_means(after - before, bin_N, problem, bins),
        "normalized": _on_log_scale(clustered_means(after, bin_N, problem, bins, weights_N=before)),
    }
    return pd.concat(
        [frame_of(means, statistic=name, bin=np.arange(bins), **edges) for name, means in found.items()],
        ignore_index=True,
    )


def _quantiles(
    rho_N: NDArray[np.float64], bin_N: NDArray[np.int64], share: float, like: ClusteredMeans
) -> ClusteredMeans:
    """Each bin's quantile; no interval, and the counts of ``like``."""
    found_G = [np.quantile(rho_N[bin_N == g], share) for g in range(len(like.n_G))]
    nothing_G = np.full(len(found_G), np.nan)
    return dataclasses.replace(like, value_G=np.array(found_G), lo_G=nothing_G, hi_G=nothing_G)


def _on_log_scale(means: ClusteredMeans) -> ClusteredMeans:
    """Means of positive numbers whose interval is symmetric in the logarithm (delta method): its lower end stays above
    0.
    """
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        factor_G = np.exp((means.hi_G - means.value_G) / means.value_G)
        return dataclasses.replace(means, lo_G=means.value_G / factor_G, hi_G=means.value_G * factor_G)


def _edges(entropy_N: NDArray[Any], bin_N: NDArray[np.int64], bins: int) -> dict[str, Any]:
    """Lowest, highest and mean entropy of each bin."""
    order = np.argsort(bin_N, kind="stable")
    starts = np.searchsorted(bin_N[order], np.arange(bins))
    entropy = entropy_N[order].astype(np.float64)
    return {
        "entropy_lo": np.minimum.reduceat(entropy, starts),
        "entropy_hi": np.maximum.reduceat(entropy, starts),
        "entropy_mean": np.add.reduceat(entropy, starts) / np.diff(np.append(starts, len(entropy))),
    }
