"""The ordered store of tokenized traces that every training stage reads.

TAQ is a statement about data: stage 2 must see the very traces of stage 1, token by token (ReQAT section 3.2). The
store makes that checkable. It is one JSON line a trace in a fixed order, with token ids, and a manifest with its
digest; a stage takes a contiguous range of it by token count, so "the same traces" is a prefix and "different traces"
is what follows.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from reqat.config.errors import MissingFileError, ReqatError
from reqat.config.files import explaining, parse_json, read_json, write_file
from reqat.config.targets import check_file, never

MANIFEST = "manifest.json"
_REMEDY = "delete the folder and make the traces again (`reqat stage` of the data stage)"
_IDS = 2**31  # token ids lie below


@dataclass(frozen=True)
class Trace:
    """One prompt and verified response. Ids exclude ``<bos>``; ``response_ids`` ends with the end-of-sequence token.

    ``bos`` says whether ``<bos>`` comes before ``prompt_ids``: a chat template may write none. A store holds the key
    only where it is false.
    """

    id: str
    problem_id: str
    family: str
    prompt: str
    response: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    bos: bool = True

    @property
    def n_tokens(self) -> int:
        """Tokens of the trace as trained on, with its ``<bos>`` if it has one."""
        return int(self.bos) + len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class TraceStore:
    """Traces in their order, with the digest of the file they came from."""

    traces: tuple[Trace, ...]
    digest: str

    @property
    def n_tokens(self) -> int:
        """Tokens of all traces."""
        return sum(t.n_tokens for t in self.traces)

    @classmethod
    def read(cls, folder: Path, name: str = "train") -> TraceStore:
        """Read ``folder/name.jsonl`` and check it against the manifest.

        Raises `ReqatError` naming the file (and line) where either file is missing (`MissingFileError`, also a
        ``FileNotFoundError``), or the traces are empty, truncated, altered, or no traces.
        """
        path, manifest_path = folder / f"{name}.jsonl", folder / MANIFEST
        for needed in (path, manifest_path):
            if not needed.is_file():
                raise MissingFileError(
                    f"no {needed.name} in {folder}; write the traces first (`reqat stage` of the data stage)"
                )
        expected = _entry(manifest_path, name)
        with explaining(path):
            data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if (digest, len(data)) != (expected["sha256"], expected["bytes"]):
            raise ReqatError(
                f"trace file {path} is damaged or truncated: {len(data)} bytes with digest {digest[:12]}, its "
                f"manifest says "
                f"{expected['bytes']} bytes with {expected['sha256'][:12]}; delete the folder and make it again"
            )
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ReqatError(f"trace file {path}: byte {error.start} is not UTF-8; {_REMEDY}") from None
        # Not splitlines(), which also breaks at U+2028 and other separators within a JSON text.
        lines = text.removesuffix("\n").split("\n") if text else []
        traces = tuple(_trace(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1))
        if not traces:
            raise ReqatError(f"trace file {path} is empty; ask for at least one trace")
        if len({trace.id for trace in traces}) != len(traces):
            twice = next(id for id, n in Counter(trace.id for trace in traces).items() if n > 1)
            raise ReqatError(f"trace file {path}: the trace {twice!r} is in it twice; {_REMEDY}")
        store = cls(traces, digest)
        for key, counted in (("traces", len(traces)), ("tokens", store.n_tokens)):
            if expected.get(key, counted) != counted:
                raise ReqatError(f"trace file {path} has {counted} {key}, {MANIFEST} says {expected[key]}; {_REMEDY}")
        return store


def _entry(manifest: Path, name: str) -> dict[str, Any]:
    """What the manifest says of a file: sha256 and bytes, perhaps traces and tokens."""
    files = read_json(manifest, "manifest of traces", _REMEDY).get("files")
    if not isinstance(files, dict):
        raise ReqatError(f"{manifest}: files is {files!r}, where an object is needed; {_REMEDY}")
    if name not in files:
        raise ReqatError(f"{manifest} does not list {name!r}; it was written for other traces, make it again")
    entry = files[name]
    whole = isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and type(entry.get("bytes")) is int
    if not whole:
        raise ReqatError(f"{manifest}: {name} is {entry!r}, where sha256 and bytes are needed; {_REMEDY}")
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
        elif not isinstance(value, list) or not all(type(id) is int and 0 <= id < _IDS for id in value):
            bad = next((id for id in value if type(id) is not int or not 0 <= id < _IDS), value) if value else value
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


def select(traces: Sequence[Trace], tokens: int, *, skip_tokens: int = 0) -> list[Trace]:
    """The contiguous range that starts after ``skip_tokens`` tokens and holds ``tokens`` tokens, both rounded up to
    whole traces.

    The first ranges of equal ``skip_tokens`` are prefixes of one another; a range with ``skip_tokens=k`` starts where
    one of ``tokens=k`` ends. Raises ``ReqatError`` where the store is too small, naming both numbers.
    """
    if tokens < 1 or skip_tokens < 0:
        raise ReqatError(
            f"select() wants tokens >= 1 and skip_tokens >= 0, got tokens={tokens}, skip_tokens={skip_tokens}"
        )
    out: list[Trace] = []
    passed = taken = 0
    for trace in traces:
        if passed < skip_tokens:
            passed += trace.n_tokens
        elif taken < tokens:
            taken += trace.n_tokens
            out.append(trace)
        else:
            break
    if taken < tokens:
        total = sum(t.n_tokens for t in traces)
        raise ReqatError(
            f"{tokens} tokens after the first {skip_tokens} were asked for, the store holds {total}; write more traces"
        )
    return out
