"""Tables of exhausted spaces as files, written while they are measured.

Two files a table. ``<name>.csv`` has a row for every combination of knobs: the knobs, ``status``, ``speed`` (0 unless
the status is ``ok``), and what else was found. ``<name>.json`` says what it is: unit, knobs, settings, machine, and the
sha256 of the CSV. It is written last, so a table is complete if and only if it is there.

Until then every finished row goes to ``<name>.partial``. A program that was killed goes on from it, unless settings or
sources have changed since: numbers of two programs are no table.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

SCHEMA = "reqat-schedules/1"
OK, IMPOSSIBLE, WRONG = "ok", "impossible", "wrong"


class Unfinished:
    """A table on its way: ``folder/name.partial``.

    ``columns``: what a row says besides its knobs. ``identity``: everything that the numbers depend on; part of
    ``<name>.json``. Raises ValueError for rows that were measured under another identity.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        knobs: Mapping[str, Sequence[int]],
        columns: Sequence[str],
        identity: Mapping[str, Any],
    ) -> None:
        self.name, self.folder, self.knobs = name, folder, {knob: list(values) for knob, values in knobs.items()}
        self.columns, self.identity = list(columns), dict(identity)
        self.rows: dict[tuple[int, ...], dict[str, str]] = {}
        self._path = folder / f"{name}.partial"
        head = json.dumps({"name": name, "knobs": self.knobs, "columns": self.columns, **self.identity}, sort_keys=True)
        folder.mkdir(parents=True, exist_ok=True)
        if self._path.is_file():
            self._resume(head)
        else:
            self._path.write_text(head + "\n")

    def _resume(self, head: str) -> None:
        text = self._path.read_text()
        whole = text[: text.rfind("\n") + 1]  # a killed program may have left a part of a line
        first, _, rest = whole.partition("\n")
        if first != head:
            raise ValueError(
                f"{self._path} was begun with other settings, sources or on another machine: remove it, or write "
                "elsewhere"
            )
        if len(whole) < len(text):
            self._path.write_text(whole)
        for line in csv.reader(rest.splitlines()):
            row = dict(zip([*self.knobs, *self.columns], line, strict=True))
            self.rows[tuple(int(row[knob]) for knob in self.knobs)] = row

    @property
    def points(self) -> list[tuple[int, ...]]:
        """Every combination, in the order of the finished table."""
        return list(itertools.product(*self.knobs.values()))

    @property
    def left(self) -> list[dict[str, int]]:
        """Combinations that have no row yet."""
        return [dict(zip(self.knobs, point, strict=True)) for point in self.points if point not in self.rows]

    def add(self, values: Mapping[str, int], **found: Any) -> None:
        """Append a row; it is on disk when this returns."""
        row = {**{knob: str(values[knob]) for knob in self.knobs}, **{name: str(found[name]) for name in self.columns}}
        with self._path.open("a") as file:
            file.write(_line(row.values()))
            file.flush()
            os.fsync(file.fileno())
        self.rows[tuple(values[knob] for knob in self.knobs)] = row

    def finish(self, unit: str, **more: Any) -> Path:
        """Write the CSV and, last, the JSON; the rows on their way are removed. The path of the JSON.

        Raises ValueError if a combination is missing."""
        if self.left:
            raise ValueError(f"{self.name}: {len(self.left)} of {len(self.points)} combinations are not measured yet")
        lines = [_line([*self.knobs, *self.columns]), *(_line(self.rows[point].values()) for point in self.points)]
        data = "".join(lines).encode()
        meta = {
            "schema": SCHEMA, "name": self.name, "unit": unit, "knobs": self.knobs, **self.identity, **more,
            "sha256": hashlib.sha256(data).hexdigest(),
        }  # fmt: skip
        _write(self.folder / f"{self.name}.csv", data)
        path = _write(self.folder / f"{self.name}.json", (json.dumps(meta, indent=2) + "\n").encode())
        self._path.unlink()
        return path


def is_finished(folder: Path, name: str) -> bool:
    """Whether the table is complete."""
    return (folder / f"{name}.json").is_file()


def machine() -> dict[str, Any]:
    """The processor's name and architecture, as a table states them."""
    named = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        named = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), named)
    except OSError:  # no Linux
        pass
    return {"cpu": named, "architecture": platform.machine()}


def digest_of(files: Iterable[Path]) -> str:
    """Sixteen hexadecimal digits over names and contents of sources."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _line(cells: Iterable[str]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow(cells)
    return out.getvalue()


def _write(path: Path, data: bytes) -> Path:
    beside = path.with_name(f"{path.name}.{os.getpid()}.new")
    beside.write_bytes(data)
    beside.replace(path)
    return path
