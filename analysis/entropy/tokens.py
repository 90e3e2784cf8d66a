"""What quantization does to single decisions: statistics of trace folders (:mod:`reqat.evaluation.trace_files`).

ReQAT's claim (arXiv 2606.15682, section 3) is that four bits hurt most where a model is all but certain: digits and
operators. Each function here reads the columns that it needs and returns a tidy data frame: one row a number, with
``value``, a 95% interval ``lo`` to ``hi``, the tokens (or responses) ``n`` behind it and the problems ``clusters``.
Tokens of one problem are not independent, so every interval is clustered by problem
(:func:`reqat.evaluation.statistics.clustered_means`).

* By token: mean entropy of each token, share of digits and operators by entropy.
* By bin of the reference's entropy, both models on the same tokens: tail-mass ratio, top-1 mismatch, entropy change.
* By response: accuracy by length, where two samples of one problem part, and what went wrong in those that derailed.

What the paper leaves open: the eps of the tail-mass ratio (here 1e-12, as in SEM; it decides wherever it is no longer
small against the mass), and whether the mean of the ratio is arithmetic or geometric. Both are given; the arithmetic
one lives off its largest values.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from reqat.config.errors import ReqatError, unknown
from reqat.evaluation.low_entropy import LOW_NATS as LOW_NATS
from reqat.evaluation.low_entropy import low_thresholds
from reqat.evaluation.statistics import ClusteredMeans, clustered_means
from reqat.evaluation.trace_files import TraceFolder

EPS = 1e-12
# Resolution of 1 - p for a float32 p near 1: the least eps where a file has no tail column.
_EPS_OF_PROBABILITIES = 2.0**-24
KINDS = ("other", "digit", "operator")
ERRORS = ("wrong digit", "wrong operator", "dropped step", "loop", "no answer", "other")

_DIGITS = re.compile(r"\d+")
_OPERATORS = frozenset("+-*/=<>^%\u00d7\u00f7\u2212\u00b7\u2264\u2265\u2260\u00b1") | {
    "**",
    "==",
    "<=",
    ">=",
    "+=",
    "-=",
}


# -- tokens ----------------------------------------------------------------------------------------------------------
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


def _problems(folder: TraceFolder) -> NDArray[np.int64]:
    """A number for each problem, by trace."""
    return pd.factorize(folder.traces["problem"])[0].astype(np.int64)


def _tokens_of(folder: TraceFolder, source: str | None) -> NDArray[np.bool_]:
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


def _frame(means: ClusteredMeans, **columns: Any) -> pd.DataFrame:
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


def entropy_by_token(
    folder: TraceFolder, label: str, *, more_than: int = 100, source: str | None = None
) -> pd.DataFrame:
    """Mean entropy at each token type seen more than ``more_than`` times, lowest first.

    Columns: ``token`` (its text), ``id``, ``kind``, and the mean in nats.
    """
    keep = _tokens_of(folder, source)
    token = folder.column("token")[keep]
    entropy = folder.entropy(label)[keep]
    problem = _problems(folder)[folder.trace_index[keep]]
    counts = np.bincount(token, minlength=len(folder.vocabulary))
    ids = np.flatnonzero(counts > more_than)
    group_of = np.full(len(counts), -1, dtype=np.int64)
    group_of[ids] = np.arange(len(ids))
    means = clustered_means(entropy, group_of[token], problem, len(ids))
    kinds = token_kinds([folder.vocabulary[i] for i in ids])
    names = [folder.vocabulary[i] for i in ids]
    frame = _frame(means, token=names, id=ids, kind=[KINDS[k] for k in kinds])
    return frame.sort_values(["value", "id"], ignore_index=True)


def kinds_by_bin(folder: TraceFolder, label: str, *, bins: int = 20, source: str | None = None) -> pd.DataFrame:
    """Share of digits and of operators in equal-count bins of ``label``'s entropy.

    Columns: ``kind``, ``bin`` (0 lowest), ``entropy_lo``, ``entropy_hi`` of the bin, and the share.
    """
    keep = _tokens_of(folder, source)
    entropy = folder.entropy(label)[keep]
    bin_N = equal_count_bins(entropy, bins)
    kind = token_kinds(folder.vocabulary)[folder.column("token")[keep]]
    problem = _problems(folder)[folder.trace_index[keep]]
    edges = _edges(entropy, bin_N, bins)
    return pd.concat(
        [
            _frame(
                clustered_means(kind == code, bin_N, problem, bins, proportion=True),
                kind=KINDS[code],
                bin=np.arange(bins),
                **edges,
            )
            for code in (1, 2)
        ],
        ignore_index=True,
    )


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


# -- two models on the same tokens -----------------------------------------------------------------------------------
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
    ``tail ratio (geometric mean)``, ``tail ratio (mean)``, ``tail ratio (of means)`` (of the bin's mean masses) and
    ``top-1 mismatch``. ``source``: which traces; those of :func:`trace_source` if None.
    """
    keep = _tokens_of(folder, trace_source(folder, reference) if source is None else source)
    entropy = folder.entropy(reference)[keep]
    bin_N = equal_count_bins(entropy, bins)
    problem = _problems(folder)[folder.trace_index[keep]]
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
        "tail ratio (mean)": _on_log_scale(clustered_means(mass_cand / mass_ref, bin_N, problem, bins)),
        "tail ratio (of means)": _on_log_scale(clustered_means(mass_cand, bin_N, problem, bins, weights_N=mass_ref)),
        "top-1 mismatch": clustered_means(mismatch, bin_N, problem, bins, proportion=True),
    }
    return pd.concat(
        [_frame(means, statistic=name, bin=np.arange(bins), **edges) for name, means in found.items()],
        ignore_index=True,
    )


def entropy_change(
    folder: TraceFolder, base: str, label: str, *, bins: int = 4, source: str | None = None
) -> pd.DataFrame:
    """How far entropies moved from ``base`` to ``label``, in equal-count (percentile) bins of the base's entropy.

    ``statistic`` is ``change`` (mean difference in nats) or ``normalized`` (the bin's mean entropy over the base's).
    """
    keep = _tokens_of(folder, source)
    before, after = folder.entropy(base)[keep].astype(np.float64), folder.entropy(label)[keep].astype(np.float64)
    bin_N = equal_count_bins(before, bins)
    problem = _problems(folder)[folder.trace_index[keep]]
    edges = _edges(before, bin_N, bins)
    found = {
        "change": clustered_means(after - before, bin_N, problem, bins),
        "normalized": _on_log_scale(clustered_means(after, bin_N, problem, bins, weights_N=before)),
    }
    return pd.concat(
        [_frame(means, statistic=name, bin=np.arange(bins), **edges) for name, means in found.items()],
        ignore_index=True,
    )


# -- responses -------------------------------------------------------------------------------------------------------
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
    problem = _problems(folder)[graded]
    correct = folder.traces["correct"].to_numpy()[graded].astype(bool)
    source = folder.traces["source"].to_numpy()[graded]
    low, high = np.asarray(edges[:-1]) + 1, np.asarray(edges[1:])
    return pd.concat(
        [
            _frame(
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


def low_entropy(folder: TraceFolder, label: str, source: str | None = None) -> pd.DataFrame:
    """What counts as a low-entropy token (:mod:`reqat.evaluation.low_entropy`): one row a threshold.

    Columns: ``threshold`` (``percentile 25``, ``percentile 75``, ``0.6 nats``), ``nats`` and ``chance``, the share of
    ``source``'s tokens below it.
    """
    entropy = folder.entropy(label)[_tokens_of(folder, source)]
    found = low_thresholds(entropy)
    chance = [float((entropy < nats).mean()) for nats in found.values()]
    return pd.DataFrame({"threshold": list(found), "nats": list(found.values()), "chance": chance})


def _shares_below(
    entropy_R: NDArray[np.float64], which_R: NDArray[np.bool_], problem_R: NDArray[np.int64], low: pd.DataFrame
) -> pd.DataFrame:
    """Share of the rows ``which_R`` whose entropy is known and below each threshold."""
    group = np.where(which_R & ~np.isnan(entropy_R), 0, -1)
    frames = [
        _frame(clustered_means(entropy_R < nats, group, problem_R, 1, proportion=True), threshold=name, chance=chance)
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
            _frame(clustered_means(which, zero, problem, 1, proportion=True), pairs=name)
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
        frames.append(_frame(everything, threshold="", chance=np.nan).assign(pairs=name))
        frames.append(_shares_below(divergences["entropy"].to_numpy(), which, problem, low).assign(pairs=name))
    frames.append(outcome_shares(divergences).query("pairs == 'reversed'").assign(threshold="", chance=np.nan))
    return pd.concat(frames, ignore_index=True)


# -- what went wrong -------------------------------------------------------------------------------------------------
_NUMBER = r"-?\d+(?:\.\d+)?"
_STEP = re.compile(
    rf"(?<![\w.])(?P<left>{_NUMBER}) ?(?P<op>[-+*/\u00d7\u00f7]) ?(?P<right>{_NUMBER}) ?"
    rf"(?:=|equals|gives|makes|is) ?(?P<result>{_NUMBER})"
    r"|(?:\b(?:A|Each) (?P<who>[a-z][a-z ]*?) has (?P<many>\d+) legs)"
    r"|(?:\bThere are (?P<legs>\d+) legs on an? (?P<whose>[a-z][a-z ]*?),)"
)
_BEFORE = re.compile(r"[-+*/\u00d7\u00f7]\s*$")
_ANSWER = re.compile(rf"answer is:? *\$?(?P<a>{_NUMBER})|\\boxed\{{(?P<b>[^{{}}]*)\}}")
# How far ahead a step may be for the ones between to count as dropped.
_DROPPED_AT_MOST = 3
# A loop is a tail that repeats itself three times, with a period up to this many characters.
_PERIOD_CHARS = 400


@dataclass(frozen=True)
class Step:
    """One step of a chain of thought, ``left op right = result``, or a number looked up (``op`` is ``has``); ``start``
    and ``at`` are positions in the text, of the step and of its four pieces.
    """

    pieces: tuple[str, str, str, str]
    start: int
    at: tuple[int, int, int, int]

    @property
    def holds(self) -> bool:
        """Whether the arithmetic is right, to the decimals that are shown."""
        left, op, right, result = self.pieces
        if op == "has":
            return True
        a, b, shown = Fraction(left), Fraction(right), Fraction(result)
        if op in "/\u00f7":
            if b == 0:
                return False
            exact = a / b
        else:
            exact = a + b if op == "+" else a - b if op == "-" else a * b
        decimals = len(result.partition(".")[2])
        return abs(exact - shown) <= (Fraction(1, 2 * 10**decimals) if decimals else 0)


def steps(text: str) -> list[Step]:
    """The steps in ``text``: every ``a op b = c`` (also ``gives``, ``makes``, ``is``) and every count of legs.

    Longer sums (``1 + 2 + 3 = 6``) are no steps: what they hold is not checked.
    """
    found = []
    for match in _STEP.finditer(text):
        if match["op"] is None:
            who, many = ("who", "many") if match["who"] else ("whose", "legs")
            at = (match.start(who), match.start(), match.start(), match.start(many))
            found.append(Step((match[who], "has", "", match[many]), match.start(), at))
        elif not _BEFORE.search(text, max(0, match.start() - 4), match.start()):
            pieces = (match["left"], match["op"], match["right"], match["result"])
            at = (match.start("left"), match.start("op"), match.start("right"), match.start("result"))
            found.append(Step(pieces, match.start(), at))
    return found


def solution_steps(family: str, prompt: str) -> list[Step] | None:
    """The steps of the verified solution, rebuilt from the prompt by the family's own writer of traces.

    None for families whose solution does not follow from the prompt's text.
    """
    import random

    from reqat.tasks import Problem, get_family

    metadata: dict[str, Any]
    if family == "chain_sum":
        metadata = {"expression": prompt.strip().removesuffix("=").strip()}
    elif family == "leg_counting":
        counts = re.findall(r"(\d+) ([a-z][a-z ]*?)s(?=[,?])", prompt)
        metadata = {"animals": {animal: int(n) for n, animal in counts}}
    elif family == "simple_equations":
        variable, _, equation = prompt.strip().removeprefix("Solve for ").partition(":")
        metadata = {"variable": variable.strip(), "equation": equation.strip()}
    else:
        return None
    problem = Problem("", family, prompt, "", {"metadata": metadata})
    try:
        return steps(get_family(family).trace(problem, random.Random(0)))
    except (IndexError, KeyError, ValueError):
        return None  # not the wording that this version of the family writes


@dataclass(frozen=True)
class Derailment:
    """The first thing that went wrong in a response: one of `ERRORS`, and where in the text it is."""

    kind: str
    at: int


def first_error(
    response: str, expected: Sequence[Step] | None, *, answer: str = "", finished: bool = True
) -> Derailment:
    """What first went wrong in a response that does not reach the answer.

    Args:
        response: its text.
        expected: the steps of a verified solution; without them only the arithmetic of each step is checked.
        answer: the expected answer, to tell a wrong last line from a right one.
        finished: whether the response has its end marker; a loop is looked for in those that have none.

    A step that is done again is a ``loop``, and so is a text that repeats itself to its end; steps left out before the
    one at hand, or at the end, are a ``dropped step``; a wrong sign counts as a ``wrong operator``; any other
    deviation of a number is a ``wrong digit``. The first wrong token decides: a step with both another operator and
    another number is a ``wrong operator``.
    """
    found = steps(response)
    done = 0
    for i, step in enumerate(found):
        if expected is not None and done < len(expected) and step.pieces == expected[done].pieces:
            done += 1
            continue
        if expected is None:
            if not step.holds:
                return Derailment("wrong digit", step.at[3])
            if i >= 2 and step.pieces == found[i - 1].pieces == found[i - 2].pieces:
                return Derailment("loop", found[i - 1].start)
            continue
        if any(step.pieces == earlier.pieces for earlier in found[:i]):
            return Derailment("loop", step.start)
        if done == len(expected):
            again = bool(expected) and step.pieces[1:3] == expected[-1].pieces[1:3]
            return Derailment("loop" if again else "other", step.start)
        return _deviation(step, found[i + 1] if i + 1 < len(found) else None, expected, done)
    end = found[-1].at[3] + len(found[-1].pieces[3]) if found else 0
    if not finished:
        start = _loop_start(response)
        if start is not None:
            return Derailment("loop", start)
    last = None
    for last in _ANSWER.finditer(response):  # noqa: B007  (the last one is wanted)
        pass
    if expected is not None and done < len(expected) and (finished or last is not None):
        return Derailment("dropped step", min(end, len(response)))
    if last is None:
        return Derailment("no answer", len(response))
    name = "a" if last["a"] is not None else "b"
    if answer and last[name].strip() != answer.strip():
        return _number_error(last[name], last.start(name), answer.strip())
    return Derailment("other", last.start(name))


def _deviation(step: Step, following: Step | None, expected: Sequence[Step], done: int) -> Derailment:
    """How a step differs from the one that should stand there."""
    left, op, right, result = step.pieces
    want = expected[done]
    if (op, right) != want.pieces[1:3] and op != "has" and done:
        again = (op, right) == expected[done - 1].pieces[1:3] and left == want.pieces[0]
        if again and following is not None and following.pieces[1:3] == want.pieces[1:3]:
            return Derailment("loop", step.at[1] if op != want.pieces[1] else step.at[2])
    if (op, right) != want.pieces[1:3] or op == "has":
        for ahead in range(done + 1, min(done + 1 + _DROPPED_AT_MOST, len(expected))):
            later = expected[ahead]
            same = left == later.pieces[0] if op == "has" else left in (want.pieces[0], later.pieces[0])
            if (op, right) != later.pieces[1:3] or not same:
                continue
            # One wrong digit can make a step look like a later one: the step after it tells which it was.
            after = expected[ahead + 1].pieces[1:3] if ahead + 1 < len(expected) else None
            if following is None or after is None or following.pieces[1:3] == after:
                first = 0 if op == "has" else 1 if op != want.pieces[1] else 2
                return Derailment("dropped step", step.at[first])
    if op != want.pieces[1] and "has" in (op, want.pieces[1]):
        return Derailment("dropped step", step.start)
    if left != want.pieces[0]:
        return _number_error(left, step.at[0], want.pieces[0])
    if op != want.pieces[1]:
        return Derailment("wrong operator", step.at[1])
    if right != want.pieces[2]:
        return _number_error(right, step.at[2], want.pieces[2])
    return _number_error(result, step.at[3], want.pieces[3])


def _number_error(found: str, at: int, wanted: str) -> Derailment:
    """A wrong number: of sign, or from its first wrong digit on."""
    same = 0
    while same < min(len(found), len(wanted)) and found[same] == wanted[same]:
        same += 1
    if found.startswith("-") != wanted.startswith("-"):
        return Derailment("wrong operator", at)
    return Derailment("wrong digit", at + min(same, max(len(found) - 1, 0)))


def _loop_start(text: str) -> int | None:
    """Where a text that ends in three or more repetitions begins to repeat itself; None if it does not."""
    for period in range(2, min(_PERIOD_CHARS, len(text) // 3) + 1):
        tail = text[-period:]
        if tail.strip() and tail == text[-2 * period : -period] == text[-3 * period : -2 * period]:
            start = len(text) - period
            while start > 0 and text[start - 1] == text[start - 1 + period]:
                start -= 1
            return start + period
    return None


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
        _frame(
            clustered_means((found["error"] == kind).to_numpy(), zero, problem, 1, proportion=True),
            statistic="error",
            which=kind,
        )
        for kind in ERRORS
    ]
    below = _shares_below(found["entropy"].to_numpy(dtype=float), np.ones(len(found), dtype=bool), problem, low)
    frames.append(below.rename(columns={"threshold": "which"}).assign(statistic="low entropy"))
    return pd.concat(frames, ignore_index=True)


# -- single decisions ------------------------------------------------------------------------------------------------
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
