"""Reads a folder of token traces, one trace at a time, and refuses what cannot be right.

The files are those of :mod:`reqat.evaluation.trace_files`, which reads them; here every number of a trace is looked at
before it goes into a page. Every trouble names the file or the trace that it is in, so that one damaged trace costs no
other.

Shapes: N tokens of a trace, M entries of its top-k lists laid end to end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.viewer.vocabulary import Vocabulary
from reqat.config.errors import ReqatError
from reqat.evaluation.trace_tables import META, TOKENS, TRACES, read_meta, read_traces, stream_tokens

_REMEDY = "collect the traces again"
_LABEL_COLUMNS = ("entropy", "prob", "top", "top_prob")
# Entropies are of float32 logits: a distribution that puts everything on one token may come out a little below zero.
_SLACK = 1e-3


class TraceError(ReqatError):
    """Something is wrong with one trace; the others are not touched by it."""


@dataclass(frozen=True)
class Trace:
    """A row of ``traces.parquet``; ``correct`` is None where nobody graded the response."""

    number: int
    problem: str
    family: str
    seed: int
    source: str
    prompt: str
    response: str
    answer: str
    correct: bool | None
    finished: bool
    tokens: int

    def __str__(self) -> str:
        """How messages name it."""
        return f"trace {self.number} (problem {self.problem!r}, seed {self.seed}, source {self.source})"


@dataclass(frozen=True)
class Distributions:
    """What one precision says at each token of a trace.

    ``entropy`` and ``prob`` are float32 [N], nats and the probability of the token that follows; ``top`` int32 [M] and
    ``top_prob`` float32 [M] are the most probable tokens, ``count`` int32 [N] of them at each token, best first.
    """

    entropy: NDArray[np.float32]
    prob: NDArray[np.float32]
    top: NDArray[np.int32]
    top_prob: NDArray[np.float32]
    count: NDArray[np.int32]

    @property
    def best(self) -> NDArray[np.int32]:
        """The most probable token at each position, int32 [N]."""
        return self.top[np.cumsum(self.count) - self.count]


@dataclass(frozen=True)
class Tokens:
    """The tokens of a trace, int32 [N], and the distributions of each precision by its label."""

    token: NDArray[np.int32]
    by_label: Mapping[str, Distributions]


@dataclass(frozen=True)
class Folder:
    """An opened folder: ``traces`` by number, in the file's order; ``labels`` with the reference first."""

    path: Path
    labels: tuple[str, ...]
    vocabulary: Vocabulary
    meta: Mapping[str, Any]
    traces: Mapping[int, Trace]
    about: Sequence[tuple[str, str]] = field(default_factory=tuple)

    def read(
        self, wanted: set[int] | None = None, damaged: Callable[[ReqatError], None] | None = None
    ) -> Iterator[tuple[Trace, Tokens | TraceError]]:
        """Each trace with its tokens, in the file's order, or with what is wrong with it.

        Args:
            wanted: numbers of the traces to read; None reads all. Reading ends after the last of them.
            damaged: told of each row group that cannot be read, whose traces are then wrong, and the others are read
                all the same; None raises the first.

        Raises:
            FileNotFoundError: there is no ``tokens.parquet``.
            ReqatError: for a file that is damaged, unsorted, or without a column.
        """
        left = set(self.traces) if wanted is None else set(wanted)
        names = ["position", "token", *(f"{name}_{label}" for label in self.labels for name in _LABEL_COLUMNS)]
        for number, columns in stream_tokens(self.path, names, damaged=damaged):
            trace = self.traces.get(number)
            if trace is None:
                raise ReqatError(
                    f"{self.path / TOKENS} holds tokens of trace {number}, which traces.parquet does not "
                    f"list; {_REMEDY}"
                )
            if number not in left:
                continue
            left.remove(number)
            try:
                yield trace, self._check(trace, columns)
            except TraceError as error:
                yield trace, error
            if not left:
                return
        for number in sorted(left):
            trace = self.traces[number]
            if trace.tokens == 0:  # the model ended at once: nothing to store, and nothing wrong
                yield trace, self._nothing()
            else:
                yield trace, TraceError(f"{trace}: tokens.parquet holds none of its {trace.tokens} tokens; {_REMEDY}")

    def _nothing(self) -> Tokens:
        none, nothing = np.zeros(0, np.int32), np.zeros(0, np.float32)
        return Tokens(none, {label: Distributions(nothing, nothing, none, nothing, none) for label in self.labels})

    def _check(self, trace: Trace, columns: Mapping[str, Any]) -> Tokens:
        """Arrow columns as arrays. Raises `TraceError` for what cannot be."""
        n = len(columns["token"])

        def wrong(what: str, where_N: NDArray[np.bool_] | None = None) -> TraceError:
            at = "" if where_N is None else f" at position {int(np.flatnonzero(where_N)[0])}"
            return TraceError(f"{trace}: {what}{at}; {_REMEDY}")

        def flat(name: str, dtype: type) -> NDArray[Any]:
            column = columns[name]
            values = column.flatten() if name.startswith("top_") else column
            if column.null_count or values.null_count:
                raise wrong(f"a value of {name} is missing")
            return np.asarray(values.to_numpy(zero_copy_only=False)).astype(dtype, copy=False)

        if n != trace.tokens:
            raise wrong(f"tokens.parquet holds {n} of its {trace.tokens} tokens in a row")
        position_N, token_N = flat("position", np.int64), flat("token", np.int32)
        if (position_N != np.arange(n)).any():
            raise wrong("the positions of its tokens are not 0, 1, 2, ...", position_N != np.arange(n))
        unknown_N = ~self.vocabulary.knows(token_N)
        if unknown_N.any():
            raise wrong(f"token id {token_N[unknown_N][0]} is not in the {self.vocabulary}", unknown_N)
        found = {}
        for label in self.labels:
            entropy_N, prob_N = flat(f"entropy_{label}", np.float32), flat(f"prob_{label}", np.float32)
            top_M, top_prob_M = flat(f"top_{label}", np.int32), flat(f"top_prob_{label}", np.float32)
            count_N, count_prob_N = (
                np.diff(np.asarray(columns[f"{name}_{label}"].offsets)).astype(np.int32) for name in ("top", "top_prob")
            )
            row_M = np.repeat(np.arange(n), count_N)
            if (count_N != count_prob_N).any() or (count_N < 1).any():
                bad_N = (count_N != count_prob_N) | (count_N < 1)
                raise wrong(f"the most probable tokens of {label} have no probabilities, or there are none", bad_N)
            bad_N = ~(np.isfinite(entropy_N) & (entropy_N >= -_SLACK))
            if bad_N.any():
                raise wrong(f"the entropy of {label} is {entropy_N[bad_N][0]}", bad_N)
            bad_N = ~_probable(prob_N)
            if bad_N.any():
                raise wrong(f"the probability of {label} is {prob_N[bad_N][0]}", bad_N)
            bad_M = ~_probable(top_prob_M)
            if bad_M.any():
                where_N = np.isin(np.arange(n), row_M[bad_M])
                raise wrong(f"a probability among the most probable of {label} is {top_prob_M[bad_M][0]}", where_N)
            bad_M = ~self.vocabulary.allows(top_M)
            if bad_M.any():
                where_N = np.isin(np.arange(n), row_M[bad_M])
                raise wrong(f"token id {top_M[bad_M][0]} of {label} is not in the {self.vocabulary}", where_N)
            order_M = np.lexsort((-top_prob_M, row_M))  # stable: best first, ties as they were
            found[label] = Distributions(entropy_N.clip(min=0), prob_N, top_M[order_M], top_prob_M[order_M], count_N)
        return Tokens(token_N, found)


