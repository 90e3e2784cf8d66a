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
ACCURACIES = (
    "table1",
    "table2",
    "table4",
    "table5",
    "table7",
    "table14",
    "table15",
    "table16",
    "table17",
    "ptq",
    "rates",
)
ACCURACIES += ("claims-rows", "global-scale", "sweep", "smollm")
CASES = [
    pytest.param(path.parents[1], path.stem, id=f"{path.parents[1].name}/{path.stem}")
    for path in sorted(RESULTS.glob("*/tables/*.csv"))
    if path.stem in ACCURACIES and (path.parents[1] / "outcomes.parquet").is_file()
]
# Both sides are ratios of whole numbers in float64, in percent; only the order of the additions differs.
SAME = {"rel": 0, "abs": 1e-11}


def having(*tables: str) -> list[object]:
    """A case for each pinned run that has one of these tables; where none has it yet, one that says so."""
    cases: list[object] = []
    for table in tables:
        runs = sorted(path.parents[1] for path in RESULTS.glob(f"*/tables/{table}.csv"))
        cases += [pytest.param(run, table, id=f"{run.name}/{table}") for run in runs]
        if not runs:
            skip = pytest.mark.skip(reason=f"no pinned run has {table} yet")
            cases.append(pytest.param(RESULTS, table, marks=skip, id=f"none/{table}"))
    return cases


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
    data = pd.DataFrame(json.loads((run / "plan.json").read_text())["cells"])
    if "problems" not in data:  # older plans knew one set of problems alone
        data["problems"] = "own"
    return data


@cache
def records(run: Path) -> pd.Series:
    """The text of every record by the id of what it is of."""
    return pd.read_parquet(run / "records.parquet").set_index("id")["record"]


def evaluations(run: Path, table: str, row: pd.Series) -> list[str]:
    """The evaluations that a row of a table stands for, by what the row says it is."""
    found = cells(run)
    same = found["artifact"] == table
    for column in ("model", "precision", "method", "condition", "recipe"):
        same &= found[column] == ("" if pd.isna(row[column]) else row[column])
    same &= found["multiple"].isna() if pd.isna(row["multiple"]) else found["multiple"] == row["multiple"]
    same &= found["problems"] == ("own" if pd.isna(row.get("problems")) else row["problems"])
    return list(found[same].sort_values("training_seed")["evaluation"])


def measured(run: Path, table: str) -> pd.DataFrame:
    data = pd.read_csv(run / "tables" / f"{table}.csv")
    return data[(data["source"] == "measured")]


def test_there_is_something_to_compute_again() -> None:
    assert len({run for case in CASES for run in case.values[:1]}) >= 2
    for table in ("table5", "table6", "table15", "claims"):
        assert not any(case.marks for case in having(table)), table


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


@pytest.mark.parametrize(("run", "table"), having("table7", "table14", "table16", "table17"))
def test_differences_are_to_the_row_that_they_name(run: Path, table: str) -> None:
    data, of, checked = measured(run, table), shares(run), 0
    named = (data["precision"] + " " + data["method"] + " " + data["condition"].astype(object).fillna("")).str.strip()
    for _, row in data[data["difference"].notna()].iterrows():
        other = data[(named == row["reference"]) & (data["model"] == row["model"]) & (data["family"] == row["family"])]
        if "problems" in data:
            other = other[other["problems"].fillna("own") == ("own" if pd.isna(row["problems"]) else row["problems"])]
        if not pd.isna(row["multiple"]):
            other = other[other["multiple"] == row["multiple"]]
        ours, theirs = (
            dict(zip(str(r["training_seeds"]).removesuffix(".0").split(), r["evaluations"].split(), strict=True))
            for r in (row, other.iloc[0])
        )
        gaps = [of[ours[seed], row["family"]] - of[theirs[seed], row["family"]] for seed in ours if seed in theirs]
        assert len(other) == 1 and row["difference"] == pytest.approx(sum(gaps) / len(gaps), **SAME)
        checked += 1
    assert checked >= 3


@pytest.mark.parametrize(("run", "table"), having("table7"))
def test_table7_counts_answers_that_do_not_parse(run: Path, table: str) -> None:
    data, sizes = measured(run, table), outcomes(run).groupby("id").size()
    assert len(data) >= 3
    for _, row in data.iterrows():
        ids = row["evaluations"].split()
        malformed = sum(json.loads(records(run)[id])["metrics"]["malformed"] for id in ids)
        assert row["malformed"] == pytest.approx(malformed / sizes[ids].sum(), **SAME)


@pytest.mark.parametrize(("run", "table"), having("table14"))
def test_table14_divides_drops_by_what_is_known_beyond_four_options(run: Path, table: str) -> None:
    data, of = measured(run, table), shares(run)
    drops = data[data["relative_drop"].notna() & (data["problems"] == "facts")]
    assert len(drops) >= 1
    for _, row in drops.iterrows():
        method = row["reference"].split()[1]
        other = data[(data["precision"] == "BF16") & (data["method"] == method) & (data["problems"] == "facts")]
        seeds = set(str(row["training_seeds"]).removesuffix(".0").split())
        (them,) = (dict(zip(str(r["training_seeds"]).removesuffix(".0").split(), r["evaluations"].split(), strict=True))
                   for _, r in other.iterrows())  # fmt: skip
        reference = [of[id, "all"] for seed, id in them.items() if seed in seeds]
        known = sum(reference) / len(reference) - 100 / 4
        assert row["relative_drop"] == pytest.approx(-100 * row["difference"] / known, **SAME)


