"""Table 15: cells that differ in nothing but how responses are drawn, and their difference computed by hand."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from analysis.report import paper
from analysis.report.cells import Results
from analysis.tables.table15 import build, greedy_minus_sampled
from tests.analysis.report.test_document import check_latex

MODELS = {"testbed": {"source": "pinned", "artifacts": ["table15", "table1"]}}
RECIPES = ["base", "ft", "ptq", "ft-ptq", "qat", "reqat-t", "reqat-tq", "reqat-tqs"]  # none of several epochs
METHODS = ["Baseline", "FT", "FT+PTQ", "QAT", "ReQAT-T", "ReQAT-TQ", "ReQAT-TQS"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    from tests.analysis.conftest import make

    return make(
        tmp_path_factory.mktemp("table15"),
        models=MODELS,
        budget={"qat_tokens": 1000, "totals": [2], "claim_total": 2},
        only={"precisions": ["NVFP4-W4A4KV4"], "recipes": RECIPES},
    )


def correct(results: Results, evaluation: str) -> pd.Series:
    """Share of right responses by problem, straight from the file."""
    data = pd.read_parquet(results.root / "evaluations" / evaluation / "outcomes.parquet")
    return data.groupby("problem_id")["correct"].mean()


def test_each_model_is_there_twice_and_only_decoding_differs(results: Results) -> None:
    entries = results.of("table15")
    assert Counter(e.method for e in entries) == dict.fromkeys(METHODS, 2)
    of = {(e.method, e.condition): e for e in entries}
    for method in METHODS:
        sampled, greedy = of[method, "decoding=sampled"], of[method, "decoding=greedy"]
        assert sampled.training_seeds == greedy.training_seeds
        for a, b in zip(sampled.cells, greedy.cells, strict=True):
            a, b = results.plan.evaluation(a.evaluation), results.plan.evaluation(b.evaluation)
            assert b.decoding.greedy and not a.decoding.greedy
            assert len(b.seeds) == 1 and len(a.seeds) == 4
            assert a.model_dump(exclude={"decoding", "seeds"}) == b.model_dump(exclude={"decoding", "seeds"})
            assert a.decoding.model_dump(exclude={"greedy"}) == b.decoding.model_dump(exclude={"greedy"})


def test_sampled_cells_are_evaluations_that_table1_has_anyway(results: Results) -> None:
    there = {c.evaluation for c in results.plan.cells if c.artifact == "table1"}
    for cell in results.plan.cells:
        if cell.artifact == "table15":
            assert (cell.evaluation in there) == (cell.condition == "decoding=sampled")


def test_difference_and_interval_are_those_of_problem_means(results: Results) -> None:
    for method in ("Baseline", "ReQAT-TQS"):  # one run, and three
        sampled, greedy = (
            next(e for e in results.of("table15") if e.method == method and e.condition == f"decoding={how}")
            for how in ("sampled", "greedy")
        )
        runs = [
            correct(results, g.evaluation) - correct(results, s.evaluation)
            for g, s in zip(greedy.cells, sampled.cells, strict=True)
        ]
        by_problem = np.mean([run.to_numpy() for run in runs], axis=0)
        from scipy.stats import t

        half = t.ppf(0.975, 59) * by_problem.std(ddof=1) / np.sqrt(60)
        mean = by_problem.mean()
        assert greedy_minus_sampled(results, greedy, sampled) == pytest.approx((mean, mean - half, mean + half))


def test_table_has_both_ways_and_the_papers_numbers(results: Results) -> None:
    table = build(results)
    check_latex(table.latex(), len(table.columns))
    data = pd.read_csv(io.StringIO(table.csv()), keep_default_na=False, na_values=[""])
    measured = data[data["metric"] == "accuracy"]
    assert len(measured) == 2 * len(METHODS)
    for row in measured.itertuples():
        means = [correct(results, evaluation).mean() for evaluation in row.evaluations.split()]
        assert row.value == pytest.approx(100 * np.mean(means))
        assert ("greedy" in row.decoding) == (row.condition == "decoding=greedy")
    difference = data[data["metric"] == "greedy minus sampled"].set_index("method")["value"]
    wide = measured.pivot(index="method", columns="condition", values="value")
    assert (wide["decoding=greedy"] - wide["decoding=sampled"]).to_dict() == pytest.approx(difference.to_dict())
    reported = data[data["source"] == "paper"]
    assert sorted(reported["value"]) == sorted(r.value for r in paper.select("table15"))
    cells = {row[1].text: [cell.text for cell in row[-2:]] for section in table.sections for row in section}
    assert cells["FT"] == ["37.6, 48.5, 51.5, 51.4, 48.8", "23.3, 35.8, 44.2, 45.8, 43.3"]
    assert cells["FT+PTQ"][1] == "15.8, 24.2, 33.3, 30.8, 35.0"
    assert not any(re.search(r"\d", text) for text in cells["QAT"])


def test_bf16_is_compared_within_one_way_of_decoding(results: Results) -> None:
    table = build(results)
    data = table.data[table.data["metric"] == "accuracy"]
    wide = data.pivot(index="method", columns="condition", values="value")
    for row in data[data["difference"].notna()].itertuples():
        assert row.reference == f"BF16 FT {row.condition}"
    seeds = data.set_index(["method", "condition"])["training_seeds"]
    same = [m for m in METHODS[2:] if seeds[m, "decoding=greedy"] == seeds["FT", "decoding=greedy"]]
    assert same  # the others are compared on the training seeds that both have
    for row in data[data["method"].isin(same)].itertuples():
        assert row.difference == pytest.approx(row.value - wide.loc["FT", row.condition])


def test_two_models_each_have_their_rows(make_results: Callable[..., Results]) -> None:
    model = {"source": "pinned", "artifacts": ["table15"]}
    two = make_results(
        models={"small": model, "large": {"source": "path", "reference": "large"} | model},
        budget={"qat_tokens": 1000, "totals": [2], "claim_total": 2},
        claim_seeds={},
    )
    table = build(two)
    assert table.columns[0].name == "Model"
    assert {row[0].text for section in table.sections for row in section} == {"small", "large"}
