"""The native tests once more, on a library that checks every memory access and every operation's definedness."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels.builds import ROOT, checked_environment, needs_compiler, run_tests

pytestmark = [pytest.mark.slow, pytest.mark.long]


@needs_compiler
def test_native_code_is_clean_under_sanitizers(tmp_path: Path) -> None:
    # Tests that start processes of their own, or trace operators, add minutes and no native code; and a sanitizer ends
    # the process that asks for more memory than there is.
    folder = ROOT / "tests" / "kernels"
    tests = [str(path) for path in (*sorted(folder.glob("test_native_*.py")), folder / "test_tiles.py")]
    left_out = ("without_the_library", "without_memory", "unknown_instruction", "operators", "the_twin", "is_said")
    run_tests(checked_environment(tmp_path), *tests, "-k", " and ".join(f"not {name}" for name in left_out))


@needs_compiler
def test_threads_that_share_a_packed_model_are_clean_under_sanitizers(tmp_path: Path) -> None:
    test = str(ROOT / "tests" / "models" / "test_threads.py")
    run_tests(checked_environment(tmp_path), test, "-k", "packed and not other_kernels")