@pytest.mark.parametrize(("run", "table"), having("table16"))
def test_table16_averages_families(run: Path, table: str) -> None:
    data = measured(run, table)
    lines = list(data.groupby(["model", "condition"]))
    assert len(lines) >= 3
    for _, line in lines:
        whole, parts = line[line["family"] == "all"], line[line["family"] != "all"]
        assert len(whole) == 1 and len(parts) >= 2
        # Families have equally many problems, so the accuracy over all is the mean of theirs.
        assert whole["value"].item() == pytest.approx(parts["value"].mean(), **SAME)


@pytest.mark.parametrize(("run", "table"), having("table5"))
def test_table5_has_the_final_losses_of_the_records(run: Path, table: str) -> None:
    plan = json.loads((run / "plan.json").read_text())
    data = measured(run, table)
    data = data[data["metric"] == "final_loss"]
    assert len(data) >= 3
    for _, row in data.iterrows():
        stages = [plan["evaluations"][id]["stage"] for id in evaluations(run, table, row)]
        losses = pd.Series([json.loads(records(run)[stage])["metrics"]["final_loss"] for stage in stages])
        assert row["value"] == pytest.approx(losses.mean(), **SAME)
        assert pd.isna(row["sd"]) if len(losses) == 1 else row["sd"] == pytest.approx(losses.std(), **SAME)


@pytest.mark.parametrize(("run", "table"), having("table6"))
def test_table6_counts_responses_by_their_length(run: Path, table: str) -> None:
    data = measured(run, table)
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


@pytest.mark.parametrize(("run", "table"), having("table15"))
def test_table15_subtracts_sampled_from_greedy_problem_by_problem(run: Path, table: str) -> None:
    data, by_problem = measured(run, table), outcomes(run).groupby(["id", "problem_id"])["correct"].mean()
    keys = ["model", "precision", "method", "recipe", "multiple"]
    values = data[data["metric"] == "accuracy"]
    differences = data[data["metric"] == "greedy minus sampled"]
    assert len(differences) >= 3
    for _, row in differences.iterrows():
        same = values[(values[keys].fillna(0) == row[keys].fillna(0)).all(axis=1)]
        sampled, greedy = (
            same[same["condition"].str.startswith(f"decoding={how}")]["evaluations"].item().split()
            for how in ("sampled", "greedy")
        )
        gaps = [by_problem[b] - by_problem[a] for a, b in zip(sampled, greedy, strict=True)]
        mean = pd.concat(gaps, axis=1).mean(axis=1).mean()
        assert row["value"] == pytest.approx(100 * mean, **SAME)


def sides(run: Path, row: pd.Series) -> list[list[str]]:
    """The evaluations of both sides of a claim, one a training seed (and set of problems), in the same order."""
    found = cells(run)
    if "evaluations_b" not in row:  # tables of older runs name one side's: the other is looked up by its name
        each = []
        for text in (row["a"], row["b"]):
            precision, method, *condition = text.split()
            table = "table4" if condition and "aligned" in condition[0] else "table1"
            same = (found["artifact"] == table) & (found["precision"] == precision) & (found["method"] == method)
            same &= (found["condition"] == "".join(condition)) & (found["multiple"] == row["multiple"])
            each.append(found[same].set_index("training_seed")["evaluation"])
        both = each[0].index.intersection(each[1].index)
        return [list(side[both]) for side in each]
    out = [row["evaluations"].split(), row["evaluations_b"].split()]
    for text, ids in zip((row["a"], row["b"]), out, strict=True):
        mine = found[found["evaluation"].isin(ids) & (found["model"] == row["model"])]
        names = (mine["precision"] + " " + mine["method"] + " " + mine["condition"]).str.strip()
        assert set(mine.loc[names == text, "evaluation"]) == set(ids), "they are of the cells that the row names"
    return out


@pytest.mark.parametrize(("run", "table"), having("claims"))
def test_claims_are_differences_of_two_cells(run: Path, table: str) -> None:
    data, counts = (
        pd.read_csv(run / "tables" / f"{table}.csv"),
        outcomes(run).groupby("id")["correct"].agg(["sum", "size"]),
    )

    def percent(ids: list[str]) -> float:  # an evaluation as often as it is named: one base beside several trainings
        return float(100 * counts.loc[ids, "sum"].sum() / counts.loc[ids, "size"].sum())

    assert len(data) >= 3
    for _, row in data.iterrows():
        a, b = sides(run, row)
        assert len(a) == len(b)
        difference = percent(a) - percent(b)
        if "evaluations_beyond" in row and not pd.isna(row["evaluations_beyond"]):
            difference -= percent(row["evaluations_beyond"].split()) - percent(row["evaluations_beyond_b"].split())
        assert row["difference"] == pytest.approx(difference, **SAME)
