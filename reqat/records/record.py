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
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from reqat.config.base import digest
from reqat.config.errors import ReqatError
from reqat.config.files import flush, write_file
from reqat.config.targets import Names, making
from reqat.records import provenance

FILE = "record.json"
SCHEMA_VERSION = 1
_KEYS = (
    "schema_version",
    "kind",
    "id",
    "config",
    "config_sha256",
    "commit",
    "dirty",
    "versions",
    "hardware",
    "outputs",
    "metrics",
)


def sha256(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files(folder: Path) -> dict[str, dict[str, Any]]:
    """Path within `folder` -> sha256 and bytes, of every file."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size} for path in found
    }


def outputs(folder: Path) -> dict[str, dict[str, Any]]:
    """`files` without the record."""
    return {name: entry for name, entry in files(folder).items() if name != FILE}


def read(folder: Path) -> dict[str, Any]:
    """The record of a finished job. Raises `ReqatError` if there is none or it is not a whole record of a known
    version."""
    path = folder / FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReqatError(
            f"{folder}: no {FILE}, so nothing finished here; run the stage or evaluation that makes it."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ReqatError(f"{path}: not a whole record ({error}); delete {folder} and run its stage again.") from None
    missing = [key for key in _KEYS if not isinstance(record, dict) or key not in record]
    if missing:
        raise ReqatError(
            f"{path}: not a record, it lacks {', '.join(missing)}; delete {folder} and run its stage again."
        )
    if record["schema_version"] != SCHEMA_VERSION:
        raise ReqatError(f"{path}: record version {record['schema_version']}, this version reads {SCHEMA_VERSION}.")
    return record


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
        if path.stat().st_size != entry["bytes"] or (deep and sha256(path) != entry["sha256"]):
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
    for role, given in record["inputs"].items():
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
