"""Tables of measured schedules: every point of a search space with its speed, on which searches are replayed.

They come from no package: this repository's own programs write them, and `results/schedules/` holds those that were
measured on a quiet machine. A table is `<name>.csv` with `<name>.json` beside it, which has the CSV's sha256 and says
on what machine and with which compiler it was measured. Prepared: the same files, of all tables that are there.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reqat.config.errors import ReqatError, unknown
from reqat.config.files import read_json, sha256
from reqat.data.packaged import Package

SCHEMA = "reqat-schedules/1"
"""As in `reqat_kernels.schedules.tables`, which writes them."""
_MEASURE = "python -m reqat_kernels.schedules.measure --out results/schedules NAME"
_COMPILE = "python -m reqat_kernels.schedules.resources --out results/schedules NAME, without triton-"
_AGAIN = f"remove both files and measure it again ({_MEASURE})"
_PINNED = Path(__file__).resolve().parents[3] / "results" / "schedules"

PACKAGE = Package(
    name="schedule-tables",
    files={"*.json": ""},  # each table has its own digest
    places=lambda: [_PINNED],
    install=_MEASURE,
    licence="Apache-2.0",
)


@dataclass(frozen=True)
class Measured:
    """One table: its CSV, and what is said of it."""

    csv: Path
    meta: dict[str, Any]


def prepare(out: Path, given: Path | None = None) -> None:
    """Copy the tables into `out`. Raises `ReqatError` if there is none, or one is not as it was written."""
    folder = PACKAGE.find(given)
    for path in sorted(folder.glob("*.json")):
        table = _read(path)
        if not table.csv.is_file() or sha256(table.csv) != table.meta["sha256"]:
            raise ReqatError(f"{table.csv}: missing, or not as it was measured (its sha256 is another one); {_AGAIN}.")
        shutil.copyfile(path, out / path.name)
        shutil.copyfile(table.csv, out / table.csv.name)


def load(folder: Path, name: str) -> Measured:
    """A table of a prepared folder. Raises `ReqatError` with the closest name if it is not there."""
    there = [path.stem for path in folder.glob("*.json") if path.with_suffix(".csv").is_file()]
    if name not in there:
        make = _COMPILE if name.startswith("triton-") else _MEASURE
        raise unknown("table of schedules", name, there, remedy=f"There are: {', '.join(sorted(there))}. {make}.")
    return _read(folder / f"{name}.json")


def _read(path: Path) -> Measured:
    meta = read_json(path, "table of schedules", _AGAIN)
    knobs = meta.get("knobs")
    whole = (
        meta.get("schema") == SCHEMA
        and isinstance(meta.get("unit"), str)
        and isinstance(meta.get("sha256"), str)
        and isinstance(knobs, dict)
        and knobs
    )
    if not whole:
        raise ReqatError(f"{path}: not a table of schema {SCHEMA}; {_AGAIN}.")
    return Measured(path.with_suffix(".csv"), meta)
