"""Sections of a benchmark that outlive a kill: the next attempt measures only the others.

A whole benchmark takes two hours. Numbers of another machine, of other code or of other libraries must not stand beside
today's, so what is kept is named by all of that, and found again only where nothing of it changed.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from reqat.config.base import digest
from reqat.config.files import read_json, sha256, write_file
from reqat.config.paths import Paths
from reqat.pipeline.bench_sections import Bench, Section
from reqat.records import provenance

_VARIABLES = ("CUDA_", "KMP_", "MKL_", "OMP_", "REQAT_", "TORCH_", "TRITON_")
_WHAT, _REMEDY = "kept section of a benchmark", "delete that folder to measure it anew"


class Kept:
    """Sections in `folder`, a file each, of one machine, code, set of libraries and setting."""

    def __init__(self, folder: Path, bench: Bench, paths: Paths) -> None:
        named = {
            "machine": _machine(),
            "code": _code(paths.root),
            "libraries": sorted(f"{d.name} {d.version}" for d in importlib.metadata.distributions()),
            "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(_VARIABLES)},
            "settings": bench.settings.model_dump(mode="json"),
            "threads": bench.threads,
            "memory": bench.memory,  # sizes of rings follow from it
        }
        self.folder = folder / digest(named, 16)
        self.used: dict[str, str] = {}
        """Section that was not measured anew -> when it was."""

    def bandwidth(self, bench: Bench) -> None:
        """Let `bench` know how fast memory was read when the first section was measured; measured now if nothing is
        kept. Sizes of rings, and what counts as cold, follow from it, so it is one for all sections."""
        from reqat_kernels.bench.machine import Bandwidth

        path = self.folder / "bandwidth.json"
        if path.is_file():
            found = read_json(path, _WHAT, _REMEDY)
            vars(bench)["bandwidth"] = Bandwidth(tuple(found["bytes"]), tuple(found["rates"]), found["cold_bytes"])
        else:
            self._write(path, dataclasses.asdict(bench.bandwidth))

    def read(self, name: str) -> tuple[Section, dict[int, list[float]]] | None:
        """A section and what the probe read during it (threads -> bytes a second); None if it is not kept."""
        from reqat_kernels.bench.measure import Result, Row

        path = self.folder / f"{name}.json"
        if not path.is_file():
            return None
        found = read_json(path, _WHAT, _REMEDY)
        self.used[name] = found["finished"]
        rows = [Row(**row) for row in found["rows"]]
        result = Result(rows, found["skipped"], found["refused"])
        section = Section(result, found["compared"], found["rates"], found["peak_memory_bytes"])
        return section, {int(threads): rates for threads, rates in found["probe"].items()}

    def write(self, name: str, section: Section, probe: dict[int, list[float]]) -> None:
        """Keep a section and what the probe read during it; not one of which something failed or is wrong: another
        attempt may mend it."""
        if section.result.refused or any(row.failure is not None for row in section.result.rows):
            return
        found: dict[str, Any] = {
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "rows": [dataclasses.asdict(row) for row in section.result.rows],
            "skipped": section.result.skipped,
            "refused": section.result.refused,
            "compared": section.compared,
            "rates": section.rates,
            "peak_memory_bytes": section.peak_memory_bytes,
            "probe": probe,
        }
        self._write(self.folder / f"{name}.json", found)

    def _write(self, path: Path, found: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(found) + "\n")


def _machine() -> list[Any]:
    """What tells machines apart; of GPUs what their driver says, because asking torch would start CUDA, and processes
    are forked from this one."""
    cards = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    gpus = [card.read_text(encoding="utf-8", errors="replace") for card in cards]
    cpus = sorted(os.sched_getaffinity(0))
    return [platform.node(), provenance.cpu_model(), cpus, provenance.memory_bytes(), gpus]


def _code(root: Path) -> dict[str, str]:
    """The sha256 of every file of our code: what is timed calls much more than kernels."""
    folders = [root / "reqat", root / "kernels" / "reqat_kernels"]
    files = sorted(
        path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".cpp", ".h", ".so")
    )
    return {str(path.relative_to(root)): sha256(path) for path in files}
