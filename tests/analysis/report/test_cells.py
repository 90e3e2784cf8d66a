"""Plan and records joined: the right outcomes under each cell, and no gap passed over."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.report.cells import MissingResults, Results, entries
from reqat.config.errors import ReqatError
from reqat.records import record
from reqat.records.pinned import PLAN, fold, unfold


def test_entries_hold_every_cell_once(results: Results) -> None:
    assert sum(len(e.cells) for e in results.entries) == len(results.plan.cells)
    seeds = {e.training_seeds for e in results.of("table1") if e.multiple == 3 and e.precision == "NVFP4-W4A4KV4"}
    assert seeds == {(0, 1, 2)}
    assert {e.training_seeds for e in results.of("table1") if e.multiple == 2} == {(0,)}


def test_a_cell_twice_in_the_plan_is_refused(results: Results) -> None:
    cell = results.plan.cells[0]
    with pytest.raises(ReqatError, match="holds a cell twice: table1, testbed, BF16, Baseline"):
        entries([cell, cell])


def test_estimate_is_the_mean_of_the_files(results: Results) -> None:
    entry = next(e for e in results.of("table1") if len(e.cells) == 3)
    raw = [pd.read_parquet(results.folder(c.evaluation) / "outcomes.parquet") for c in entry.cells]
    assert results.estimate(entry).value == pytest.approx(np.mean([f["correct"].mean() for f in raw]), abs=1e-12)
    family = results.families(entry)[0]
    mine = [f[f["family"] == family]["correct"].mean() for f in raw]
    assert results.estimate(entry, family).value == pytest.approx(np.mean(mine), abs=1e-12)
    e = results.estimate(entry)
    assert e.lo < e.value < e.hi and e.n_problems == 60


def test_paired_is_the_difference_on_shared_training_seeds(results: Results) -> None:
    table = {(e.precision, e.method, e.multiple): e for e in results.of("table1")}
    a, b = table["NVFP4-W4A4KV4", "QAT", 3], table["BF16", "FT", 3]
    d = results.paired(a, b)
    assert d.value == pytest.approx(results.estimate(a).value - results.estimate(b).value, abs=1e-12)
    # A side with one training seed is compared with that seed of the other, not with its average.
    one = replace(b, cells=b.cells[1:2])
    first = results.paired(a, one).value
    assert first == pytest.approx(
        results.estimate(replace(a, cells=a.cells[1:2])).value - results.estimate(one).value, abs=1e-12
    )
    with pytest.raises(ReqatError, match="no training seed in common"):
        results.paired(replace(a, cells=a.cells[:1]), one)


def test_frame_has_one_row_a_cell(results: Results) -> None:
    data = results.frame("table4")
    assert len(data) == len([c for c in results.plan.cells if c.artifact == "table4"])
    assert {
        "precision",
        "method",
        "total_tokens",
        "training_seed",
        "condition",
        "evaluation",
        "value",
        "lo",
        "hi",
    } <= set(data)
    assert str(data["total_tokens"].dtype) == "Int64" and data["value"].between(0, 1).all()


def test_missing_cells_are_named_with_the_command(own_results: Results) -> None:
    results = own_results
    results.check()
    entry = next(
        e for e in results.of("table1") if (e.method, e.precision, e.multiple) == ("ReQAT-TQS", "MXFP4-W4A4", 2)
    )
    id = entry.cells[0].evaluation
    (results.folder(id) / "outcomes.parquet").unlink()
    with pytest.raises(MissingResults) as caught:
        results.check()
    message = str(caught.value)
    assert id in message and "MXFP4-W4A4, ReQAT-TQS, 2 x QAT budget, training seed 0" in message
    assert f"reqat evaluate {id} --tier synthetic" in message and "snakemake" in message
    with pytest.raises(MissingResults, match="no outcomes"):
        results.estimate(entry)
    results.check(["table4"])  # other artifacts are whole


def rewrite(results: Results, id: str, rows: slice) -> None:
    """Leave only some outcomes, with a record that states them: a smaller evaluation under the same name."""
    path = results.folder(id) / "outcomes.parquet"
    pd.read_parquet(path).iloc[rows].to_parquet(path)
    about = json.loads((path.parent / "record.json").read_text())
    (path.parent / "record.json").write_text(json.dumps(about | {"outputs": record.outputs(path.parent)}))


def test_incomplete_outcomes_are_refused(own_results: Results) -> None:
    entry = own_results.of("table1")[0]
    rewrite(own_results, entry.cells[0].evaluation, slice(0, 239))
    with pytest.raises(MissingResults, match="239 outcomes of 60 problems.*asks for each of 60 problems once"):
        own_results.outcomes(entry)


def test_outcomes_that_are_not_those_of_the_record_are_refused(own_results: Results) -> None:
    entry = own_results.of("table1")[0]
    path = own_results.folder(entry.cells[0].evaluation) / "outcomes.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MissingResults, match="not the file that its record describes"):
        own_results.outcomes(entry)


def test_pinned_outcomes_give_the_same_numbers(results: Results, tmp_path: Path) -> None:
    """Pinning drops the responses' text, so the file is not the one that its record states."""
    folder = tmp_path / "pinned"
    folder.mkdir()
    evaluations = sorted({c.evaluation for c in results.plan.cells if c.artifact == "table4"})
    fold(results.root, [f"evaluations/{id}" for id in evaluations], folder)
    record.write(folder / PLAN, results.plan.dump())
    pinned = Results(results.plan, unfold(folder, "run", tmp_path / "root").root, pinned=True)
    pinned.check(["table4"])
    for ours, theirs in zip(pinned.of("table4"), results.of("table4"), strict=True):
        assert pinned.estimate(ours) == results.estimate(theirs)


