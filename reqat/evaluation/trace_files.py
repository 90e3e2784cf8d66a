"""Token traces on disk: statistics of every token of a response under each precision, in three files a folder.

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
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from reqat.config.errors import ReqatError
from reqat.config.files import beside, explaining, unique, write_file
from reqat.config.targets import check_file, never
from reqat.evaluation.trace_tables import (
    META,
    SCHEMA,
    TOKENS,
    TRACE_FIELDS,
    TRACES,
    token_schema,
)

# About 4 MiB of columns a precision: large enough to compress, small enough to lose little with a damaged page.
_GROUP_TOKENS = 65_536


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
