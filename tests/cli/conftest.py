"""A checkout whose studies have been run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from analysis.report.studies import Study, load_studies
from reqat.config.studies import PlannedStudy
from tests.cli.smoke_studies import ROOT, STUDIES, ask, noted, reqat, train


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, PlannedStudy]]]:
    """A checkout whose smoke tier's studies have all been run by one command."""
    root = tmp_path_factory.mktemp("studies") / "checkout"
    shutil.copytree(ROOT / "config", root / "config")
    studies = ask(root, *STUDIES)
    train(root, studies)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for place in ("loading", "dynamics"):
            patch.setattr(f"reqat.evaluation.{place}.load_at", noted)
        assert reqat("study", "--tier", "smoke", "-q") == 0
        yield root, studies


@pytest.fixture
def checkout(finished: tuple[Path, dict[str, PlannedStudy]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to spoil."""
    root = Path(shutil.copytree(finished[0], tmp_path / "checkout"))
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def loaded(finished: tuple[Path, dict[str, PlannedStudy]]) -> dict[str, Study]:
    root, studies = finished
    return {study.kind: study for study in load_studies(studies, root / "build" / "studies")}
