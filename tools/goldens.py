"""What a change of structure must leave as it is: record it before, compare it after.

    python tools/goldens.py record before.json [--build FOLDER]
    python tools/goldens.py compare before.json after.json

Recorded are the ids of every stage, evaluation, study and benchmark of every tier with the rows of its tables, the
digest of every file that is drawn from pinned results, and, of a build folder, the digests of all outputs that jobs
recorded (weights, outcomes). Ids and tables do not depend on the machine; outputs of a build folder do, and on the
number of threads: compare runs of one machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Command line of this file; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    record = verbs.add_parser("record")
    record.add_argument("out", type=Path)
    record.add_argument("--build", type=Path, default=None)
    record.add_argument("--no-pinned", action="store_true", help="leave out what is drawn from pinned results")
    compare = verbs.add_parser("compare")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    given = parser.parse_args()
    if given.verb == "compare":
        sys.exit(difference(json.loads(given.before.read_text()), json.loads(given.after.read_text())))
    found = {"plans": plans(), "pinned": {} if given.no_pinned else pinned(), "outputs": outputs(given.build)}
    given.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def plans() -> dict[str, Any]:
    """Tier -> its ids and the rows of its tables."""
    from reqat.config.paths import load
    from reqat.config.studies import load_studies
    from reqat.config.throughput import load_throughput

    found = {}
    for file in sorted((ROOT / "config/tiers").glob("*.yaml")):
        plan = load(file.stem)
        benchmark = load_throughput(file.stem, ROOT / "config")
        found[file.stem] = {
            "stages": sorted(plan.stages),
            "evaluations": sorted(plan.evaluations),
            "cells": [json.dumps(cell.model_dump(mode="json"), sort_keys=True) for cell in plan.cells],
            "studies": sorted(load_studies(plan, ROOT / "config")),
            "throughput": [benchmark.id] if benchmark else [],
        }
    return found


def pinned() -> dict[str, str]:
    """File -> sha256, of everything drawn from each pinned run."""
    from reqat.config.paths import Paths
    from reqat.records.pinned import newest

    found = {}
    for tier in sorted({tier for tier, _ in newest(Paths(ROOT))}):
        with tempfile.TemporaryDirectory() as folder:
            options = ["--cores", "1", "--quiet", "all", "--nolock", "--config", f"tier={tier}", f"build={folder}"]
            command = [sys.executable, "-m", "snakemake", *options, "--", "pinned"]
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            top = Path(folder) / "pinned"
            for file in sorted(path for path in top.rglob("*") if path.is_file()):
                found[file.relative_to(top).as_posix()] = hashlib.sha256(file.read_bytes()).hexdigest()
        print(f"drawn: {tier}", flush=True)
    return found


def outputs(build: Path | None) -> dict[str, str]:
    """``<id>/<file>`` -> sha256 as recorded, of all jobs in a build folder whose output does not hold times."""
    found: dict[str, str] = {}
    if build is None:
        return found
    for kind in ("data", "stages", "evaluations"):
        for file in sorted(build.glob(f"{kind}/*/record.json")):
            record = json.loads(file.read_text())
            found |= {f"{record['id']}/{name}": entry["sha256"] for name, entry in record["outputs"].items()}
    return found


def difference(before: dict[str, Any], after: dict[str, Any]) -> int:
    """Print what differs; 1 if anything does."""
    flat = [_flat(part) for part in (before, after)]
    missing, new = sorted(flat[0].keys() - flat[1].keys()), sorted(flat[1].keys() - flat[0].keys())
    changed = sorted(key for key in flat[0].keys() & flat[1].keys() if flat[0][key] != flat[1][key])
    for word, keys in (("missing", missing), ("new", new), ("changed", changed)):
        for key in keys:
            print(f"{word}: {key}")
    print(f"{len(flat[0])} recorded, {len(missing)} missing, {len(new)} new, {len(changed)} changed")
    return 1 if missing or new or changed else 0


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Each leaf by its path; an entry of a list by itself, wherever it stands."""
    if isinstance(value, dict):
        return {key: leaf for name, part in value.items() for key, leaf in _flat(part, f"{path}/{name}").items()}
    if isinstance(value, list):
        return {f"{path}/{entry}": "" for entry in value}
    return {path: value}


if __name__ == "__main__":
    main()
