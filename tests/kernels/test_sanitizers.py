"""The native tests once more, on a library that checks every memory access and every operation's definedness."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from reqat_kernels.native.fingerprint import fingerprint, sources

pytestmark = [pytest.mark.slow, pytest.mark.long]

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("g++")
# What checks are for: with undefined behaviour the process ends, as it does with a wrong address.
FLAGS = "-std=c++17 -O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
SAME_AS_SETUP = "-fopenmp -ffp-contract=off -fno-math-errno -shared -fPIC -w"


def runtime(name: str) -> str:
    """A library of the compiler's, to be loaded before everything else."""
    assert COMPILER is not None
    found = subprocess.check_output([COMPILER, f"-print-file-name={name}"], text=True).strip()
    if not Path(found).is_absolute():
        pytest.skip(f"the compiler has no {name}")
    return found


def checked_environment(folder: Path) -> dict[str, str]:
    """Build the library with the address sanitizer into ``folder``; the environment of a process that uses it."""
    assert COMPILER is not None
    preload = " ".join(runtime(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6"))
    library = folder / "checked.so"
    files = [str(path) for path in sources() if path.suffix == ".cpp"]
    define = f"-DREQAT_FINGERPRINT={fingerprint()}"
    subprocess.run([COMPILER, *FLAGS.split(), *SAME_AS_SETUP.split(), define, *files, "-o", str(library)], check=True)
    return {
        **os.environ,
        "LD_PRELOAD": preload,
        # Python and torch keep memory to the end on purpose.
        "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0",
        "REQAT_LIBRARY": str(library),
    }


@pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs g++ on Linux")
def test_native_code_is_clean_under_sanitizers(tmp_path: Path) -> None:
    environment = checked_environment(tmp_path)
    # Tests that start processes of their own, or trace operators, add minutes and no native code; and a sanitizer ends
    # the process that asks for more memory than there is.
    tests = [str(path) for path in sorted((ROOT / "tests" / "kernels").glob("test_native_*.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    command += ["-k", "not without_the_library and not without_memory and not unknown_instruction and not operators"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout and "no native library" not in done.stdout


@pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs g++ on Linux")
def test_threads_that_share_a_packed_model_are_clean_under_sanitizers(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += [str(ROOT / "tests" / "models" / "test_threads.py"), "-k", "packed and not other_kernels"]
    done = subprocess.run(command, env=checked_environment(tmp_path), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout and "no native library" not in done.stdout
