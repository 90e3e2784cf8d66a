"""What `results/` keeps: the base is the one that the tiers describe, pinned runs are whole and can still be tabled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from analysis.build import build_studies, build_tables
from analysis.registry import study_names, table_names
from analysis.report.studies import load_studies, pinned_studies
from reqat.config import Paths, load
from reqat.config.studies import KINDS
from reqat.pipeline import pin
from reqat.records import record

ROOT = Path(__file__).resolve().parent.parent
PATHS = Paths(ROOT)


def test_the_pinned_base_is_the_one_that_the_tiers_describe() -> None:
    kept = record.read(PATHS.base)
    assert kept["id"] == load("laptop", PATHS).scratch["testbed"]
    assert kept["dirty"] is False
    sizes = {name: file["bytes"] for name, file in kept["outputs"].items()}
    assert sum(sizes.values()) <= pin.BASE_BYTES
    for name, file in kept["outputs"].items():
        assert record.sha256(PATHS.base / name) == file["sha256"], name


@pytest.mark.parametrize("tier", pin.pinned_tiers(PATHS))
def test_a_pinned_run_is_whole_and_every_table_can_be_made_of_it_alone(tier: str, tmp_path: Path) -> None:
    assert pin.verify(tier, PATHS) > 0
    plan = pin.restore(tier, PATHS)
    written = build_tables(plan, PATHS.results / tier, tmp_path, pinned=True, paths=PATHS)
    assert {path.stem for path in written} == set(table_names(plan))


@pytest.mark.parametrize(
    "folder", sorted(PATHS.results.glob("studies/*/studies.json")), ids=lambda path: path.parent.name
)
def test_pinned_studies_are_whole_and_everything_can_be_drawn_of_them_alone(folder: Path, tmp_path: Path) -> None:
    source = folder.parent
    assert pin.verify(f"studies/{source.name}", PATHS) > 0
    planned = pinned_studies(source)
    written = build_studies(planned, source, tmp_path, tmp_path, pinned=True)
    tables, figures = study_names(planned)
    assert {path.stem for path in written} == {*tables, *figures}
    for study in load_studies(planned, source, pinned=True):
        assert study.record["dirty"] is False


def test_studies_of_the_run_that_claims_rest_on_are_pinned() -> None:
    # The test above asks what is there, and would pass with nothing there.
    source = PATHS.results / "studies" / "overnight"
    planned = pinned_studies(source)
    assert {study.kind for study in planned.values()} == set(KINDS)
    stated = json.loads((source / pin.PIN).read_text(encoding="utf-8"))
    assert stated["same_stages_as_pinned_run"] is True, "figures and tables are of one training"


def test_the_run_that_claims_rest_on_has_the_size_that_claims_need() -> None:
    tier = pin.restore("overnight", PATHS).tier
    assert tier.evaluation.split == "test" and tier.evaluation.n >= 1000 and len(tier.evaluation.seeds) >= 8
    assert len({*tier.training_seeds, *tier.claim_seeds.seeds}) >= 3
