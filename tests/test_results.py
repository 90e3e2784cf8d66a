"""What `results/` keeps: the base is the one that the tiers describe, pinned runs are whole and can still be drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.build import (
    build_studies,
    build_tables,
    build_throughput,
    pinned_companions,
    results_of,
    verdict_runs,
)
from analysis.registry import study_names, table_names, throughput_names
from analysis.report import companion_claims, summary
from analysis.report.studies import load_studies, pinned_studies
from reqat.config import Paths, load
from reqat.config.companions import kinds
from reqat.pipeline import pin
from reqat.records import pinned, record

ROOT = Path(__file__).resolve().parent.parent
PATHS = Paths(ROOT)
KEPT = pinned.newest(PATHS)


def tiers(part: pinned.Part) -> list[str]:
    return sorted(tier for tier, its in KEPT if its == part)


@pytest.mark.parametrize(("tier", "label"), [("testbed", "testbed"), ("converged", "converged")])
def test_the_pinned_base_is_the_one_that_the_tiers_describe(tier: str, label: str) -> None:
    folder = PATHS.pinned_base(label)
    kept = record.read(folder)
    assert kept["id"] == load(tier, PATHS).scratch[label]
    assert kept["dirty"] is False
    sizes = {name: file["bytes"] for name, file in kept["outputs"].items()}
    assert sum(sizes.values()) <= pin.BASE_BYTES
    for name, file in kept["outputs"].items():
        assert record.sha256(folder / name) == file["sha256"], name


@pytest.mark.parametrize("folder", sorted(path.parent for path in PATHS.results.glob("*/manifest.json")), ids=str)
def test_a_pinned_folder_holds_what_its_manifest_lists(folder: Path) -> None:
    assert pinned.verify(folder) > 0
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert there == {"manifest.json", *pinned.manifest(folder)["files"]}
    assert f"| `{folder.name}/` |" in (PATHS.results / "README.md").read_text(), "cited for what?"


@pytest.mark.parametrize("tier", tiers("run"))
def test_every_table_can_be_made_of_a_pinned_run_alone(tier: str, tmp_path: Path) -> None:
    with pinned.restored(KEPT[tier, "run"], "run") as kept:
        written = build_tables(kept.plan, kept.root, tmp_path, pinned=True, paths=PATHS)
        assert {path.stem for path in written} == set(table_names(kept.plan))
        for path, entry in kept.records.items():
            assert entry["dirty"] is False, path


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("tier", tiers("studies"))
def test_everything_can_be_drawn_of_pinned_studies_alone(tier: str, tmp_path: Path) -> None:
    with pinned.restored(KEPT[tier, "studies"], "studies") as kept:
        source = kept.root / "studies"
        planned = pinned_studies(source)
        written = build_studies(planned, source, tmp_path, tmp_path, pinned=True)
        tables, figures = study_names(planned)
        assert {path.stem for path in written} == {*tables, *figures}
        for study in load_studies(planned, source, pinned=True):
            assert study.record["dirty"] is False


@pytest.mark.parametrize("tier", tiers("benchmark"))
def test_everything_can_be_drawn_of_a_pinned_benchmark_alone(tier: str, tmp_path: Path) -> None:
    with pinned.restored(KEPT[tier, "benchmark"], "benchmark") as kept:
        ((id, entry),) = kept.records.items()
        written = build_throughput(kept.root / "throughput" / id, tmp_path, tmp_path)
        tables, figures = throughput_names(entry["config"])
        assert {path.stem for path in written} == {*tables, *figures} and entry["dirty"] is False


def test_studies_of_the_run_that_claims_rest_on_are_pinned() -> None:
    # The tests above ask what is there, and would pass with nothing there.
    folder = KEPT["overnight", "studies"]
    with pinned.restored(folder, "studies") as kept:
        of_paper = {"pair", "routing", "noise", "reset", "dynamics", "gradients"}  # what its figures show
        assert {study.kind for study in pinned_studies(kept.root / "studies").values()} >= of_paper
    assert pinned.manifest(folder)["same_stages_as_pinned_run"] is True, "figures and tables are of one training"


def test_the_claims_of_companions_are_those_of_the_pinned_ones() -> None:
    folders, claims = pinned_companions(PATHS)
    assert folders.keys() == {one.companion for one in claims if one.headline} == kinds().keys(), (
        "a line for each system"
    )
    pages = {kind: f"docs/companions/{kind}.md" for kind in kinds()}
    assert all((ROOT / page).is_file() for page in pages.values())
    readme = (ROOT / "README.md").read_text()
    block = companion_claims.block(claims, folders, pages)
    assert summary.filled(readme, block, companion_claims.BEGIN, companion_claims.END) == readme
    page = PATHS.results / f"{companion_claims.NAME}.md"
    assert page.read_text() == companion_claims.build(claims, folders).markdown()


def test_the_claims_over_all_models_are_those_of_the_pinned_runs() -> None:
    runs = verdict_runs(PATHS)
    table = summary.build(runs)
    assert len(table.sections[0]) == 10, "the claims that the paper rests on, on accuracy and on likelihood"
    assert [run.heading for run in runs] == list(summary.PLACES), "a column a model, run or not"
    for run, groups in zip(runs, summary.PLACES.values(), strict=True):
        assert run.run == any((first, "run") in KEPT for first, *_ in groups)
    # What README opens with and results/verdicts.md are these runs' (`reqat report --verdicts` writes both).
    readme = (ROOT / "README.md").read_text()
    assert summary.filled(readme, summary.block(runs)) == readme
    assert (PATHS.results / "verdicts.md").read_text() == table.markdown()
    with pinned.restored(KEPT["claims", "run"], "run") as kept:
        results = results_of(kept.plan, kept.root, pinned=True, paths=PATHS)
        by_recipe = {c.recipe: c for c in results.of("table1") if c.precision == "NVFP4-W4A4KV4"}
        d = results.paired(by_recipe["reqat-tqs"], by_recipe["qat"])
    rows = table.data[(table.data["model"] == "testbed") & (table.data["claim"] == "ReQAT-TQS above QAT")]
    on_accuracy = rows[rows["measure"] == "accuracy"]
    assert on_accuracy["difference"].tolist() == [100 * d.value] and on_accuracy["primary"].all()


def test_the_run_that_claims_rest_on_has_the_size_that_claims_need() -> None:
    with pinned.restored(KEPT["claims", "run"], "run") as kept:
        tier = kept.plan.tier
    assert tier.evaluation.split == "test" and tier.evaluation.n >= 1000 and len(tier.evaluation.seeds) >= 8
    assert len({*tier.training_seeds, *tier.claim_seeds.seeds}) >= 3
