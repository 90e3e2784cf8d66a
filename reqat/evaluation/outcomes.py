"""Outcomes of an evaluation: one graded response a row, with its problem and sampling seed.

Tables and tests of significance are functions of these rows alone. The file is Parquet, written under another name and
renamed when it is whole, sealed with a digest of its content: a file that was cut short or altered is refused, never
read as a smaller result. The digest covers the rows in a fixed order, so it is the same however a batch was composed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from reqat.config.errors import MissingFileError, ReqatError
from reqat.config.files import explain, parse_json
from reqat.config.targets import making_file

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

SCHEMA = "reqat.outcomes/1"
"""Of the Parquet file, in its metadata."""
# Column -> type, in the file and in the digest. `response` may be missing.
_COLUMNS: dict[str, type] = {
    "problem_id": str,
    "family": str,
    "seed": int,
    "correct": bool,
    "n_tokens": int,
    "finished": bool,
    "response": str,
}


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Graded responses, as columns of equal length.

    ``n_tokens`` counts generated tokens with the end-of-sequence token; ``finished`` is False where the token limit cut
    a response off (it is graded as it stands). ``response`` is None where responses were not kept. ``metadata`` holds
    what the evaluation was run with (decoding, max_new_tokens); it is stored, and no part of the digest.

    Raises ``ReqatError`` for columns of different lengths, no rows, or a problem answered twice with one seed.
    """

    problem_id: tuple[str, ...]
    family: tuple[str, ...]
    seed: NDArray[np.int64]
    correct: NDArray[np.bool_]
    n_tokens: NDArray[np.int64]
    finished: NDArray[np.bool_]
    response: tuple[str, ...] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Bring the columns into their types and check them against each other."""
        for name in ("problem_id", "family", "response"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        for name, dtype in (("seed", np.int64), ("correct", bool), ("n_tokens", np.int64), ("finished", bool)):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=dtype))
        lengths = {name: len(values) for name, values in self.columns().items()}
        if len(set(lengths.values())) != 1:
            raise ReqatError(f"outcomes have columns of different lengths: {lengths}")
        if len(self.n_tokens) and int(self.n_tokens.min()) < 0:
            raise ReqatError(f"outcomes have a response of {int(self.n_tokens.min())} tokens; it must be 0 or more")
        if not self.problem_id:
            raise ReqatError("outcomes are empty; evaluate at least one problem")
        seen: set[tuple[str, int]] = set()
        for pair in zip(self.problem_id, self.seed.tolist(), strict=True):
            if pair in seen:
                raise ReqatError(f"problem {pair[0]!r} has two outcomes with seed {pair[1]}; keep one of them")
            seen.add(pair)

    def __len__(self) -> int:
        """Rows: problems times seeds."""
        return len(self.problem_id)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The sampling seeds, ascending."""
        return tuple(np.unique(self.seed).tolist())

    @property
    def n_problems(self) -> int:
        """Distinct problems."""
        return len(set(self.problem_id))

    @property
    def n_unfinished(self) -> int:
        """Responses that the token limit cut off."""
        return int((~self.finished).sum())

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the content: every column, rows ordered by problem and seed."""
        hasher = hashlib.sha256(SCHEMA.encode())
        for row in sorted(zip(*self._python_columns().values(), strict=True), key=lambda r: (r[0], r[2])):
            hasher.update(json.dumps(row, ensure_ascii=True, separators=(",", ":")).encode() + b"\n")
        return hasher.hexdigest()

    def columns(self) -> dict[str, Sequence[Any] | NDArray[Any]]:
        """The columns by name, without ``response`` where there is none."""
        return {name: getattr(self, name) for name in _COLUMNS if getattr(self, name) is not None}

    def _python_columns(self) -> dict[str, list[Any]]:
        return {k: v.tolist() if isinstance(v, np.ndarray) else list(v) for k, v in self.columns().items()}

    def to_pandas(self) -> pd.DataFrame:
        """A data frame with one row a response."""
        import pandas as pd

        return pd.DataFrame(self._python_columns())

    def select(self, rows: NDArray[Any]) -> Outcomes:
        """The rows picked by an index or boolean array."""
        index = np.arange(len(self))[rows].tolist()
        return Outcomes(
            problem_id=tuple(self.problem_id[i] for i in index),
            family=tuple(self.family[i] for i in index),
            seed=self.seed[index],
            correct=self.correct[index],
            n_tokens=self.n_tokens[index],
            finished=self.finished[index],
            response=None if self.response is None else tuple(self.response[i] for i in index),
            metadata=self.metadata,
        )

    @classmethod
    def joined(cls, parts: Sequence[Outcomes], problems: Sequence[str], seeds: Sequence[int]) -> Outcomes:
        """The outcomes of parts as one evaluation gives them: rows ordered by problem, then seed, both as listed.

        Raises `ReqatError` naming what is missing or not asked for, or that was run with other settings in one part.
        """
        if any(part.metadata != parts[0].metadata for part in parts):
            raise ReqatError(f"parts were run with different settings: {[dict(part.metadata) for part in parts]}")
        columns: dict[str, list[Any]] = {}
        for part in parts:
            for name, values in part._python_columns().items():
                columns.setdefault(name, []).extend(values)
        whole = cls(**columns, metadata=parts[0].metadata)  # type: ignore[arg-type]
        place = {pair: i for i, pair in enumerate(zip(whole.problem_id, whole.seed.tolist(), strict=True))}
        wanted = [(id, seed) for id in problems for seed in seeds]
        if different := sorted(place.keys() ^ set(wanted)):
            missing = different[0] in wanted
            what = "missing from" if missing else "in"
            raise ReqatError(f"problem {different[0][0]!r} with seed {different[0][1]} is {what} the parts"
                             f"{'' if missing else ', and not asked for'}; run them again.")  # fmt: skip
        return whole.select(np.array([place[pair] for pair in wanted]))

    def to_table(self) -> pa.Table:
        """The table of the Parquet file, with the seal and the rest of its metadata."""
        import pyarrow as pa

        columns = self._python_columns()
        metadata = json.dumps(dict(self.metadata), sort_keys=True)
        schema = pa.schema(
            [(name, _arrow_type(name)) for name in columns],
            metadata={"schema": SCHEMA, "metadata": metadata, "seal": _seal(self.digest, metadata)},
        )
        return pa.table(columns, schema=schema)

    def to_parquet(self, path: Path | str, *, overwrite: bool = False) -> None:
        """Write atomically: a reader finds the old file, the whole new one, or none.

        Outcomes that are there are replaced only with ``overwrite``, anything else never. Raises `ReqatError` then, or
        if the system refuses to write (a full disk, for one), after removing what was written so far.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path, table = Path(path), self.to_table()
        with making_file(path, _is_ours, replace=overwrite) as write:
            written = pa.BufferOutputStream()
            pq.write_table(table, written, compression="zstd")
            write(written.getvalue().to_pybytes())

    @classmethod
    def from_parquet(cls, path: Path | str) -> Outcomes:
        """Read a file of :meth:`to_parquet` and check its digest.

        Raises `ReqatError` where there is none (`MissingFileError`, also a ``FileNotFoundError``), or where it is
        damaged, cut short, altered, or no file of outcomes.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = Path(path)
        if not path.is_file():
            raise MissingFileError(f"no outcomes at {path}; run the evaluation that writes it first")
        remedy = "delete it and run its evaluation again"
        try:
            with open(path, "rb") as file:
                table = pq.read_table(file)
            stored = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
            if stored.get("schema") != SCHEMA:
                found = f"{stored.get('schema')!r} with columns {', '.join(table.column_names)}"
                raise ReqatError(f"{path} is no outcomes file of schema {SCHEMA!r} but {found}; {remedy}")
            missing = set(_COLUMNS) - {"response"} - set(table.column_names)
            mistyped = [n for n in table.column_names if n in _COLUMNS and table.schema.field(n).type != _arrow_type(n)]
            if missing or mistyped or any(column.null_count for column in table.columns):
                bad = ", ".join([*sorted(missing), *mistyped]) or "some values"
                raise ReqatError(f"outcomes file {path} is damaged: {bad} missing or of the wrong type; {remedy}")
            columns = {name: table[name].to_pylist() for name in table.column_names if name in _COLUMNS}
            metadata = parse_json(stored["metadata"], f"outcomes file {path}", "text of metadata", remedy)
            if not isinstance(metadata, dict):
                raise ReqatError(f"outcomes file {path} is damaged: its metadata is {metadata!r}; {remedy}")
            try:
                outcomes = cls(**columns, metadata=metadata)
            except ReqatError as error:  # of rows: a problem twice, none at all
                raise ReqatError(f"outcomes file {path} is damaged: {error}; {remedy}") from None
        except ReqatError:
            raise
        except PermissionError as error:
            raise explain(error, path) from error
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise ReqatError(f"outcomes file {path} is damaged or cut short ({error}); {remedy}") from error
        if stored.get("seal") != _seal(outcomes.digest, stored["metadata"]):
            raise ReqatError(f"outcomes file {path} was altered after it was written; {remedy}")
        return outcomes


def _is_ours(path: Path) -> bool:
    """Whether a file is one of :meth:`Outcomes.to_parquet`, whole or not."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return (pq.read_schema(path).metadata or {}).get(b"schema") == SCHEMA.encode()
    except (pa.ArrowException, OSError):
        return False


def _arrow_type(column: str) -> Any:
    """The type of a column in the file."""
    import pyarrow as pa

    return {str: pa.string(), int: pa.int64(), bool: pa.bool_()}[_COLUMNS[column]]


def _seal(digest: str, metadata: str) -> str:
    """What the file must say of its own content."""
    return hashlib.sha256(f"{digest}|{metadata}".encode()).hexdigest()
