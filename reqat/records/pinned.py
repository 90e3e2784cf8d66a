"""A pinned run: one folder under `results/`, named `<date>-<tier>`, that is written once and never again.

    manifest.json     what it is, and the sha256 of every file in it and of every file folded into the two tables
    plan.json         the tier's plan when it was pinned
    records.parquet   one row a job: folder, id, kind, commit, finished, and the whole text of its record.json
    outcomes.parquet  one row a graded response: file, id, then the columns of `reqat.evaluation.Outcomes`
    studies/, throughput/, companions/   what else studies, the benchmark and companions measured, as they wrote it, one
                      folder an id; studies.json has the studies as planned, in the order of config/
    tables/<table>.csv               drawn when it was pinned

`restored` unfolds it into the layout of `build/`, from which tables and figures are drawn as from a fresh run. Records
come back byte by byte; outcomes with the same rows and seal. Of evaluations the responses' text is not kept (the record
has the sha256 of the file with it), of studies it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from reqat.config.base import digest
from reqat.config.errors import ReqatError
from reqat.config.files import read_json
from reqat.config.paths import Paths, read_plan
from reqat.config.plan import Plan
from reqat.records import record
from reqat.records.machines import machine_type

Part = Literal["run", "studies", "benchmark", "companions"]
PARTS: tuple[Part, ...] = get_args(Part)
MANIFEST, PLAN, RECORDS, OUTCOMES = "manifest.json", "plan.json", "records.parquet", "outcomes.parquet"
SCHEMA = "reqat.manifest/1"
TRACES = "tokens.parquet"  # of a study: large, and made again by it, so never pinned
# First folder of a job's path -> the part of a pinned run that it belongs to.
_PART: dict[str, Part] = {
    "data": "run",
    "stages": "run",
    "evaluations": "run",
    "studies": "studies",
    "throughput": "benchmark",
    "companions": "companions",
}
# Of companions: rows and what else is small; a part may leave weights, too.
_KEPT_OF_COMPANIONS = (".csv", ".json")
_RESTORE = "restore it from git"


def part_of(path: str) -> Part:
    """The part that a path in the layout of `build/` belongs to."""
    return _PART[path.partition("/")[0]]


# Writing


def fold(source: Path, jobs: Sequence[str], folder: Path) -> dict[str, dict[str, Any]]:
    """Write what is kept of finished jobs into `folder`: records.parquet, outcomes.parquet, files of studies and of the
    benchmark.

    `jobs` are folders within `source`, such as ``evaluations/evaluation-1f0c``; their order is kept. Returns path ->
    sha256 and bytes of every file that the two tables replace. Raises `ReqatError` for a damaged record or outcomes.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from reqat.evaluation import Outcomes

    rows, tables, files, originals = [], [], [], {}
    for job in jobs:
        found, evaluation = record.read(source / job), job.startswith("evaluations/")
        originals[f"{job}/{record.FILE}"] = record.entry(source / job / record.FILE)
        text = (source / job / record.FILE).read_bytes().decode()
        columns = {key: found.get(key) for key in ("id", "kind", "commit", "finished")}
        rows.append({"folder": job, **columns, "record": text})
        # Of stages only the record is kept: weights are large, and a study that stands on them names their digest.
        kept = [OUTCOMES] if evaluation else found["outputs"] if part_of(job) != "run" else []
        for name in kept:
            path = source / job / name
            large = part_of(job) == "companions" and path.suffix not in _KEPT_OF_COMPANIONS
            if name == TRACES or large:
                continue
            if not _holds_outcomes(path):
                (folder / job / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / job / name)
                continue
            originals[f"{job}/{name}"] = record.entry(path)
            outcomes = Outcomes.from_parquet(path)
            table = (dataclasses.replace(outcomes, response=None) if evaluation else outcomes).to_table()
            metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
            files.append({"file": f"{job}/{name}", "rows": len(table), "columns": table.column_names} | metadata)
            if "response" not in table.column_names:
                table = table.append_column("response", pa.nulls(len(table), pa.string()))
            for i, (column, value) in enumerate((("file", f"{job}/{name}"), ("id", found["id"]))):
                table = table.add_column(i, column, pa.array([value] * len(table)))
            tables.append(table.replace_schema_metadata(None))
    pq.write_table(pa.Table.from_pylist(rows), folder / RECORDS, compression="zstd")
    if tables:
        whole = pa.concat_tables(tables).replace_schema_metadata({"files": json.dumps(files)})
        # Conditions answer with the same words: large pages and a high level, for a file that is written once.
        pq.write_table(whole, folder / OUTCOMES, compression="zstd", compression_level=19, data_page_size=2**26)
    return originals


