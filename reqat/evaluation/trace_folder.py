"""Traces read back from a folder, whole or in windows that fit in memory; see :mod:`reqat.evaluation.trace_files`.

Shapes: N tokens, K most likely tokens, V vocabulary.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from reqat.config.errors import ReqatError, unknown
from reqat.evaluation.trace_tables import (
    META,
    REMEDY,
    TOKENS,
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

# Rounding may leave an entropy this far below 0, or a probability this far above 1.
_SLACK = 1e-3


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