def test_what_trains_nothing_is_compared_with_every_training_seed(results: Results) -> None:
    table = {(e.precision, e.method, e.multiple): e for e in results.of("table1")}
    base, tuned = table["BF16", "Baseline", None], table["BF16", "FT", 3]
    d = results.paired(tuned, base)
    assert d.n_training_seeds == 3
    assert d.value == pytest.approx(results.estimate(tuned).value - results.estimate(base).value, abs=1e-12)


def test_bad_records_are_refused(own_results: Results) -> None:
    results = own_results
    ids = [c.evaluation for c in results.plan.cells[:2]]
    path = results.folder(ids[0]) / "record.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(MissingResults, match="not a whole record"):
        results.record(ids[0])
    path = results.folder(ids[1]) / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id": "evaluation-of-another"}))
    with pytest.raises(MissingResults, match="holds evaluation-of-another"):
        results.record(ids[1])


def test_pinned_results_that_do_not_fit_the_plan_say_so(own_results: Results) -> None:
    results = own_results
    pinned = Results(results.plan, results.root, pinned=True)
    (results.folder(results.plan.cells[0].evaluation) / "record.json").unlink()
    with pytest.raises(MissingResults, match="pinned results do not answer the plan.*reqat pin"):
        pinned.check()


def test_provenance_says_what_captions_must(own_results: Results) -> None:
    results = own_results
    id = results.of("table1")[0].cells[0].evaluation
    path = results.folder(id) / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dirty": True, "hardware": {"device": "cuda"}}))
    text = " ".join(results.provenance(results.of("table1")).notes())
    assert "Tier synthetic (fresh results)" in text and "60 test problems, 4 sampling seeds" in text
    assert "1 to 3 training seeds" in text and "T 0.6, top-p 0.95" in text
    assert "fake-quantized, CPU; fake-quantized, GPU" in text and "0123456789, 0123456789+changes" in text


def test_a_sweep_on_the_validation_split_says_so(make_results: Callable[..., Results]) -> None:
    results = make_results(
        models={"testbed": {"source": "pinned", "artifacts": ["table4"]}},
        evaluation={"n": 4, "seeds": [0], "split": "validation"},
    )
    assert "4 validation problems, 1 sampling seed (" in " ".join(results.provenance(results.entries).notes())


def test_an_artifact_that_the_tier_lacks(results: Results) -> None:
    with pytest.raises(ReqatError, match="tier synthetic has no artifact 'table9'; it has table1, "):
        results.of("table9")
