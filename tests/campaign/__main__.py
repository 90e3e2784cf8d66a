"""``python -m tests.campaign``: run the campaign, print its table, and write ``build/campaign.json``."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from reqat.config.errors import ReqatError
from reqat.config.files import read_json
from reqat.records import provenance, record

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("inputs", "operators", "disk", "kills")
SHOWN = 20


@dataclass
class Part:
    """What one part of the campaign found."""

    name: str
    tried: int
    failed: int
    seconds: float
    counts: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    detail: dict[str, Any] = field(default_factory=dict)


def inputs(given: argparse.Namespace, say: Callable[[str], None]) -> Part:
    """Bad inputs over all verbs and the API."""
    from tests.campaign.inputs import all_cases, sample, try_cases

    cases = all_cases()
    numbers = list(range(len(cases))) if given.inputs is None else sample(cases, given.inputs, given.seed)
    verdicts = try_cases(numbers, processes=given.processes, say=say)
    faults = Counter(verdict.fault.split(":")[0].split(",")[0].split(" (")[0] for verdict in verdicts if not verdict.ok)
    return Part(
        "inputs",
        len(verdicts),
        sum(not v.ok for v in verdicts),
        0.0,
        dict(Counter(v.kind for v in verdicts)),
        [f"{v.kind}, {v.name}: {v.fault} | {v.message[-300:]!r}" for v in verdicts if not v.ok],
        {"faults": dict(faults)},
    )


def kills(given: argparse.Namespace, say: Callable[[str], None]) -> Part:
    """SIGKILLs over the smoke tier."""
    from tests.campaign.kills import kill

    state = kill(given.kills, seed=given.seed, folder=ROOT / "build/campaign/kills", say=say)
    failures = [f"end {i + 1}: {', '.join(names)} differ" for i, names in enumerate(state.ends) if names]
    failures += [f"left over: {name}" for name in state.left_over]
    return Part(
        "kills", len(state.delays_s), len(failures), 0.0, {"runs to the end": len(state.ends)}, failures, asdict(state)
    )


def operators(given: argparse.Namespace, say: Callable[[str], None]) -> Part:
    """Random calls of the kernels' operators."""
    from tests.campaign import operators as of_kernels

    found = of_kernels.run(given.calls, given.seed, say=say)
    counts = {name: int(count) for name, count in found["counts"].items()}
    return Part("operators", found["tried"], len(found["failures"]), 0.0, counts, list(map(str, found["failures"])))


def disk(given: argparse.Namespace, say: Callable[[str], None]) -> Part:
    """Disks that are full, and files that may not be written."""
    from tests.campaign import faults, material

    failures: list[str] = []
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="reqat-campaign-") as temporary:
        root = material.build(Path(temporary) / "checkout")
        shutil.copytree(ROOT / "results", root / "results", dirs_exist_ok=True)
        with material.inside(root):
            for case in faults.cases(root):
                counts[case.name.rpartition(", ")[2]] += 1
                failures += [f"{case.name}: {wrong}" for wrong in faults.carry_out(case, root)[:1]]
                say(f"{counts.total()} cases, {len(failures)} failures: {case.name}")
    return Part("disk", counts.total(), len(failures), 0.0, dict(counts), failures)


def main() -> int:
    """Run what the command line asks for; 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, with commas, of {', '.join(PARTS)}")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument("--inputs", type=int, default=None, help="bad inputs to try (default: all there are)")
    parser.add_argument("--kills", type=int, default=40, help="SIGKILLs")
    parser.add_argument("--calls", type=int, default=50_000, help="calls of operators")
    parser.add_argument("--processes", type=int, default=max(1, min(4, os.cpu_count() or 1)), help="for bad inputs")
    given = parser.parse_args()
    chosen = [name.strip() for name in given.only.split(",")]
    for name in chosen:
        if name not in PARTS:
            parser.error(f"--only: {name!r} is none of {', '.join(PARTS)}")
    os.chdir(ROOT)
    run = {"inputs": inputs, "operators": operators, "disk": disk, "kills": kills}
    file = ROOT / "build/campaign.json"
    for name in chosen:
        began = time.monotonic()
        try:
            part = run[name](given, lambda line: print(f"  {line}", flush=True))
        except ReqatError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 2
        part.seconds = round(time.monotonic() - began, 1)
        write(file, part, given.seed)
        for line in part.failures[:SHOWN]:
            print(f"  {line}")
        if len(part.failures) > SHOWN:
            print(f"  and {len(part.failures) - SHOWN} more in {file}")
    parts = read_json(file, "record of the campaign", "remove it")["parts"]
    print(table(parts))
    return int(any(parts[name]["failed"] for name in chosen))


def write(file: Path, part: Part, seed: int) -> None:
    """Put a part into the record; those of earlier runs stay, each with the commit that it was run at."""
    parts = read_json(file, "record of the campaign", "remove it")["parts"] if file.is_file() else {}
    parts[part.name] = asdict(part) | {
        "seed": seed,
        **provenance.commit(ROOT),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    made = {
        "schema": "reqat.campaign/1",
        "parts": parts,
        "versions": provenance.versions(),
        "hardware": provenance.hardware(),
        "command": provenance.command(ROOT),
    }
    record.write(file, provenance.scrub(made, ROOT))


def table(parts: dict[str, Any]) -> str:
    """The record as a Markdown table."""
    what = {
        "inputs": "bad inputs to verbs and API",
        "operators": "random operator calls",
        "disk": "full disks and missing permissions",
        "kills": "SIGKILLs over the smoke tier",
    }
    lines = ["| campaign | tried | failed | minutes | commit |", "|---|---:|---:|---:|---|"]
    for name in (name for name in PARTS if name in parts):
        part = parts[name]
        commit = f"{str(part['commit'])[:9]}{'+changes' if part['dirty'] else ''}"
        lines.append(
            f"| {what[name]} | {part['tried']:,} | {part['failed']:,} | {part['seconds'] / 60:.1f} | {commit} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
