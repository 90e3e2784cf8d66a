"""One look: the same drawing gives the same bytes, and no two methods look alike."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from analysis.report import style

ROOT = Path(__file__).parents[3]


def test_files_are_the_same_each_time(tmp_path: Path) -> None:
    """Also in another process with another hash seed; and nothing in them says when."""
    code = (
        "import sys; from pathlib import Path; from analysis.report import style\n"
        "def draw(folder):\n"
        "    with style.context():\n"
        "        fig = style.figure(2.0); ax = fig.subplots(); ax.plot([1, 2, 3], label='Ab \\u03b1'); ax.legend()\n"
        "        style.footer(fig, ['n 3.']); style.save(fig, Path(folder), 'x')\n"
    )
    space: dict[str, object] = {}
    exec(code, space)
    space["draw"](tmp_path / "1")  # type: ignore[operator]
    env = os.environ | {"PYTHONHASHSEED": "12", "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-c", code + "draw(sys.argv[1])", str(tmp_path / "2")], check=True, cwd=ROOT, env=env
    )
    for suffix in ("png", "pdf"):
        a, b = ((tmp_path / seed / f"x.{suffix}").read_bytes() for seed in ("1", "2"))
        assert a == b
        assert b"Date" not in a and b"atplotlib" not in a
    assert sorted(p.name for p in (tmp_path / "1").iterdir()) == ["x.pdf", "x.png"]


def test_each_method_has_its_own_colour_and_marker() -> None:
    drawn = [m for m in style.COLOURS if m != "FT+QAT"]
    assert len({style.COLOURS[m] for m in drawn}) == len({style.MARKERS[m] for m in drawn}) == len(drawn)
    with pytest.raises(ValueError, match="no colour for method 'XYZ'"):
        style.colour("XYZ")
