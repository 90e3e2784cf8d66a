"""A study or an evaluation that is killed goes on with what it has not graded, and ends with the same bytes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from analysis.report.studies import Study
from reqat.config import Paths, load
from reqat.evaluation.held_out import likelihood_sums
from reqat.generation import batches
from reqat.records import record
from tests.cli.smoke_studies import ROOT, STUDIES, ask, reqat, train

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_a_killed_likelihood_study_goes_on_with_the_models_that_it_has_not_read(
    checkout: Path, loaded: dict[str, Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    (study,) = ask(checkout, next(s for s in STUDIES if s["kind"] == "likelihood")).values()
    folder = checkout / "build" / "studies" / study.id
    whole = (folder / "likelihood.parquet").read_bytes()
    shutil.rmtree(folder)
    taken: list[str] = []

    def once(*given: Any, **options: Any) -> Any:
        taken.append("read")
        if taken.count("read") == 2:
            raise KeyboardInterrupt
        return likelihood_sums(*given, **options)

    monkeypatch.setattr("reqat.evaluation.held_out.likelihood_sums", once)
    assert reqat("study", study.id, "--tier", "smoke", "-q") != 0
    assert not folder.exists()
    monkeypatch.setattr(
        "reqat.evaluation.held_out.likelihood_sums",
        lambda *g, **o: (taken.append("again"), likelihood_sums(*g, **o))[1],
    )
    assert reqat("study", study.id, "--tier", "smoke", "-q") == 0
    assert taken.count("again") == 1
    assert (folder / "likelihood.parquet").read_bytes() == whole
    assert record.read(folder)["resumed"]
    assert not (checkout / "build" / "checkpoints" / study.id).exists()


def killed(monkeypatch: pytest.MonkeyPatch, at: int, *command: object) -> int:
    """Run a command that a kill ends before it decodes batch number ``at``, then again to its end; returns how many
    batches the second attempt decoded."""
    decode, decoded = batches._decode, []

    def counted(*given: Any) -> Any:
        decoded.append(0)
        if len(decoded) == at:
            raise KeyboardInterrupt
        return decode(*given)

    monkeypatch.setattr(batches, "_decode", counted)
    assert reqat(*command) != 0
    assert len(decoded) == at
    assert reqat(*command) == 0
    return len(decoded) - at


@pytest.mark.parametrize(("kind", "at"), [("pair", 2), ("routing", 4), ("noise", 3), ("reset", 4)])
def test_a_killed_study_goes_on_with_what_it_has_not_graded(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, kind: str, at: int
) -> None:
    (study,) = ask(checkout, next(s for s in STUDIES if s["kind"] == kind)).values()
    folder = checkout / "build" / "studies" / study.id
    whole = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    shutil.rmtree(folder)
    again = killed(monkeypatch, at, "study", study.id, "--tier", "smoke", "-q")
    # A batch a condition; of routing and reset another for the held-out measurement, which is made anew.
    once = {"pair": 2, "routing": 5, "noise": 3, "reset": 6}[kind]
    assert again == once - (at - 1) + (kind in ("routing", "reset"))
    made = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert made.keys() == whole.keys()
    assert [name for name in made if name.name != "record.json" and made[name] != whole[name]] == []
    assert record.read(folder)["resumed"]
    assert not (checkout / "build" / "checkpoints" / study.id).exists()


def test_a_killed_evaluation_goes_on_with_the_batches_that_it_has_not_decoded(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = in_three_batches(checkout)
    folder, told = checkout / "build" / "evaluations" / id, ("--tier", "smoke", "-q")
    assert reqat("evaluate", id, *told) == 0
    whole = (folder / "outcomes.parquet").read_bytes()
    shutil.rmtree(folder)
    assert killed(monkeypatch, 3, "evaluate", id, *told) == 1
    assert (folder / "outcomes.parquet").read_bytes() == whole
    assert record.read(folder)["resumed"]
    assert not (checkout / "build" / "checkpoints" / id).exists()


def in_three_batches(checkout: Path) -> str:
    """Let the smoke tier decode an evaluation in three batches; returns the id of one of FT+PTQ."""
    tier = checkout / "config" / "tiers" / "smoke.yaml"
    given = yaml.safe_load(tier.read_text())
    given["evaluation"] = {"n": 6, "seeds": [0, 1], "decoding": {"max_new_tokens": 8, "batch_rows": 4}}
    tier.write_text(yaml.safe_dump(given))
    cells = load("smoke", Paths(checkout)).cells
    return next(c.evaluation for c in cells if (c.recipe, c.precision) == ("ft-ptq", "NVFP4-W4A4KV4"))


@pytest.mark.parametrize("kind", ["evaluation", "pair", "noise", "likelihood"])
def test_what_was_kept_of_weights_that_were_trained_again_since_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "config", root / "config")
    monkeypatch.chdir(root)
    studies = ask(root, next(s for s in STUDIES if s["kind"] == ("pair" if kind == "evaluation" else kind)))
    train(root, studies)
    id = in_three_batches(root) if kind == "evaluation" else next(iter(studies))
    verb, place = ("evaluate", "evaluations") if kind == "evaluation" else ("study", "studies")
    folder, kept = root / "build" / place / id, root / "build" / "checkpoints" / id
    target = "reqat.evaluation.held_out.likelihood_sums" if kind == "likelihood" else "reqat.generation.batches._decode"
    work, begun = likelihood_sums if kind == "likelihood" else batches._decode, []

    def once(*given: Any, **options: Any) -> Any:
        begun.append(0)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return work(*given, **options)

    with monkeypatch.context() as patched:
        patched.setattr(target, once)
        assert reqat(verb, id, "--tier", "smoke", "-q") != 0
    assert len(begun) == 2 and any(path.is_file() for path in kept.rglob("*"))
    shutil.rmtree(root / "build" / "stages")
    train(root, studies, first_seed=100)
    found = []
    for _ in range(2):  # after the kill, then with nothing there
        assert reqat(verb, id, "--tier", "smoke", "-q") == 0
        assert record.read(folder)["resumed"] is False
        files = (path for path in folder.rglob("*") if path.is_file() and path.name != record.FILE)
        found.append({path.relative_to(folder): path.read_bytes() for path in files})
        shutil.rmtree(folder)
        assert not kept.exists()
    assert found[0] == found[1]
