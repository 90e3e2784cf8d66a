"""The Makefile's recipes in a folder of any name, on an interpreter that only writes down what it was asked for."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ODD = "sp ace ü $(touch F) `touch G` 'q\" &;|*#[x]"
RECORDS = """import json, sys
arguments = sys.argv[1:]
with open("asked", "a") as file:
    file.write(json.dumps(arguments) + "\\n")
if arguments[:3] == ["-m", "reqat.config.machine", "cores"]:
    print(3)
if arguments[2:3] == ["doctor"] and "bad" in arguments:
    sys.exit(2)
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the Makefile, and an environment whose interpreter writes its arguments to the file `asked`."""
    folder = tmp_path / ODD
    (folder / ".v env" / "bin").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", folder)
    (folder / "tools").mkdir()
    (folder / "tools" / "environment.py").write_text("")
    python = folder / ".v env" / "bin" / "python"
    # A `#!` line cannot name an interpreter whose path holds a space, so a shell starts it.
    (folder / ".v env" / "records.py").write_text(RECORDS)
    records = shlex.join([sys.executable, str(folder / ".v env" / "records.py")])
    python.write_text(f'#!/bin/sh\nexec {records} "$@"\n')
    python.chmod(0o755)
    return folder


def make(folder: Path, *arguments: str) -> tuple[int, list[list[str]]]:
    """Exit code, and what the interpreter of the environment was asked for."""
    environment = {
        key: value for key, value in os.environ.items() if key not in ("TIER", "CORES", "BENCH", "MAKEFLAGS")
    }
    command = ["make", "--no-print-directory", f"PYTHON={sys.executable}", "VENV=.v env", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    asked = folder / "asked"
    lines = [json.loads(line) for line in asked.read_text().splitlines()] if asked.exists() else []
    asked.unlink(missing_ok=True)
    return done.returncode, lines


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_figures_asks_the_doctor_and_then_snakemake_in_a_folder_of_any_name(clone: Path) -> None:
    code, asked = make(clone, "figures", "TIER=smoke", "BENCH=no", "CONFIG='build=a b'", "ARGS=--dry-run")
    assert code == 0
    assert asked == [
        ["-m", "reqat.cli", "doctor", "--quick", "--tier", "smoke", "--no-bench"],
        ["-m", "reqat.config.machine", "cores"],
        ["-m", "snakemake", "--cores", "3", "--config", "tier=smoke", "bench=no", "build=a b",
         "--dry-run", "--", "figures/"],
    ]  # fmt: skip
    assert {path.name for path in clone.iterdir()} == {"Makefile", "tools", ".v env"}, "a path was run as a command"


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_what_a_user_sets_reaches_programs_as_it_is(clone: Path) -> None:
    code, asked = make(clone, "figures", "TIER=`touch F`; touch G", "CORES=1")
    assert code == 0 and asked[0][-2:] == ["`touch F`; touch G", "--bench"]
    assert asked[1][3:7] == ["1", "--config", "tier=`touch F`; touch G", "bench=yes"]
    assert not (clone / "F").exists() and not (clone / "G").exists()
    code, asked = make(clone, "figures", "TIER=bad")
    assert code != 0 and len(asked) == 1, "what the doctor refuses is not started"
    assert make(clone, "figures", "bench=no")[0] != 0, "a lower-case name would be thrown away"
    code, asked = make(clone, "figures", "TIER=smoke", "ARGS=--config build=x")
    assert code != 0 and not asked, "a second --config would replace the first, and run the default tier"


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_only_an_environment_of_ours_is_removed(clone: Path) -> None:
    assert make(clone, "distclean")[0] == 0 and (clone / ".v env").exists(), "no pyvenv.cfg: somebody else's"
    (clone / ".v env" / "pyvenv.cfg").touch()
    (clone / "build").mkdir()
    assert make(clone, "distclean")[0] == 0
    assert not (clone / ".v env").exists() and not (clone / "build").exists()
