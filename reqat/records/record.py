"""`record.json`: what a job leaves beside its result, written last, so that a record present means a result whole.

A job works in a folder of its own. When its files are there they are hashed, the record is written among them,
everything is flushed to disk, and the folder is renamed into place: one system call between "nothing" (or the old
result) and "all of it". A full disk or Ctrl-C leaves nothing; after a crash the next attempt clears the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from types import NoneType
from typing import Any

from pydantic import BaseModel

from reqat.config.base import digest
from reqat.config.errors import MissingFileError, ReqatError
from reqat.config.files import explaining, flush, read_json, write_file
from reqat.config.targets import Names, making
from reqat.records import provenance

FILE = "record.json"
SCHEMA_VERSION = 1
# What every record has, and what it is; then what most have.
_TYPES: dict[str, type | tuple[type, ...]] = {
    "schema_version": int,
    "kind": str,
    "id": str,
    "config": dict,
    "config_sha256": str,
    "commit": (str, NoneType),
    "dirty": (bool, NoneType),
    "versions": dict,
    "hardware": dict,
    "outputs": dict,
    "metrics": dict,
}
_MORE_TYPES: dict[str, type | tuple[type, ...]] = {
    "tier": (str, NoneType),
    "inputs": dict,
    "seeds": list,
    "pinned_outputs": dict,
    "wall_s": (int, float),
    "peak_memory_bytes": (int, NoneType),
}
_KEYS = tuple(_TYPES)


def sha256(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def entry(path: Path) -> dict[str, Any]:
    """sha256 and bytes of a file."""
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


def files(folder: Path) -> dict[str, dict[str, Any]]:
    """Path within `folder` -> sha256 and bytes, of every file."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): entry(path) for path in found}


def outputs(folder: Path) -> dict[str, dict[str, Any]]:
    """`files` without the record."""
    return {name: entry for name, entry in files(folder).items() if name != FILE}


def read(folder: Path) -> dict[str, Any]:
    """The record of a finished job. Raises `ReqatError` naming file and remedy if there is none (`MissingFileError`),
    or it is not a whole record of a known version."""
    path = folder / FILE
    if not path.exists():
        raise MissingFileError(
            f"{folder}: no {FILE}, so nothing finished here; run the stage or evaluation that makes it."
        )
    remedy = f"delete {folder} and run its stage again"
    record = read_json(path, "whole record", remedy)
    missing = [key for key in _KEYS if key not in record]
    if missing:
        raise ReqatError(f"{path}: not a record, it lacks {', '.join(missing)}; {remedy}.")
    if record["schema_version"] != SCHEMA_VERSION:
        raise ReqatError(f"{path}: record version {record['schema_version']}, this version reads {SCHEMA_VERSION}.")
    for key, types in (_TYPES | _MORE_TYPES).items():
        if key in record and not isinstance(record[key], types):
            raise ReqatError(f"{path}: {key} is {_short(record[key])}, which no record has there; {remedy}.")
    for key in ("outputs", "pinned_outputs"):
        for name, entry in record.get(key, {}).items():
            _check_output(path, key, name, entry, remedy)
    for role, given in record.get("inputs", {}).items():
        # Of a stage its digest; of a folder that the user named, the digests of its weights.
        digests = (given.get("sha256", given.get("weights")),) if isinstance(given, dict) else ()
        if not (digests and isinstance(given.get("id"), str) and isinstance(digests[0], str | dict)):
            raise ReqatError(f"{path}: the input {role} is {_short(given)}, not an id and a sha256; {remedy}.")
    if (place := _not_finite(record, "")) is not None:
        raise ReqatError(f"{path}: {place} is NaN or infinite, which no record of ours holds; {remedy}.")
    return record


def _check_output(path: Path, key: str, name: str, entry: Any, remedy: str) -> None:
    """An output lies in the record's folder, and has a sha256 and a size."""
    within = PurePosixPath(name)
    if not name or within.is_absolute() or ".." in within.parts or "\0" in name:
        raise ReqatError(f"{path}: {key} names {name!r}, which does not lie in the record's folder; {remedy}.")
    valid = (
        isinstance(entry, dict)
        and re.fullmatch("[0-9a-f]{64}", str(entry.get("sha256")))
        and type(entry.get("bytes")) is int
        and entry["bytes"] >= 0
    )
    if not valid:
        raise ReqatError(f"{path}: {key} says {_short(entry)} of {name}, not a sha256 and bytes; {remedy}.")


def _not_finite(value: Any, place: str) -> str | None:
    """Where in a record there is a NaN or an infinity, as `metrics.accuracy`; None if nowhere."""
    if isinstance(value, float) and not math.isfinite(value):
        return place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if (found := _not_finite(item, f"{place}.{key}" if place else str(key))) is not None:
            return found
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def verify(folder: Path, *, id: str | None = None, deep: bool = True) -> dict[str, Any]:
    """The record of a finished job, after checking that its files are those it was written for.

    `id` is what should be there. With `deep=False` sizes are compared and contents are not. Raises `ReqatError`
    naming the file at fault.
    """
    record = read(folder)
    if id is not None and record["id"] != id:
        raise ReqatError(f"{folder} holds {record['id']}, not {id}: a result of another run. Delete the folder.")
    for name, entry in record["outputs"].items():
        path = folder / name
        if not path.is_file():
            raise ReqatError(f"{path} is missing, though its record lists it; delete {folder} and run its stage again.")
        with explaining(path):
            same = path.stat().st_size == entry["bytes"] and (not deep or sha256(path) == entry["sha256"])
        if not same:
            raise ReqatError(
                f"{path} is not the file that its record describes (changed or truncated); delete {folder} and run its "
                f"stage again."
            )
    return record


def check_inputs(folder: Path, record: Mapping[str, Any], there: Mapping[str, str]) -> None:
    """Hold what a result in `folder` was made from against what is there now: stage id -> `outputs_digest`.

    An id names settings, not weights: a stage trained again under the same id need not give the same ones. Inputs that
    `there` does not list are not compared. Raises `ReqatError` naming the first input that is another.
    """
    for role, given in record.get("inputs", {}).items():
        if there.get(given["id"], given["sha256"]) != given["sha256"]:
            raise ReqatError(f"{folder}: was made from another {role} ({given['id']}) than the one that is there now.")


def outputs_digest(record: Mapping[str, Any]) -> str:
    """One sha256 over all outputs of a record: what a job that reads them writes down as its input."""
    return digest(dict(record["outputs"]))


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record atomically."""
    write_file(path, text(record))


def text(record: Mapping[str, Any]) -> str:
    """A record as JSON."""
    return json.dumps(record, indent=1, sort_keys=True, allow_nan=False, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if hasattr(value, "item"):
        return value.item()
    if isinstance(value, Path):
        return value.as_posix()
    raise TypeError(f"a record cannot hold {type(value).__name__}: {value!r}")


def _finite(value: Any) -> Any:
    """`value` with NaN and infinities as null: a metric without a value must not cost the hours that led to it."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Job:
    """A running job: collects what its record says. `finish` hashes the outputs and writes it."""

    def __init__(
        self, kind: str, id: str, config: Any, *, root: Path, out: Path, partial: Path, tier: str | None = None
    ) -> None:
        self.kind, self.id, self.config, self.root, self.out, self.partial, self.tier = (
            kind,
            id,
            config,
            root,
            out,
            partial,
            tier,
        )
        self.inputs: dict[str, Any] = {}
        self.seeds: list[int] = []
        self.metrics: dict[str, Any] = {}
        self.computed: dict[str, Any] = {}
        """In place of what the record says of this machine: of a result that others computed."""
        self.resumed = False
        self._clock, self._started = time.monotonic(), datetime.now(UTC)
        self._source = provenance.commit(root)

    def finish(self) -> dict[str, Any]:
        """Write the record into the partial folder. Returns the record."""
        config = self.config.model_dump(mode="json") if isinstance(self.config, BaseModel) else self.config
        record = {
            "schema_version": SCHEMA_VERSION,
            "kind": self.kind,
            "id": self.id,
            "tier": self.tier,
            "config": config,
            "config_sha256": digest(config),
            **self._source,
            "versions": provenance.versions(),
            "hardware": provenance.hardware(),
            "native": provenance.native(),
            "threads": provenance.threads(),
            "seeds": self.seeds,
            "inputs": self.inputs,
            "outputs": outputs(self.partial),
            "wall_s": round(time.monotonic() - self._clock, 3),
            "peak_memory_bytes": provenance.peak_memory_bytes(),
            "started": self._started.isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "resumed": self.resumed,
            "command": provenance.command(self.root),
            "metrics": self.metrics,
            **self.computed,
        }
        record = provenance.scrub(_finite(json.loads(json.dumps(record, default=_plain))), self.root)
        for name in record["outputs"]:
            flush(self.partial / name)
        write(self.partial / FILE, record)
        return record


@contextlib.contextmanager
def job(
    kind: str, id: str, config: Any, *, root: Path, out: Path, partial: Path | None = None, tier: str | None = None
) -> Iterator[Job]:
    """Run the body with an empty folder to work in, `job.partial`, named after `partial`; if it succeeds, its outputs
    and record appear at `out` at once.

    `out` is a place of our own: whatever result is there is replaced, and files of others in it are set aside. Raises
    `ReqatError` if another process is at it, or naming the file and what to do if the system refuses to write;
    anything else passes through. `out` stays as it was then, and nothing else is left.
    """
    with making(out, belongs(None), replace=True, partial=partial, set_aside=True) as work:
        running = Job(kind, id, config, root=root, out=out, partial=work, tier=tier)
        yield running
        running.finish()


@contextlib.contextmanager
def asked_for(
    kind: str, out: Path, config: Any, *, root: Path, force: bool, inputs: Iterable[Path | str] = ()
) -> Iterator[Job]:
    """As `job`, where the user named the folder: only a result of the same `kind` is replaced, and only with `force`;
    never one of the folders `inputs` that it is made from.

    To be entered before anything is loaded. Raises `ReqatError` naming the folder and the remedy.
    """
    given = [Path(folder) for folder in inputs if Path(folder).exists()]
    with making(out, belongs(kind), replace=force, inputs=given) as work:
        running = Job(kind, Path(os.path.abspath(out)).name, config, root=root, out=out, partial=work)
        yield running
        running.finish()


def belongs(kind: str | None) -> Names:
    """Names the files of a result of a kind (None: of any) by its record."""

    def names(folder: Path) -> Collection[str]:
        try:
            found = read(folder)
            listed = {FILE, *map(str, found["outputs"])}
        except (ReqatError, OSError, TypeError):
            wanted = f"`reqat {kind}`" if kind else "reqat"
            raise ReqatError(f"no result of {wanted} (no whole {FILE} in it).") from None
        if kind is not None and found["kind"] != kind:
            raise ReqatError(f"a result of `reqat {found['kind']}`, not of `reqat {kind}`.")
        return listed

    return names
