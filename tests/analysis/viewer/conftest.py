"""Folders of traces to make pages of."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.analysis.viewer import trace_folders as folders


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return Path(folders.make_folder(tmp_path / "traces"))


@pytest.fixture
def lone(tmp_path: Path) -> Path:
    return Path(folders.make_folder(tmp_path / "traces", pairs=False))
