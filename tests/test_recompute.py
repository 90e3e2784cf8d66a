"""Numbers of pinned tables, computed a second time from the pinned outcomes with pandas alone.

Nothing of this project is imported: what a cell of the plan is, which responses it stands for and how they are averaged
is written down here once more, so that a fault in the statistics or in the joining of plan and records shows.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pandas as pd
import pytest

RESULTS = Path(__file__).resolve().parent.parent / "results"
ACCURACIES = ("table1", "table2", "table4", "table5", "table15", "ptq", "global-scale", "sweep", "smollm")
CASES = [
    pytest.param(path.parents[1], path.stem, id=f"{path.parents[1].name}/{path.stem}")
    for path in sorted(RESULTS.glob("*/tables/*.csv"))
    if path.stem in ACCURACIES and (path.parents[1] / "outcomes.parquet").is_file()
]
RUNS = sorted(path.parents[1] for path in RESULTS.glob("*/tables/table6.csv"))
# Both sides are ratios of whole numbers in float64, in percent; only the order of the additions differs.
SAME = {"rel": 0, "abs": 1e-11}


@cache
def outcomes(run: Path) -> pd.DataFrame:
    """Every graded response of a pinned run."""
    return pd.read_parquet(
        run / "outcomes.parquet", columns=["id", "problem_id", "family", "seed", "correct", "n_tokens"]
    )


@cache
def shares(run: Path) -> pd.Series:
    """Percent right by evaluation and family, and over all families."""
    data = outcomes(run)
    every = data.groupby("id")["correct"].agg(["sum", "size"])
    every.index = pd.MultiIndex.from_product([every.index, ["all"]])
    counts = pd.concat([data.groupby(["id", "family"])["correct"].agg(["sum", "size"]), every])
    return 100 * counts["sum"] / counts["size"]


@cache
def cells(run: Path) -> pd.DataFrame:
    """The cells of the plan, one a training seed."""
    return pd.DataFrame(json.loads((run / "plan.json").read_text())["cells"])


def evaluations(run: Path, table: str, row: pd.Series) -> list[str]:
    """The evaluations that a row of a table stands for, by what the row says it is."""
    found = cells(run)
    same = found["artifact"] == table
    for column in ("model", "precision", "method", "condition", "recipe"):
        same &= found[column] == ("" if pd.isna(row[column]) else row[column])
    same &= found["multiple"].isna() if pd.isna(row["multiple"]) else found["multiple"] == row["multiple"]
    return list(found[same].sort_values("training_seed")["evaluation"])


def measured(run: Path, table: str) -> pd.DataFrame:
    data = pd.read_csv(run / "tables" / f"{table}.csv")
    return data[(data["source"] == "measured")]


def test_there_is_something_to_compute_again() -> None:
    assert len({run for case in CASES for run in case.values[:1]}) >= 2 and len(RUNS) >= 2


@pytest.mark.parametrize(("run", "table"), CASES)
def test_accuracies_are_the_share_of_right_responses(run: Path, table: str) -> None:
    data = measured(run, table)
    data = data[data["metric"] == "accuracy"]
    assert len(data) >= 3
    for _, row in data.iterrows():
        ids = evaluations(run, table, row)
        assert ids == row["evaluations"].split()
        of = [shares(run)[id, row["family"]] for id in ids]
        assert row["value"] == pytest.approx(sum(of) / len(of), **SAME)


@pytest.mark.parametrize(("run", "table"), [case for case in CASES if case.values[1] in ("table1", "table2", "ptq")])
def test_differences_are_to_bf16_with_the_same_budget_and_training_seeds(run: Path, table: str) -> None:
    data, checked = measured(run, table), 0
    for _, row in data[data["difference"].notna()].iterrows():
        base = "Baseline" if pd.isna(row["multiple"]) else "FT"
        other = data[(data["precision"] == "BF16") & (data["method"] == base) & (data["family"] == row["family"])]
        if not pd.isna(row["multiple"]):
            other = other[other["multiple"] == row["multiple"]]
        ours, theirs = (
            dict(zip(str(r["training_seeds"]).removesuffix(".0").split(), r["evaluations"].split(), strict=True))
            for r in (row, other.iloc[0])
        )
        seeds = [seed for seed in ours if seed in theirs]
        of = shares(run)
        gaps = [of[ours[seed], row["family"]] - of[theirs[seed], row["family"]] for seed in seeds]
        assert row["difference"] == pytest.approx(sum(gaps) / len(gaps), **SAME)
        checked += 1
    assert checked >= 3


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_table5_has_the_final_losses_of_the_records(run: Path) -> None:
    plan = json.loads((run / "plan.json").read_text())
    records = pd.read_parquet(run / "records.parquet").set_index("id")["record"]
    data = measured(run, "table5")
    data = data[data["metric"] == "final_loss"]
    assert len(data) >= 3
    for _, row in data.iterrows():
        stages = [plan["evaluations"][id]["stage"] for id in evaluations(run, "table5", row)]
        losses = pd.Series([json.loads(records[stage])["metrics"]["final_loss"] for stage in stages])
        assert row["value"] == pytest.approx(losses.mean(), **SAME)
        assert pd.isna(row["sd"]) if len(losses) == 1 else row["sd"] == pytest.approx(losses.std(), **SAME)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_table6_counts_responses_by_their_length(run: Path) -> None:
    data = measured(run, "table6")
    lengths = dict(list(outcomes(run).groupby("id")))
    lines = {ids: pd.concat([lengths[id] for id in ids.split()]) for ids in data["evaluations"].unique()}
    for _, row in data.iterrows():
        of = lines[row["evaluations"]]
        inside = of[of["n_tokens"].between(row["tokens_lo"], row["tokens_hi"])]
        assert len(inside) == row["n_responses"] and inside["problem_id"].nunique() == row["n_problems"]
        assert row["value"] == pytest.approx(100 * inside["correct"].mean(), nan_ok=True, **SAME)  # nan: none inside
    # Quartiles of the lengths of all lines together: a quarter lies at or below the first limit, and so on.
    pooled = pd.concat([of["n_tokens"] for of in lines.values()])
    for i, limit in enumerate(sorted(data["tokens_hi"].unique())[:-1], 1):
        assert (pooled < limit).mean() <= i / 4 <= (pooled <= limit).mean()


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_table15_subtracts_sampled_from_greedy_problem_by_problem(run: Path) -> None:
    data, by_problem = measured(run, "table15"), outcomes(run).groupby(["id", "problem_id"])["correct"].mean()
    keys = ["precision", "method", "multiple"]
    values = data[data["metric"] == "accuracy"]
    differences = data[data["metric"] == "greedy minus sampled"]
    assert len(differences) >= 3
    for _, row in differences.iterrows():
        same = values[(values[keys].fillna(0) == row[keys].fillna(0)).all(axis=1)]
        sampled, greedy = (
            same[same["condition"] == f"decoding={how}"]["evaluations"].item().split() for how in ("sampled", "greedy")
        )
        gaps = [by_problem[b] - by_problem[a] for a, b in zip(sampled, greedy, strict=True)]
        mean = pd.concat(gaps, axis=1).mean(axis=1).mean()
        assert row["value"] == pytest.approx(100 * mean, **SAME)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_claims_are_differences_of_two_cells(run: Path) -> None:
    data, of = pd.read_csv(run / "tables" / "claims.csv"), shares(run)
    assert len(data) >= 3
    for _, row in data.iterrows():
        sides = []
        for text in (row["a"], row["b"]):
            precision, method, *condition = text.split()
            found = cells(run)
            condition = condition[0] if condition else ""
            table = "table4" if "aligned" in condition else "table1"
            same = (found["artifact"] == table) & (found["precision"] == precision) & (found["method"] == method)
            same &= (found["condition"] == condition) & (found["multiple"] == row["multiple"])
            sides.append(found[same].set_index("training_seed")["evaluation"])
        both = sides[0].index.intersection(sides[1].index)
        gaps = [of[sides[0][seed], "all"] - of[sides[1][seed], "all"] for seed in both]
        assert row["difference"] == pytest.approx(sum(gaps) / len(gaps), **SAME)
