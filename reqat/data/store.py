"""The trace store: a folder of tokenized traces in a fixed order, with a manifest of digests.

Two forms, told apart by the manifest. *Lines*: ``train.jsonl``, one JSON object a trace, with its texts; what the
families generate. *Arrays*: ``train.ids`` (int32, little-endian) and ``train.index`` (int64 [n, 4]: tokens without
``<bos>``, tokens of the prompt, whether ``<bos>`` comes first, row of the source), which are mapped instead of read;
what a file of somebody's own traces becomes. Either way a stage sees :class:`~reqat.data.traces.Traces`.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reqat.config.errors import MissingFileError, ReqatError
from reqat.config.files import explaining, parse_json, read_json, write_file
from reqat.config.targets import check_file, never
from reqat.data.traces import IDS, Trace, Traces

MANIFEST = "manifest.json"
_REMEDY = "delete the folder and make the traces again (`reqat stage` of the data stage)"
_REMEDY_OWN = "delete the folder and make the traces again (the same `reqat train`)"  # of arrays
_COLUMNS = 4  # of an index
OWN = "own"
"""Family of traces that no family here generated."""


@dataclass(frozen=True)
class TraceStore:
    """Traces in their order, with the digest of the files they came from."""

    traces: Traces
    digest: str

    @property
    def n_tokens(self) -> int:
        """Tokens of all traces."""
        return self.traces.n_tokens

    @classmethod
    def read(cls, folder: Path, name: str = "train") -> TraceStore:
        """Read the traces ``name`` of ``folder`` and check them against the manifest. Arrays are mapped: token ids take
        memory where they are looked at.

        Raises `ReqatError` naming the file (and line) where a file is missing (`MissingFileError`, also a
        ``FileNotFoundError``), or the traces are empty, truncated, altered, or no traces.
        """
        manifest = folder / MANIFEST
        lines, ids = folder / f"{name}.jsonl", folder / f"{name}.ids"
        arrays = ids.is_file() or (folder / f"{name}.index").is_file()
        remedy = _REMEDY_OWN if arrays else _REMEDY
        for needed in (ids if arrays else lines, manifest):
            if not needed.is_file():
                first = "write the traces first (`reqat stage` of the data stage)"
                raise MissingFileError(f"no {needed.name} in {folder}; {remedy if arrays else first}")
        expected = _entry(manifest, name, remedy)
        if "index" in expected:
            traces, digest = _read_arrays(folder, name, expected)
        else:
            digest = _checked(lines, expected, remedy)
            traces = _read_lines(lines)
        store = cls(traces, digest)
        path = ids if "index" in expected else lines
        for key, counted in (("traces", len(traces)), ("tokens", store.n_tokens)):
            if expected.get(key, counted) != counted:
                raise ReqatError(f"trace file {path} has {counted} {key}, {MANIFEST} says {expected[key]}; {remedy}")
        return store


def _checked(path: Path, expected: dict[str, Any], remedy: str) -> str:
    """sha256 of a file. Raises `ReqatError` if the manifest states another one, or another size."""
    if not path.is_file():
        raise MissingFileError(f"no {path.name} in {path.parent}, which its {MANIFEST} lists; {remedy}")
    with explaining(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if (digest, size) != (expected["sha256"], expected["bytes"]):
        raise ReqatError(
            f"trace file {path} is damaged or truncated: {size} bytes with digest {digest[:12]}, its manifest says "
            f"{expected['bytes']} bytes with {expected['sha256'][:12]}; {remedy}"
        )
    return digest


def _read_lines(path: Path) -> Traces:
    """The traces of a file of JSON lines; texts stay there until they are asked for."""
    ids, starts, prompts, bos = array("i"), array("q", [0]), array("q"), array("b")
    places = array("q")
    seen: Counter[str] = Counter()
    with explaining(path), path.open("rb") as file:
        at = 0
        # Not text lines: those also break at U+2028 and other separators within a JSON text.
        for number, line in enumerate(file, start=1):
            try:
                text = line.removesuffix(b"\n").decode("utf-8")
            except UnicodeDecodeError as error:
                raise ReqatError(f"trace file {path}: byte {at + error.start} is not UTF-8; {_REMEDY}") from None
            trace = _trace(text, f"{path}, line {number}")
            ids.extend((*trace.prompt_ids, *trace.response_ids))
            starts.append(len(ids))
            prompts.append(len(trace.prompt_ids))
            bos.append(trace.bos)
            places.append(at)
            seen[trace.id] += 1
            at += len(line)
    if not places:
        raise ReqatError(f"trace file {path} is empty; ask for at least one trace")
    if len(seen) != len(places):
        twice = next(id for id, n in seen.items() if n > 1)
        raise ReqatError(f"trace file {path}: the trace {twice!r} is in it twice; {_REMEDY}")

    def texts(number: int) -> tuple[str, str, str, str, str]:
        with explaining(path), path.open("rb") as file:
            file.seek(places[number])
            t = _trace(file.readline().removesuffix(b"\n").decode("utf-8", "replace"), f"{path}, line {number + 1}")
        return t.id, t.problem_id, t.family, t.prompt, t.response

    return Traces(np.array(ids), np.array(starts), np.array(prompts), np.array(bos, dtype=bool), texts)


def _read_arrays(folder: Path, name: str, expected: dict[str, Any]) -> tuple[Traces, str]:
    """The traces of a store of arrays, mapped, and the digest of both files."""
    path, index_path = folder / f"{name}.ids", folder / f"{name}.index"
    listed = expected["index"]
    if not (isinstance(listed, dict) and isinstance(listed.get("sha256"), str) and type(listed.get("bytes")) is int):
        raise ReqatError(f"{folder / MANIFEST}: index is {listed!r}, where sha256 and bytes are needed; {_REMEDY_OWN}")
    digests = _checked(path, expected, _REMEDY_OWN) + _checked(index_path, listed, _REMEDY_OWN)
    digest = hashlib.sha256(digests.encode()).hexdigest()
    index = np.fromfile(index_path, dtype="<i8")
    if len(index) % _COLUMNS or not len(index):
        raise ReqatError(f"trace file {index_path} holds {len(index)} numbers, no index of traces; {_REMEDY_OWN}")
    lengths, prompts, bos, rows = index.reshape(-1, _COLUMNS).T
    starts = np.concatenate([[0], np.cumsum(lengths)])
    whole = (lengths > prompts).all() and (prompts >= 0).all() and np.isin(bos, (0, 1)).all()
    if not whole or starts[-1] * 4 != expected["bytes"]:
        raise ReqatError(f"trace file {index_path} does not describe {path.name}; {_REMEDY_OWN}")

    def texts(number: int) -> tuple[str, str, str, str, str]:
        id = f"row-{rows[number]}"
        return id, id, OWN, "", ""

    mapped = np.memmap(path, dtype="<i4", mode="r")
    return Traces(mapped, starts, prompts.copy(), bos.astype(bool), texts), digest


def _entry(manifest: Path, name: str, remedy: str) -> dict[str, Any]:
    """What the manifest says of a file: sha256 and bytes, perhaps traces and tokens, of arrays the index."""
    files = read_json(manifest, "manifest of traces", remedy).get("files")
    if not isinstance(files, dict):
        raise ReqatError(f"{manifest}: files is {files!r}, where an object is needed; {remedy}")
    if name not in files:
        raise ReqatError(f"{manifest} does not list {name!r}; it was written for other traces; {remedy}")
    entry = files[name]
    whole = isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and type(entry.get("bytes")) is int
    if not whole:
        raise ReqatError(f"{manifest}: {name} is {entry!r}, where sha256 and bytes are needed; {remedy}")
    return dict(entry)


def _trace(line: str, where: str) -> Trace:
    """The trace in a line of JSON; ``where`` names file and line."""
    row = parse_json(line, where, "trace", _REMEDY)
    keys = {field.name for field in fields(Trace)} - {"bos"}
    if not isinstance(row, dict) or row.keys() - {"bos"} != keys:
        wrong = sorted(keys.symmetric_difference(row.keys() - {"bos"})) if isinstance(row, dict) else ["no object"]
        raise ReqatError(f"{where}: not a trace, missing or unknown: {', '.join(map(str, wrong))}; {_REMEDY}")
    for key, value in row.items():
        if key == "bos":
            if type(value) is not bool:
                raise ReqatError(f"{where}: bos is {value!r}, where true or false is needed; {_REMEDY}")
        elif not key.endswith("_ids"):
            if not isinstance(value, str):
                raise ReqatError(f"{where}: {key} is {value!r}, where a text is needed; {_REMEDY}")
        elif not isinstance(value, list) or not all(type(id) is int and 0 <= id < IDS for id in value):
            bad = next((id for id in value if type(id) is not int or not 0 <= id < IDS), value) if value else value
            raise ReqatError(f"{where}: {key} holds {bad!r}, where token ids (0 or more) are needed; {_REMEDY}")
        else:
            row[key] = tuple(value)
    if not row["response_ids"]:
        raise ReqatError(f"{where}: response_ids is empty; a trace has a response. {_REMEDY.capitalize()}")
    return Trace(**row)


def _row(trace: Trace) -> dict[str, object]:
    row = asdict(trace)
    if trace.bos:
        del row["bos"]
    return row


def write_store(folder: Path, files: dict[str, Iterable[Trace]]) -> None:
    """Write each iterable of traces to ``folder/NAME.jsonl`` and the manifest last, so that a whole manifest means
    whole files. A store that is there already is not replaced.

    Raises `ReqatError` for a name without traces, if one of the files is there already, or if the system refuses to
    write; what was written is removed then.
    """
    for name in [*(f"{name}.jsonl" for name in files), MANIFEST]:
        check_file(folder / name, never, replace=False)
    with explaining(folder):
        folder.mkdir(parents=True, exist_ok=True)
        made: list[Path] = []
        try:
            _write_store(folder, files, made)
        except BaseException:
            for path in made:
                path.unlink(missing_ok=True)
            raise


def _write_store(folder: Path, files: dict[str, Iterable[Trace]], made: list[Path]) -> None:
    entries: dict[str, dict[str, object]] = {}
    for name, traces in files.items():
        digest, n_bytes, n_traces, n_tokens = hashlib.sha256(), 0, 0, 0
        with open(folder / f"{name}.jsonl", "xb") as f:
            made.append(folder / f"{name}.jsonl")
            for trace in traces:
                line = json.dumps(_row(trace), separators=(",", ":")).encode() + b"\n"
                f.write(line)
                digest.update(line)
                n_bytes, n_traces, n_tokens = n_bytes + len(line), n_traces + 1, n_tokens + trace.n_tokens
            f.flush()
            os.fsync(f.fileno())
        if not n_traces:
            raise ReqatError(f"no traces for {name!r}; ask for at least one")
        entries[name] = {"sha256": digest.hexdigest(), "bytes": n_bytes, "traces": n_traces, "tokens": n_tokens}
    write_file(folder / MANIFEST, json.dumps({"files": entries}, indent=1, sort_keys=True) + "\n")


def write_arrays(folder: Path, name: str, parts: Iterable[tuple[NDArray[Any], NDArray[Any]]]) -> None:
    """Write traces as arrays, and the manifest last: of each part the ids of its traces one after the other, and its
    rows of the index [n, 4]. ``folder`` is a job's own, or new.

    Raises `ReqatError` for no traces, or if the system refuses to write.
    """
    path, index_path = folder / f"{name}.ids", folder / f"{name}.index"
    for target in (path, index_path, folder / MANIFEST):
        check_file(target, never, replace=False)
    digests, sizes, n_traces, n_tokens = (hashlib.sha256(), hashlib.sha256()), [0, 0], 0, 0
    with explaining(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as ids_file, index_path.open("xb") as index_file:
            for ids, index in parts:
                given = (np.ascontiguousarray(ids, dtype="<i4"), np.ascontiguousarray(index, dtype="<i8"))
                for i, (file, numbers) in enumerate(zip((ids_file, index_file), given, strict=True)):
                    file.write(numbers.data)
                    digests[i].update(numbers.data)
                    sizes[i] += numbers.nbytes
                n_traces += len(given[1])
                n_tokens += int(given[1][:, 0].sum() + given[1][:, 2].sum())
            for file in (ids_file, index_file):
                file.flush()
                os.fsync(file.fileno())
    if not n_traces:
        raise ReqatError(f"no traces for {name!r}; ask for at least one")
    entry = {"sha256": digests[0].hexdigest(), "bytes": sizes[0], "traces": n_traces, "tokens": n_tokens}
    entry["index"] = {"sha256": digests[1].hexdigest(), "bytes": sizes[1]}
    write_file(folder / MANIFEST, json.dumps({"files": {name: entry}}, indent=1, sort_keys=True) + "\n")
