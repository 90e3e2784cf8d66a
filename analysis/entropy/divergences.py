"""Where two models' responses to one problem first differ, and how often that is at a token of low entropy."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.entropy.frames import frame_of, tokens_of
from reqat.config.errors import ReqatError, unknown
from reqat.evaluation.low_entropy import low_thresholds
from reqat.evaluation.statistics import clustered_means
from reqat.evaluation.trace_folder import TraceFolder


def low_entropy(folder: TraceFolder, label: str, source: str | None = None) -> pd.DataFrame:
    """What counts as a low-entropy token (:mod:`reqat.evaluation.low_entropy`): one row a threshold.

    Columns: ``threshold`` (``percentile 25``, ``percentile 75``, ``0.6 nats``), ``nats`` and ``chance``, the share of
    ``source``'s tokens below it.
    """
    entropy = folder.entropy(label)[tokens_of(folder, source)]
    found = low_thresholds(entropy)
    chance = [float((entropy < nats).mean()) for nats in found.values()]
    return pd.DataFrame({"threshold": list(found), "nats": list(found.values()), "chance": chance})


def shares_below(
    entropy_R: NDArray[np.float64], which_R: NDArray[np.bool_], problem_R: NDArray[np.int64], low: pd.DataFrame
) -> pd.DataFrame:
    """Share of the rows ``which_R`` whose entropy is known and below each threshold."""
    group = np.where(which_R & ~np.isnan(entropy_R), 0, -1)
    frames = [
        frame_of(clustered_means(entropy_R < nats, group, problem_R, 1, proportion=True), threshold=name, chance=chance)
        for name, nats, chance in low.itertuples(index=False)
    ]
    return pd.concat(frames, ignore_index=True)


def first_divergences(folder: TraceFolder, reference: str, candidate: str) -> pd.DataFrame:
    """Where the two samples of each problem and seed part, one row a pair.

    Columns: ``problem``, ``seed``, ``trace_reference``, ``trace_candidate`` (indices), ``position`` (of the first
    different token; -1 where there is none), ``entropy`` (the reference's there, NaN where there is none),
    ``correct_reference``, ``correct_candidate``, ``derailed`` (right without quantization, wrong with).

    Raises `ReqatError` where the folder has no traces of either, or no pair.
    """
    traces = folder.traces
    for source in (reference, candidate):
        if source not in set(traces["source"]):
            raise unknown("source of traces", source, set(traces["source"]), str(folder.folder))
    rows = {
        source: {(r.problem, r.seed): i for i, r in zip(part.index, part.itertuples(), strict=True)}
        for source, part in traces.groupby("source")
    }
    pairs = [pair for pair in rows[reference] if pair in rows[candidate]]
    if not pairs:
        raise ReqatError(f"{folder.folder}: no problem and seed that both {reference} and {candidate} answered.")
    token, entropy = folder.column("token"), folder.entropy(reference)
    out = []
    for pair in pairs:
        a, b = rows[reference][pair], rows[candidate][pair]
        tokens_a = token[folder.starts[a] : folder.starts[a] + folder.lengths[a]]
        tokens_b = token[folder.starts[b] : folder.starts[b] + folder.lengths[b]]
        shared = min(len(tokens_a), len(tokens_b))
        differ = tokens_a[:shared] != tokens_b[:shared]
        # Without a difference, the longer one goes on where the other was cut off.
        at = int(differ.argmax()) if differ.any() else (shared if len(tokens_a) != len(tokens_b) else -1)
        inside = 0 <= at < len(tokens_a)
        at_entropy = float(entropy[folder.starts[a] + at]) if inside else np.nan
        correct_a, correct_b = traces["correct"].iloc[a], traces["correct"].iloc[b]
        known = correct_a is not None and correct_b is not None
        out.append(
            {
                "problem": pair[0],
                "seed": pair[1],
                "trace_reference": int(traces["trace"].iloc[a]),
                "trace_candidate": int(traces["trace"].iloc[b]),
                "position": at,
                "entropy": at_entropy,
                "correct_reference": correct_a,
                "correct_candidate": correct_b,
                "derailed": bool(known and correct_a and not correct_b),
            }
        )
    return pd.DataFrame(out)


def outcome_shares(divergences: pd.DataFrame) -> pd.DataFrame:
    """Share of pairs that end otherwise: ``derailed`` (reference right, candidate wrong) and ``reversed`` (reference
    wrong, candidate right), of all pairs, with intervals clustered by problem.

    Two samples of one model would differ in both directions alike: what rounding costs is what the first has over the
    second. Column: ``pairs``.
    """
    problem = pd.factorize(divergences["problem"])[0]
    right_a, right_b = (divergences[f"correct_{role}"].eq(True).to_numpy() for role in ("reference", "candidate"))
    wrong_a, wrong_b = (divergences[f"correct_{role}"].eq(False).to_numpy() for role in ("reference", "candidate"))
    zero = np.zeros(len(divergences), dtype=np.int64)
    return pd.concat(
        [
            frame_of(clustered_means(which, zero, problem, 1, proportion=True), pairs=name)
            for name, which in (("derailed", right_a & wrong_b), ("reversed", wrong_a & right_b))
        ],
        ignore_index=True,
    )


def divergence_shares(divergences: pd.DataFrame, low: pd.DataFrame) -> pd.DataFrame:
    """Share of first divergences at tokens below each threshold of :func:`low_entropy`, of all pairs that part and of
    those that derailed.

    Columns: ``pairs`` (``all`` or ``derailed``), ``threshold`` and ``chance``. The row with an empty threshold is the
    share of pairs that part at all (or derailed); ``reversed`` pairs (see :func:`outcome_shares`) have that row alone.
    """
    problem = pd.factorize(divergences["problem"])[0]
    parted = divergences["position"].to_numpy() >= 0
    frames = []
    for name, which in (("all", parted), ("derailed", divergences["derailed"].to_numpy() & parted)):
        everything = clustered_means(which, np.zeros(len(which), dtype=int), problem, 1, proportion=True)
        frames.append(frame_of(everything, threshold="", chance=np.nan).assign(pairs=name))
        frames.append(shares_below(divergences["entropy"].to_numpy(), which, problem, low).assign(pairs=name))
    frames.append(outcome_shares(divergences).query("pairs == 'reversed'").assign(threshold="", chance=np.nan))
    return pd.concat(frames, ignore_index=True)
