"""What `tools/goldens.py` says of two recordings: every id, row and file that differs, by its path."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "goldens.py"
BEFORE = {
    "plans": {"smoke": {"stages": ["base-1", "qat-2"], "cells": ["row a", "row b"]}},
    "pinned": {"tables/table1.csv": "aa"},
    "outputs": {},
}


def compared(tmp_path: Path, after: object) -> tuple[int, list[str]]:
    for name, value in (("before", BEFORE), ("after", after)):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    command = [sys.executable, str(TOOL), "compare", str(tmp_path / "before.json"), str(tmp_path / "after.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout.splitlines()


def test_equal_recordings(tmp_path: Path) -> None:
    assert compared(tmp_path, BEFORE) == (0, ["5 recorded, 0 missing, 0 new, 0 changed"])


@pytest.mark.parametrize(
    ("part", "value", "lines"),
    [
        ("pinned", {"tables/table1.csv": "ab"}, ["changed: /pinned/tables/table1.csv"]),
        ("pinned", {}, ["missing: /pinned/tables/table1.csv"]),
        ("outputs", {"qat-2/model": "cc"}, ["new: /outputs/qat-2/model"]),
        (
            "plans",
            {"smoke": {"stages": ["base-1", "qat-3"], "cells": ["row a", "row b"]}},
            ["missing: /plans/smoke/stages/qat-2", "new: /plans/smoke/stages/qat-3"],
        ),
    ],
)
def test_every_difference_is_named(tmp_path: Path, part: str, value: object, lines: list[str]) -> None:
    code, said = compared(tmp_path, BEFORE | {part: value})
    assert code == 1 and said[:-1] == lines