def _holds_outcomes(path: Path) -> bool:
    import pyarrow.parquet as pq

    from reqat.evaluation.outcomes import SCHEMA as OUTCOMES_SCHEMA

    if path.suffix != ".parquet":
        return False
    return (pq.read_schema(path).metadata or {}).get(b"schema") == OUTCOMES_SCHEMA.encode()


def write_manifest(
    folder: Path, tier: str, records: Mapping[str, Mapping[str, Any]], originals: Mapping[str, Any], **more: Any
) -> None:
    """Write the manifest of a folder in which all else is there. `records` by the jobs' folders, as given to `fold`;
    `more` are further entries."""
    parts = {part: [entry for job, entry in records.items() if part_of(job) == part] for part in PARTS}
    entries = {
        "schema": SCHEMA,
        "tier": tier,
        "pinned": datetime.now(UTC).isoformat(timespec="seconds"),
        "parts": {part: _summary(part, made) for part, made in parts.items() if made},
        "files": record.files(folder),
        "originals": originals,
    }
    record.write(folder / MANIFEST, entries | more)


def _summary(part: Part, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a part's records say together; of a benchmark, on what type of machine it ran; of companions, which."""
    more: dict[str, Any] = {"machine": machine_type(records[0])} if part == "benchmark" else {}
    if part == "companions":
        more["companions"] = _kinds(records)
    return more | {
        "jobs": len(records),
        "commits": sorted({str(entry["commit"]) for entry in records}),
        "sources": sorted({str(entry.get("source")) for entry in records}),
        "dirty": any(entry["dirty"] is not False for entry in records),
        "started": min(entry["started"] for entry in records),
        "finished": max(entry["finished"] for entry in records),
        "job_seconds": round(sum(entry["wall_s"] for entry in records), 1),
        "peak_memory_bytes": max(entry["peak_memory_bytes"] or 0 for entry in records),
        "versions": _distinct(entry["versions"] for entry in records),
        "hardware": _distinct(entry["hardware"] for entry in records),
    }


def _distinct(values: Iterable[Any]) -> list[Any]:
    seen = {digest(value): value for value in values}
    return [seen[key] for key in sorted(seen)]


# Reading


def manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a pinned run. Raises `ReqatError` if there is none, or not a whole one."""
    found = read_json(folder / MANIFEST, "manifest of a pinned run", _RESTORE)
    parts, files = found.get("parts"), found.get("files")
    whole = (
        found.get("schema") == SCHEMA
        and isinstance(found.get("tier"), str)
        and isinstance(parts, dict)
        and all(isinstance(part, dict) and isinstance(part.get("finished"), str) for part in parts.values())
        and isinstance(files, dict)
        and all(isinstance(entry, dict) and "sha256" in entry for entry in files.values())
    )
    if not whole:
        raise ReqatError(f"{folder / MANIFEST}: not a manifest of schema {SCHEMA}; {_RESTORE}.")
    return found


def newest(paths: Paths) -> dict[tuple[str, Part], Path]:
    """(tier, part) -> the folder whose part was finished last, of all that is pinned."""
    found: dict[tuple[str, Part], tuple[str, Path]] = {}
    for file in sorted(paths.results.glob(f"*/{MANIFEST}")):
        stated = manifest(file.parent)
        for part, made in stated["parts"].items():
            key = stated["tier"], part
            found[key] = max(found.get(key, ("", file.parent)), (made["finished"], file.parent))
    return {key: folder for key, (_, folder) in found.items()}


def parts_pinned(tier: str, paths: Paths) -> dict[Part, Path]:
    """Part -> its newest folder, of all that is pinned of a tier. Raises `ReqatError` if nothing is."""
    found = newest(paths)
    parts = {part: found[tier, part] for part in PARTS if (tier, part) in found}
    if not parts:
        there = ", ".join(sorted({name for name, _ in found})) or "none yet"
        raise ReqatError(
            f"no pinned results of tier {tier!r} in {paths.results} (pinned: {there}); `reqat pin` promotes a finished "
            "run."
        )
    return parts


def find(tier: str, part: Part, paths: Paths) -> Path:
    """The folder of a tier's newest pinned run, studies or benchmark. Raises `ReqatError` if there is none."""
    parts = parts_pinned(tier, paths)
    if part not in parts:
        raise ReqatError(
            f"no pinned {part} of tier {tier!r} in {paths.results} (pinned: {', '.join(parts)}); "
            f"`reqat pin --what {part}` keeps a finished one."
        )
    return parts[part]


def benchmarks(tier: str, paths: Paths) -> dict[str, Path]:
    """Type of machine (:func:`reqat.records.machines.machine_type`) -> the folder of the benchmark of a tier that was
    finished last on one, of all that is pinned."""
    found: dict[str, tuple[str, Path]] = {}
    for file in sorted(paths.results.glob(f"*/{MANIFEST}")):
        stated = manifest(file.parent)
        made = stated["parts"].get("benchmark")
        if made is not None and stated["tier"] == tier:
            # Older manifests name no type; their records have what it follows from.
            key = str(made.get("machine") or _machine(file.parent))
            found[key] = max(found.get(key, ("", file.parent)), (made["finished"], file.parent))
    return {key: folder for key, (_, folder) in found.items()}


def companions(tier: str, paths: Paths) -> dict[str, Path]:
    """Kind of companion -> the folder where it was finished last, of all that is pinned of a tier; in the order of the
    folders' names. A folder may have some kinds alone."""
    found: dict[str, tuple[str, Path]] = {}
    for file in sorted(paths.results.glob(f"*/{MANIFEST}")):
        stated = manifest(file.parent)
        made = stated["parts"].get("companions")
        if made is not None and stated["tier"] == tier:
            # Older manifests name no kinds; their records do.
            for kind in made.get("companions") or _kinds(_records(file.parent, "companions")):
                found[kind] = max(found.get(kind, ("", file.parent)), (made["finished"], file.parent))
    return {kind: folder for kind, (_, folder) in found.items()}


def _kinds(records: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(str(entry["config"]["kind"]) for entry in records))


def _machine(folder: Path) -> str:
    return machine_type(_records(folder, "benchmark")[0])


def _records(folder: Path, part: Part) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    rows = pq.ParquetFile(folder / RECORDS).read(columns=["folder", "record"]).to_pylist()
    return [json.loads(row["record"]) for row in rows if part_of(row["folder"]) == part]


def verify(folder: Path) -> int:
    """Check every file that the manifest lists against its sha256; returns how many. Raises `ReqatError` naming the
    first that differs.
    """
    stated = manifest(folder)["files"]
    for name, entry in stated.items():
        if not (folder / name).is_file() or record.sha256(folder / name) != entry["sha256"]:
            raise ReqatError(f"{folder / name} is not the file that was pinned; {_RESTORE}.")
    return len(stated)


@dataclass(frozen=True)
class Restored:
    """A part of a pinned run, unfolded."""

    root: Path
    """In the layout of `build/`."""
    plan: Plan
    records: dict[str, dict[str, Any]]
    """By id, in the order of pinning."""


@contextlib.contextmanager
def restored(folder: Path, part: Part) -> Iterator[Restored]:
    """A part of a pinned run in a temporary folder. Raises `ReqatError` naming a file that is not as it was pinned."""
    verify(folder)
    with tempfile.TemporaryDirectory(prefix="reqat-") as root:
        yield unfold(folder, part, Path(root))


def unfold(folder: Path, part: Part, root: Path) -> Restored:
    """Write the files of a part into `root`. The folder's files are taken as they are (see `verify`)."""
    import pyarrow.parquet as pq

    records = {}
    for row in pq.ParquetFile(folder / RECORDS).read().to_pylist():
        if part_of(row["folder"]) == part:
            (root / row["folder"]).mkdir(parents=True)
            (root / row["folder"] / record.FILE).write_bytes(row["record"].encode())
            records[row["id"]] = record.read(root / row["folder"])
    for top in [top for top, its in _PART.items() if its == part and (folder / top).is_dir()]:
        shutil.copytree(folder / top, root / top, dirs_exist_ok=True)
    if (folder / OUTCOMES).is_file():
        table, start = pq.ParquetFile(folder / OUTCOMES).read(), 0
        for entry in json.loads(table.schema.metadata[b"files"]):
            rows = table.slice(start, entry["rows"]).select(entry["columns"])
            start += entry["rows"]
            if part_of(entry["file"]) == part:
                rows = rows.replace_schema_metadata({key: entry[key] for key in ("schema", "metadata", "seal")})
                pq.write_table(rows.combine_chunks(), root / entry["file"], compression="zstd")
    return Restored(root, read_plan(folder / PLAN), records)
