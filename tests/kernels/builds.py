"""Other builds of the native library, for processes that tests start: with sanitizers, and with the twin of the tiles.

The twin (``tiles.h``) is Intel's matrix unit in C++: with it the kernels for AMX run on any CPU with AVX-512.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from reqat_kernels.native.fingerprint import fingerprint, sources

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs g++ on Linux")
_SAME_AS_SETUP = "-std=c++17 -fopenmp -ffp-contract=off -fno-math-errno -shared -fPIC -w"
_TWIN = "-DREQAT_TILE_TWIN"
# What checks are for: with undefined behaviour the process ends, as it does with a wrong address.
_CHECKED = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"


def library(file: Path, flags: str) -> Path:
    """The native library built into ``file`` with more flags than setup.py's."""
    assert COMPILER is not None
    files = [str(path) for path in sources() if path.suffix == ".cpp"]
    define = f"-DREQAT_FINGERPRINT={fingerprint()}"
    command = [COMPILER, *_SAME_AS_SETUP.split(), *flags.split(), define, *files, "-o", str(file)]
    subprocess.run(command, check=True)
    return file


def twin_environment(folder: Path) -> dict[str, str]:
    """Build the library with the twin into ``folder``; the environment of a process that uses it."""
    return {**os.environ, "REQAT_LIBRARY": str(library(folder / "twin.so", f"-O2 {_TWIN}"))}


def checked_environment(folder: Path) -> dict[str, str]:
    """The same with the address sanitizer as well, which could not look into the instructions of the matrix unit."""
    preload = " ".join(_runtime(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6"))
    return {
        **os.environ,
        "LD_PRELOAD": preload,
        # Python and torch keep memory to the end on purpose.
        "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0",
        "REQAT_LIBRARY": str(library(folder / "checked.so", f"{_CHECKED} {_TWIN}")),
    }


def run_tests(environment: dict[str, str], *arguments: str) -> str:
    """pytest in a process of its own, which has to pass and to have a native library; what it printed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout and "no native library" not in done.stdout
    return done.stdout


def _runtime(name: str) -> str:
    """A library of the compiler's, to be loaded before everything else."""
    assert COMPILER is not None
    found = subprocess.check_output([COMPILER, f"-print-file-name={name}"], text=True).strip()
    if not Path(found).is_absolute():
        pytest.skip(f"the compiler has no {name}")
    return found