def _probable(values: NDArray[np.float32]) -> NDArray[np.bool_]:
    return (values >= 0) & (values <= 1 + _SLACK)  # False for NaN


def open_folder(path: Path) -> Folder:
    """Read ``meta.json`` and ``traces.parquet`` of a folder; its tokens are read by :meth:`Folder.read`.

    Raises ``ReqatError`` for a folder that is missing, a damaged file, no traces, or traces with one number, and
    `MissingFileError` for a missing file.
    """
    if not path.is_dir():
        raise ReqatError(
            f"no folder {path}; give one that holds {TOKENS}, {TRACES} and {META} (`reqat entropy` writes it)"
        )
    meta = read_meta(path)
    vocabulary = Vocabulary.from_meta(meta, path)
    about = [(key, _short(value)) for key, value in meta.items() if key not in ("vocabulary", "labels")]
    traces = _traces(path)
    return Folder(path, tuple(meta["labels"]), vocabulary, meta, traces, tuple(about))


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 300 else text[:297] + "..."


def _traces(folder: Path) -> dict[int, Trace]:
    path = folder / TRACES
    traces: dict[int, Trace] = {}
    for row in read_traces(folder).to_pylist():
        number = row.pop("trace")
        missing = [name for name, value in row.items() if value is None and name not in ("correct", "answer")]
        if number is None or missing:
            raise ReqatError(f"{path}: trace {number} has no {', '.join(missing) or 'number'}; {_REMEDY}")
        if number in traces:
            raise ReqatError(f"{path}: trace {number} comes twice; {_REMEDY}")
        row["answer"] = "" if row["answer"] is None else row["answer"]
        traces[number] = Trace(number, **row)
    if not traces:
        raise ReqatError(f"{path} holds no trace; {_REMEDY}")
    return traces
