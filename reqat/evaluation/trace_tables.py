"""The files of a trace folder as tables: their columns, and reading them with every fault named.

:mod:`reqat.evaluation.trace_files` says what is in them; it writes them and reads them by column. Here are the parts
that look at a folder from outside: its description, its traces, and its tokens trace by trace. A file that is missing,
damaged, of another schema, or with a column of another type is a `ReqatError` that names it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from reqat.config.errors import MissingFileError, ReqatError
from reqat.config.files import explain, read_json

TOKENS, TRACES, META = "tokens.parquet", "traces.parquet", "meta.json"
SCHEMA = "reqat.traces/1"
REMEDY = "collect the traces again"
# Rows that are decoded at a time where traces are read one by one.
_BATCH_ROWS = 32_768
TRACE_FIELDS: tuple[tuple[str, Any], ...] = (
    ("trace", pa.int32()),
    ("problem", pa.string()),
    ("family", pa.string()),
    ("seed", pa.int32()),
    ("source", pa.string()),
    ("prompt", pa.string()),
    ("response", pa.string()),
    ("answer", pa.string()),
    ("correct", pa.bool_()),
    ("finished", pa.bool_()),
    ("tokens", pa.int32()),
)


def token_schema(labels: Sequence[str], *, logprobs: bool = False) -> pa.Schema:
    """Columns of ``tokens.parquet`` for these precisions, in their order."""
    fields = [("trace", pa.int32()), ("position", pa.int32()), ("token", pa.int32())]
    for label in labels:
        fields += [
            (f"entropy_{label}", pa.float32()),
            (f"prob_{label}", pa.float32()),
            (f"top_{label}", pa.list_(pa.int32())),
            (f"top_prob_{label}", pa.list_(pa.float32())),
            (f"tail_{label}", pa.float32()),
        ]
        if logprobs:
            fields.append((f"logprobs_{label}", pa.list_(pa.float32())))
    return pa.schema(fields)


@contextlib.contextmanager
def readable(path: Path, where: str = "") -> Iterator[None]:
    """Turns what pyarrow raises for a damaged file into a `ReqatError` that names it, and ``where`` in it.

    Raises `MissingFileError` (also a FileNotFoundError) where there is no file.
    """
    if not path.is_file():
        raise MissingFileError(f"no {path.name} in {path.parent}; `reqat entropy` writes a folder of traces.")
    try:
        yield
    except ReqatError:
        raise
    except PermissionError as error:
        raise explain(error, path) from None
    except (pa.ArrowException, OSError) as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ReqatError(
            f"{path} is damaged or cut short{f' {where}' if where else ''} ({line}); collect the traces again."
        ) from None


def require(path: Path, wanted: Iterable[str], there: Sequence[str]) -> None:
    """Raises `ReqatError` naming the columns that a file does not have."""
    missing = [name for name in wanted if name not in there]
    if missing:
        raise ReqatError(
            f"{path} lacks the columns {', '.join(missing)} (it has {', '.join(there)}); collect the traces again."
        )


def read_meta(folder: Path) -> dict[str, Any]:
    """``meta.json`` of this schema: ``labels`` one or more different texts, ``k`` at least 1
    where it is said.

    Raises `ReqatError` where there is none (`MissingFileError`), and for one that is damaged or of another schema.
    """
    path = folder / META
    with readable(path):
        meta = read_json(path, "description of traces", REMEDY)
    if "schema" in meta and meta["schema"] != SCHEMA:  # a program that keeps the contract need not name it
        raise ReqatError(f"{path}: schema {meta['schema']!r}, this version of reqat reads {SCHEMA!r}; {REMEDY}.")
    labels = meta.get("labels")
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) and label for label in labels):
        raise ReqatError(f"{path}: labels is {labels!r}, not a list of precisions; {REMEDY}.")
    if len(set(labels)) != len(labels):
        raise ReqatError(f"{path}: labels {labels} name a precision twice; {REMEDY}.")
    k = meta.get("k", 1)
    if type(k) is not int or k < 1:
        raise ReqatError(f"{path} is damaged: k is {k!r}, not a number of tokens; {REMEDY}.")
    return meta


def read_traces(folder: Path) -> pa.Table:
    """``traces.parquet``, every column that it has to have, in its type. Raises as :func:`read_meta` does."""
    path = folder / TRACES
    with readable(path):
        table = pq.ParquetFile(path, page_checksum_verification=True).read()
    names = [name for name, _ in TRACE_FIELDS]
    require(path, names, table.column_names)
    require_types(path, dict(TRACE_FIELDS), table.schema)
    return table.select(names)


def require_types(path: Path, wanted: Mapping[str, pa.DataType], there: pa.Schema) -> None:
    """Raises `ReqatError` naming the first column that holds another kind of value (numbers of any width are one
    kind). Columns that are not there are left to :func:`require`."""
    for name, kind in wanted.items():
        if name in there.names and _kind(there.field(name).type) != _kind(kind):
            raise ReqatError(f"{path}: {name} is of type {there.field(name).type}, not {kind}; {REMEDY}.")


def _kind(given: pa.DataType) -> str:
    """What a column's type means to a reader."""
    kinds = pa.types
    if kinds.is_list(given) or kinds.is_large_list(given) or kinds.is_fixed_size_list(given):
        return f"list of {_kind(given.value_type)}"
    if kinds.is_dictionary(given):
        return _kind(given.value_type)
    tests = (
        ("integer", kinds.is_integer),
        ("float", kinds.is_floating),
        ("text", lambda kind: kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_null(kind)),
        ("truth value", kinds.is_boolean),
    )
    return next((word for word, test in tests if test(given)), str(given))


def stream_tokens(
    folder: Path, names: Sequence[str], *, damaged: Callable[[ReqatError], None] | None = None
) -> Iterator[tuple[int, dict[str, pa.Array]]]:
    """Trace by trace, its number and its columns ``names`` of ``tokens.parquet``; one trace is in memory at a time.

    Args:
        damaged: told of each row group that cannot be read; a trace that is partly in it comes short, and the others
            are read all the same. None raises the first.

    Raises `ReqatError` for a file that is not there (`MissingFileError`), damaged, unsorted, or without a column.
    """
    path = folder / TOKENS
    names = ["trace", *(name for name in names if name != "trace")]
    held: list[pa.RecordBatch] = []
    seen: set[int] = set()
    last: int | None = None
    cut: int | None = None

    def finish() -> tuple[int, dict[str, pa.Array]]:
        table = pa.Table.from_batches(held)
        held.clear()
        assert last is not None
        seen.add(last)
        return last, {name: table[name].combine_chunks() for name in names}

    with readable(path):
        file = pq.ParquetFile(path, page_checksum_verification=True)
    with file:
        require(path, names, file.schema_arrow.names)
        labels = [name.removeprefix("entropy_") for name in file.schema_arrow.names if name.startswith("entropy_")]
        kinds = {field.name: field.type for field in token_schema(labels, logprobs=True) if field.name in names}
        require_types(path, kinds, file.schema_arrow)
        for group in range(file.num_row_groups):
            batches = file.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group], columns=names)
            while True:
                try:
                    with readable(path, f"in row group {group}" + ("" if last is None else f", after trace {last}")):
                        batch = next(batches, None)
                except ReqatError as error:
                    if damaged is None:
                        raise
                    damaged(error)
                    if held:  # whole, if it ended with the group before
                        yield finish()
                    cut = last
                    break
                if batch is None:
                    break
                if batch.column("trace").null_count:
                    raise ReqatError(f"{path}: a token without a trace after trace {last}; collect the traces again.")
                number_N = np.asarray(batch.column("trace").to_numpy(zero_copy_only=False))
                starts = [0, *(np.flatnonzero(np.diff(number_N)) + 1).tolist()] if len(number_N) else []
                for start, stop in zip(starts, [*starts[1:], len(number_N)], strict=True):
                    number = int(number_N[start])
                    if held and number != last:
                        yield finish()
                    if number in seen and number == cut:  # goes on after what was lost
                        continue
                    if number in seen:
                        raise ReqatError(f"{path} is not sorted: trace {number} comes twice; collect the traces again.")
                    last = number
                    held.append(batch.slice(start, stop - start))
    if held:
        yield finish()
