"""A checkout of the workflow's files with a tiny tier, and Snakemake in it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
STUB = Path(__file__).parent / "stub.py"
TINY = {
    "extends": "smoke",
    "title": "a plan of a few jobs",
    "only": {"recipes": ["base", "reqat-tq"], "precisions": ["NVFP4-W4A4KV4"]},
    "models": {"testbed": {"artifacts": ["table1", "figure1"]}},
}
STUDIES = [
    {
        "kind": "noise", "model": {"recipe": "reqat-tq", "precision": "NVFP4-W4A4KV4"},
        "sigmas": [0.1], "n": 2, "seeds": [0],
    },
    {
        "kind": "noise", "name": "base", "model": {"recipe": "base", "precision": "BF16"},
        "sigmas": [0.1], "n": 2, "seeds": [0],
    },
]  # fmt: skip
COMPANIONS = [{"kind": "amxfp4", "models": ["tiny", "testbed", "smollm2"], "scales": ["PoT"]}]
BENCH = {"linear": {"m": [1], "nk": [16]}, "decode": [{"model": "pinned", "batches": [1], "output_tokens": [2]}]}


def workflow_in(tmp_path: Path) -> Path:
    """The same in a folder of one's own choice."""
    tmp_path.mkdir(exist_ok=True)
    for name in ("rules", "profiles", "report", "config"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("reqat", "analysis", "environment.yml"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "Snakefile", tmp_path)
    (tmp_path / "config" / "tiers" / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    (tmp_path / "config" / "studies.yaml").write_text(yaml.safe_dump({"tiers": {"tiny": STUDIES}}))
    (tmp_path / "config" / "throughput.yaml").write_text(yaml.safe_dump({"tiers": {"tiny": BENCH}}))
    (tmp_path / "config" / "companions.yaml").write_text(yaml.safe_dump({"tiers": {"tiny": COMPANIONS}}))
    return tmp_path


def command(*arguments: str, tier: str = "tiny", more: tuple[str, ...] = ()) -> list[str]:
    """Snakemake with the stub in place of `reqat`."""
    # Backslashes, not quotes: Snakemake takes quotes at both ends of a value for its own.
    stub = "reqat=" + " ".join(re.sub(r"([^\w/.-])", r"\\\1", word) for word in (sys.executable, str(STUB)))
    options = ["--cores", "2", *arguments, "--config", *f"tier={tier}".split(), stub, *more]
    return [sys.executable, "-m", "snakemake", *options]


def snakemake(
    folder: Path, *arguments: str, tier: str = "tiny", more: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Run it in a checkout; what it said is in `stdout`."""
    environment = os.environ | {"PYTHONPATH": str(folder)}
    words = command(*arguments, tier=tier, more=more)
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout + done.stderr)


def calls(folder: Path) -> list[str]:
    """What the stub was asked for since the last look."""
    log = folder / "calls"
    lines = log.read_text().split() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines
