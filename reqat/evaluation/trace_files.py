"""Token traces on disk: what each precision thought of every token of a response, in three files a folder.

``tokens.parquet`` has a row a response token, sorted by trace and position; ``traces.parquet`` a row a trace;
``meta.json``, written last, says which precisions there are (the first is the reference), what the tokens are called,
and how the traces came about. Columns that belong to a precision carry its label: ``entropy_BF16``.

Writing is streamed: a row group is written whenever enough tokens have come together, so memory does not grow with the
number of traces. Reading is by column, each straight into one numpy array. Pages carry checksums, and what cannot be
read is an error that names the traces it costs; with ``lost="skip"`` the other traces are read all the same.

Neither side needs torch. Shapes: N tokens, K most likely tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from reqat.config.errors import ReqatError, unknown
from reqat.config.files import beside, explaining, unique, write_file
from reqat.config.targets import check_file, never
from reqat.evaluation.trace_tables import (
    META,
    REMEDY,
    SCHEMA,
    TOKENS,
    TRACE_FIELDS,
    TRACES,
    read_meta,
    read_traces,
    readable,
    require,
    require_types,
    token_schema,
)

if TYPE_CHECKING:
    import pandas as pd

# About 4 MiB of columns a precision: large enough to compress, small enough to lose little with a damaged page.
_GROUP_TOKENS = 65_536
# Rounding may leave an entropy this far below 0, or a probability this far above 1.
_SLACK = 1e-3


@dataclass(frozen=True)
class TraceInfo:
    """What is known of a trace besides its tokens.

    ``source`` is the label of the model that sampled it, or ``given``. ``correct`` is None where there is nothing to
    grade it by. ``finished`` is False where the response has no end marker (cut off by the token limit).
    """

    problem: str
    family: str
    seed: int
    source: str
    prompt: str
    response: str
    answer: str
    correct: bool | None
    finished: bool

    @property
    def name(self) -> str:
        """How errors call it."""
        return f"trace of problem {self.problem!r}, seed {self.seed}, source {self.source!r}"


@dataclass
class TokenColumns:
    """What one precision says of the N tokens of a trace.

    ``entropy`` (nats) and ``tail`` (1 minus the probability of the most likely token, without the cancellation that
    the subtraction would bring) are of the distribution that the token was drawn from; ``prob`` is the token's own
    probability; ``top`` and ``top_prob`` [N, K] are the most likely tokens, all float32 or int32. ``logprobs`` holds
    whole distributions [V] of the positions where they were asked for.
    """

    entropy: NDArray[np.float32]
    tail: NDArray[np.float32]
    prob: NDArray[np.float32]
    top: NDArray[np.int32]
    top_prob: NDArray[np.float32]
    logprobs: dict[int, NDArray[np.float32]] = field(default_factory=dict)

    def check(self, info: TraceInfo, label: str) -> None:
        """Raises `ReqatError` naming the trace and the position where a distribution is not one (NaN, infinite)."""
        bad = ~(np.isfinite(self.entropy) & np.isfinite(self.prob) & np.isfinite(self.tail))
        if bad.any():
            raise ReqatError(
                f"{info.name}: the distribution of {label} at position {int(bad.argmax())} is not finite "
                f"({int(bad.sum())} of {len(bad)} positions); look for NaN weights or a diverged run."
            )


class TraceWriter:
    """Writes a trace folder; used as a context manager, it leaves whole files or none.

    Args:
        folder: made if need be; traces that are there are not replaced.
        labels: the precisions, the reference first.
        vocabulary: the text of each token id.
        k: most likely tokens kept a position.
        logprobs: whether there is a column for whole distributions.
        metadata: further entries of ``meta.json`` (decoding, seeds, models).
        group_tokens: tokens of a row group.

    Raises `ReqatError` for labels that are missing or repeated, if the folder holds traces already, or if the system
    refuses to write.
    """

    def __init__(
        self,
        folder: Path | str,
        labels: Sequence[str],
        vocabulary: Sequence[str],
        *,
        k: int = 5,
        logprobs: bool = False,
        metadata: Mapping[str, Any] | None = None,
        group_tokens: int = _GROUP_TOKENS,
    ) -> None:
        if not labels or len(set(labels)) != len(labels):
            raise ReqatError(f"a trace file wants one or more different labels, got {list(labels)}.")
        self.folder, self.labels, self.vocabulary = Path(folder), tuple(labels), list(vocabulary)
        self.k = min(k, len(self.vocabulary))
        if self.k < 1:
            raise ReqatError(f"k={k} of a vocabulary of {len(self.vocabulary)}: at least one token must be kept.")
        self.metadata: dict[str, Any] = dict(metadata or {})
        self.left_out: list[dict[str, Any]] = []
        self.n_traces = self.n_tokens = 0
        self._logprobs, self._group_tokens = logprobs, group_tokens
        self._pending: list[tuple[NDArray[np.int32], Mapping[str, TokenColumns], int]] = []
        self._pending_tokens = 0
        self._infos: list[TraceInfo] = []
        self._lengths: list[int] = []
        for name in (META, TOKENS, TRACES):
            check_file(self.folder / name, never, replace=False)
        self._schema = token_schema(self.labels, logprobs=logprobs)
        self._trace_schema = pa.schema(TRACE_FIELDS)
        self._files = {name: unique(beside(self.folder / name, "partial")) for name in (TOKENS, TRACES)}
        with explaining(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            # Files of Python's: their errors name the reason, those of Arrow do not always.
            self._open: dict[str, BinaryIO] = {}
            try:
                for name, path in self._files.items():
                    self._open[name] = path.open("xb")
            except OSError:
                for path in self._files.values():
                    path.unlink(missing_ok=True)
                raise
        # Dictionaries pay for ids, not for floats that hardly repeat.
        self._tokens = pq.ParquetWriter(
            self._open[TOKENS],
            self._schema,
            compression="zstd",
            use_dictionary=["trace", "token", *(f"top_{label}.list.element" for label in self.labels)],
            write_page_checksum=True,
        )
        self._traces = pq.ParquetWriter(
            self._open[TRACES], self._trace_schema, compression="zstd", write_page_checksum=True
        )

    def check(self, info: TraceInfo, tokens_N: Sequence[int] | NDArray[np.int32]) -> NDArray[np.int32]:
        """The tokens as int32. Raises `ReqatError` naming the trace if it is empty or holds an unknown token id."""
        try:
            tokens = np.asarray(tokens_N, dtype=np.int64)
        except OverflowError:  # an id beyond 64 bits is as unknown as any other
            tokens = np.asarray(tokens_N, dtype=object)
        if tokens.size == 0:
            raise ReqatError(f"{info.name} is empty: it has no response token.")
        bad = (tokens < 0) | (tokens >= len(self.vocabulary))
        if bad.any():
            at = int(bad.argmax())
            raise ReqatError(
                f"{info.name}: unknown token id {int(tokens[at])} at position {at}; the vocabulary has "
                f"{len(self.vocabulary)} tokens. Was it made with another tokenizer?"
            )
        return tokens.astype(np.int32)

    def add(
        self, info: TraceInfo, tokens_N: Sequence[int] | NDArray[np.int32], columns: Mapping[str, TokenColumns]
    ) -> int:
        """Append a trace, with the columns of every label; returns its index.

        Raises `ReqatError` naming the trace if it is empty, holds an unknown token id or a distribution that is not
        finite, or lacks a label; nothing of it is written then.
        """
        tokens = self.check(info, tokens_N)
        missing = [label for label in self.labels if label not in columns]
        if missing:
            raise ReqatError(f"{info.name}: no statistics of {', '.join(missing)}.")
        for label in self.labels:
            if len(columns[label].entropy) != len(tokens):
                raise ReqatError(
                    f"{info.name}: {len(columns[label].entropy)} statistics of {label} for {len(tokens)} tokens."
                )
            columns[label].check(info, label)
        self._pending.append((tokens, columns, self.n_traces))
        self._pending_tokens += len(tokens)
        self._infos.append(info)
        self._lengths.append(len(tokens))
        self.n_traces += 1
        self.n_tokens += len(tokens)
        if self._pending_tokens >= self._group_tokens:
            with explaining(self.folder):
                self._flush()
        return self.n_traces - 1

    def leave_out(self, info: TraceInfo, reason: str) -> None:
        """Note in ``meta.json`` that a trace is not in the files, and why."""
        self.left_out.append({"problem": info.problem, "seed": info.seed, "source": info.source, "reason": reason})

    def _flush(self) -> None:
        if not self._pending:
            return
        arrays: list[pa.Array] = [
            pa.array(np.concatenate([np.full(len(t), i, dtype=np.int32) for t, _, i in self._pending])),
            pa.array(np.concatenate([np.arange(len(t), dtype=np.int32) for t, _, _ in self._pending])),
            pa.array(np.concatenate([t for t, _, _ in self._pending])),
        ]
        for label in self.labels:
            parts = [columns[label] for _, columns, _ in self._pending]
            arrays += [
                pa.array(np.concatenate([p.entropy for p in parts]).astype(np.float32, copy=False)),
                pa.array(np.concatenate([p.prob for p in parts]).astype(np.float32, copy=False)),
                _lists(np.concatenate([p.top for p in parts]).astype(np.int32, copy=False)),
                _lists(np.concatenate([p.top_prob for p in parts]).astype(np.float32, copy=False)),
                pa.array(np.concatenate([p.tail for p in parts]).astype(np.float32, copy=False)),
            ]
            if self._logprobs:
                rows: list[Any] = []
                for part in parts:
                    rows += [part.logprobs.get(i) for i in range(len(part.entropy))]
                arrays.append(pa.array(rows, type=pa.list_(pa.float32())))
        self._tokens.write_table(pa.Table.from_arrays(arrays, schema=self._schema), row_group_size=2**30)
        first = self._pending[0][2]
        rows_of = [
            {**vars(info), "trace": first + i, "tokens": n}
            for i, (info, n) in enumerate(zip(self._infos, self._lengths, strict=True))
        ]
        self._traces.write_table(pa.Table.from_pylist(rows_of, schema=self._trace_schema))
        self._pending, self._pending_tokens, self._infos, self._lengths = [], 0, [], []

    def close(self) -> Path:
        """Write what is pending and ``meta.json``; returns the folder. Raises `ReqatError` if there is no trace."""
        if self.n_traces == 0:
            self.abort()
            why = f" (all left out: {self.left_out[0]['reason']})" if self.left_out else ""
            raise ReqatError(f"there are no traces to write{why}")
        with explaining(self.folder):
            self._flush()
            for writer in (self._tokens, self._traces):
                writer.close()
            for file in self._open.values():
                file.flush()
                os.fsync(file.fileno())
                file.close()
            for name in (META, TOKENS, TRACES):
                check_file(self.folder / name, never, replace=False)
            for name, path in list(self._files.items()):
                os.replace(path, self.folder / name)
                self._files[name] = self.folder / name  # what abort() removes
        meta = {
            "schema": SCHEMA,
            "labels": list(self.labels),
            "k": self.k,
            "n": self.n_traces,
            "tokens": self.n_tokens,
            "left_out": self.left_out,
            **self.metadata,
            "vocabulary": self.vocabulary,
        }
        write_file(self.folder / META, json.dumps(meta, ensure_ascii=False, indent=None) + "\n")
        return self.folder

    def abort(self) -> None:
        """Take back what was written."""
        for end in (self._tokens.close, self._traces.close, *(file.close for file in self._open.values())):
            with contextlib.suppress(OSError, pa.ArrowException, ValueError):  # a full disk, for what is buffered
                end()
        for path in self._files.values():
            path.unlink(missing_ok=True)

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()
            return
        try:
            self.close()
        except BaseException:
            self.abort()
            raise


def _lists(values_NK: NDArray[Any]) -> pa.Array:
    """Rows of a matrix as a list column."""
    n, k = values_NK.shape
    return pa.ListArray.from_arrays(pa.array(np.arange(n + 1, dtype=np.int32) * k), pa.array(values_NK.reshape(-1)))


# -- reading ---------------------------------------------------------------------------------------------------------
class TraceFolder:
    """A trace folder, read by column.

    ``traces`` is the data frame of ``traces.parquet``; ``labels``, ``vocabulary``, ``k`` and ``meta`` are those of
    ``meta.json``; ``has_tail`` says whether tail masses are stored or follow from ``top_prob``. Arrays over tokens have
    one order: by trace, then position.

    Args:
        folder: what :class:`TraceWriter` wrote, or another program that keeps the contract.
        lost: what to do where a part of ``tokens.parquet`` cannot be read: ``raise``, or ``skip`` its traces and keep
            their indices in ``skipped``.

    Raises:
        ReqatError: no such files (`MissingFileError`, also a FileNotFoundError), damaged ones, or files that are not of
            one another; names the file and, where it can, the traces.
    """

    def __init__(self, folder: Path | str, *, lost: Literal["raise", "skip"] = "raise") -> None:
        self.folder = Path(folder)
        self.meta: dict[str, Any] = read_meta(self.folder)
        self.labels: tuple[str, ...] = tuple(self.meta["labels"])
        k, vocabulary = self.meta.get("k"), self.meta.get("vocabulary")
        if type(k) is not int or k < 1:
            raise ReqatError(f"{self.folder / META} is damaged: k is {k!r}, not a number of tokens; {REMEDY}.")
        if not isinstance(vocabulary, list) or not all(isinstance(text, str) for text in vocabulary):
            raise ReqatError(f"{self.folder / META} is damaged: its vocabulary is no list of texts; {REMEDY}.")
        self.k = k
        self.vocabulary: list[str] = vocabulary
        table = read_traces(self.folder)
        if empty := [name for name in ("trace", "tokens", "problem", "seed", "source") if table[name].null_count]:
            raise ReqatError(f"{self.folder / TRACES}: {empty[0]} is missing in some traces; {REMEDY}.")
        for key, counted in (("n", table.num_rows), ("tokens", pc.sum(table["tokens"]).as_py() or 0)):
            if self.meta.get(key, counted) != counted:
                raise ReqatError(
                    f"{self.folder / TRACES} does not belong to {META}: {key} is {counted}, there {self.meta[key]}; "
                    f"{REMEDY}."
                )
        self.traces: pd.DataFrame = table.to_pandas()
        self.skipped: list[int] = []
        self._open_tokens(lost)

    def _open_tokens(self, lost: str) -> None:
        path = self.folder / TOKENS
        with readable(path):
            self._file = pq.ParquetFile(path, page_checksum_verification=True)
        there = self._file.schema_arrow.names
        wanted = token_schema(self.labels).names
        self.has_tail = all(name in there for name in wanted if name.startswith("tail_"))
        require(path, [name for name in wanted if not name.startswith("tail_")], there)
        kinds = {field.name: field.type for field in token_schema(self.labels)}
        require_types(path, kinds, self._file.schema_arrow)
        self._groups = list(range(self._file.num_row_groups))
        self._check_groups(skip=lost == "skip")
        trace_N, position_N = self._read("trace"), self._read("position")
        keep = ~np.isin(trace_N, self.skipped)
        self._keep: NDArray[np.bool_] | None = None if keep.all() else keep
        trace_N, position_N = trace_N[keep], position_N[keep]
        starts = np.flatnonzero(np.diff(trace_N, prepend=-1) != 0)
        found = trace_N[starts]
        lengths = np.diff(np.append(starts, len(trace_N)))
        expected = self.traces[~self.traces["trace"].isin(self.skipped)]
        if len(found) != len(expected) or not (found == expected["trace"].to_numpy()).all():
            absent = sorted(set(expected["trace"].tolist()) - set(found.tolist()))
            which = f"no tokens of {self.name(absent[0])}" if absent else "its traces are not in order"
            raise ReqatError(f"{path} does not belong to {TRACES}: {which}; collect the traces again.")
        wrong = np.flatnonzero(lengths != expected["tokens"].to_numpy())
        if len(wrong):
            raise ReqatError(
                f"{path}: {self.name(int(found[wrong[0]]))} has {lengths[wrong[0]]} tokens, {TRACES} says "
                f"{expected['tokens'].iloc[wrong[0]]}; collect the traces again."
            )
        if not (position_N == np.arange(len(trace_N)) - np.repeat(starts, lengths)).all():
            raise ReqatError(f"{path}: the positions within a trace do not count up from 0; sort it first.")
        token_N = self._read("token")[keep]
        bad_N = ~((token_N >= 0) & (token_N < len(self.vocabulary)))  # a missing one is NaN
        if bad_N.any():
            at = int(bad_N.argmax())
            raise ReqatError(
                f"{path}: {self.name(int(trace_N[at]))} holds the token {token_N[at]}, the vocabulary in {META} has "
                f"{len(self.vocabulary)}; {REMEDY}."
            )
        self.traces = expected.reset_index(drop=True)
        self.starts: NDArray[np.int64] = starts.astype(np.int64)
        self.lengths: NDArray[np.int64] = lengths.astype(np.int64)
        self.n_tokens = len(trace_N)

    def _check_groups(self, *, skip: bool) -> None:
        """Read every column of every group once; what cannot be read is raised, or its traces are skipped."""
        for group in list(self._groups):
            try:
                self._file.read_row_group(group, use_threads=False)
            except (pa.ArrowException, OSError) as error:
                first, last = self._range(group)
                if not skip or first is None or last is None:
                    which = f" (traces {first} to {last}: {self.name(first)}, ...)" if first is not None else ""
                    raise ReqatError(
                        f"{self.folder / TOKENS}: row group {group}{which} is damaged ({error}); collect the traces "
                        "again, or read the rest with lost='skip'."
                    ) from None
                self._groups.remove(group)
                self.skipped += [i for i in range(first, last + 1) if i not in self.skipped]

    def _range(self, group: int) -> tuple[int | None, int | None]:
        """The first and last trace of a row group, from the statistics in the file's footer."""
        statistics = self._file.metadata.row_group(group).column(0).statistics
        return (statistics.min, statistics.max) if statistics is not None and statistics.has_min_max else (None, None)

    def name(self, trace: int) -> str:
        """How errors call a trace."""
        row = self.traces[self.traces["trace"] == trace]
        if row.empty:
            return f"trace {trace}"
        first = row.iloc[0]
        return f"trace {trace} of problem {first['problem']!r}, seed {first['seed']}, source {first['source']!r}"

    def _read(self, column: str) -> NDArray[Any]:
        parts = [self._file.read_row_group(g, columns=[column], use_threads=False)[column] for g in self._groups]
        return np.concatenate([p.to_numpy() for p in parts]) if parts else np.empty(0, dtype=np.int32)

    def _label(self, label: str) -> str:
        if label not in self.labels:
            raise unknown("precision label", label, self.labels, str(self.folder / TOKENS))
        return label

    def column(self, name: str) -> NDArray[Any]:
        """A plain column, [N]. Raises `ReqatError` naming the trace where a value is missing, NaN, or (of entropies and
        probabilities) none that a distribution has."""
        if name not in self._file.schema_arrow.names:
            raise unknown("column", name, self._file.schema_arrow.names, str(self.folder / TOKENS))
        values = self._read(name)
        values = values if self._keep is None else values[self._keep]
        good = np.isfinite(values) if values.dtype.kind == "f" else np.ones(len(values), dtype=bool)
        if name.startswith(("entropy_", "prob_", "tail_")):
            good &= (values >= -_SLACK) & (values <= (np.inf if name.startswith("entropy_") else 1 + _SLACK))
        if not good.all():
            at = int((~good).argmax())
            trace = int(self.trace_index[at])
            raise ReqatError(
                f"{self.folder / TOKENS}: {name} is {values[at]} in {self.name(int(self.traces['trace'].iloc[trace]))} "
                f"at position {at - int(self.starts[trace])}; collect that trace again or leave it out."
            )
        return values

    def entropy(self, label: str) -> NDArray[np.float32]:
        """Entropy in nats of each token's distribution, [N]."""
        return self.column(f"entropy_{self._label(label)}")

    def tail(self, label: str) -> NDArray[np.float64]:
        """1 minus the probability of the most likely token, [N]; from ``top_prob`` where a file has no such column."""
        if self.has_tail:
            return self.column(f"tail_{self._label(label)}").astype(np.float64)
        return np.maximum(1.0 - self._first(f"top_prob_{self._label(label)}").astype(np.float64), 0.0)

    def top1(self, label: str) -> NDArray[np.int32]:
        """The most likely token, [N]."""
        return self._first(f"top_{self._label(label)}")

    def top_at(self, label: str, at: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """The most likely tokens at the token ``at`` (of the N), most likely first, and their probabilities; [k] each.

        Reads one row group. Raises IndexError beyond the last token.
        """
        names = [f"top_{self._label(label)}", f"top_prob_{label}"]
        row = at if self._keep is None else int(np.flatnonzero(self._keep)[at])
        for group in self._groups:
            rows = self._file.metadata.row_group(group).num_rows
            if 0 <= row < rows:
                table = self._file.read_row_group(group, columns=names, use_threads=False)
                ids, probabilities = (table[name][row].as_py() for name in names)
                return np.asarray(ids, dtype=np.int32), np.asarray(probabilities, dtype=np.float32)
            row -= rows
        raise IndexError(f"token {at} of {self.n_tokens}")

    def _first(self, column: str) -> NDArray[Any]:
        """The first entry of each list of a column. A row group at a time, so that whole lists are never in memory."""
        parts = []
        for group in self._groups:
            lists = self._file.read_row_group(group, columns=[column], use_threads=False)[column].combine_chunks()
            lists = lists.chunk(0) if isinstance(lists, pa.ChunkedArray) else lists
            offsets = lists.offsets.to_numpy()
            if len(offsets) < 2 or lists.null_count or (np.diff(offsets) < 1).any():
                first, last = self._range(group)
                raise ReqatError(f"{self.folder / TOKENS}: {column} has empty lists in traces {first} to {last}.")
            parts.append(lists.values.to_numpy()[offsets[:-1]])
        values = np.concatenate(parts)
        return values if self._keep is None else values[self._keep]

    @cached_property
    def trace_index(self) -> NDArray[np.int32]:
        """The row in ``traces`` of each token, [N]."""
        return np.repeat(np.arange(len(self.traces), dtype=np.int32), self.lengths)

    def select(self, traces: NDArray[Any]) -> NDArray[np.bool_]:
        """Which tokens belong to the traces where the boolean array [traces] holds, [N]."""
        return np.repeat(np.asarray(traces, dtype=bool), self.lengths)
