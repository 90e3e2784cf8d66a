"""Likelihoods stand beside a run's accuracies where they are of its very models, whatever a manifest says."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from analysis import build
from analysis.report import studies
from reqat.config import Paths, load
from reqat.pipeline.studies import studies_of
from reqat.records import pinned, record

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("retrained", "missing", "used"), [(False, False, 1), (True, False, 0), (False, True, 0)])
def test_studies_of_other_weights_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, retrained: bool, missing: bool, used: int
) -> None:
    paths = Paths(ROOT)
    plan = load("converged", paths)
    (study,) = (s for s in studies_of(plan, paths).values() if s.kind == "likelihood")
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / studies.STUDIES).write_text(json.dumps({study.id: study.model_dump(mode="json")}))
    run: dict[str, Any] = {id: {"outputs": {"model": {"sha256": id, "bytes": 1}}} for id in study.inputs.values()}
    inputs = {role: {"id": id, "sha256": record.outputs_digest(run[id])} for role, id in study.inputs.items()}
    kept = pinned.Restored(tmp_path, plan, {study.id: {"inputs": inputs}})
    qat = next(id for id in study.inputs.values() if id.startswith("qat-"))
    if retrained:
        run[qat] = {"outputs": {"model": {"sha256": "other", "bytes": 1}}}
    if missing:
        del run[qat]

    @contextlib.contextmanager
    def restored(*_: object) -> Iterator[pinned.Restored]:
        yield kept

    monkeypatch.setattr(pinned, "restored", restored)
    monkeypatch.setattr(studies, "load_studies", lambda planned, *_, **__: list(planned))
    with contextlib.ExitStack() as stack:
        found = build._likelihoods(tmp_path, pinned.Restored(tmp_path, plan, run), stack)
    assert len(found) == used
