"""Tables 7 to 17 of one synthetic tier with named sets of problems: every number anew from the outcomes on disk."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.build import tables
from analysis.registry import table_names
from analysis.report import paper, pooled, verdicts
from analysis.report.cells import Entry, Results
from analysis.report.document import Table
from analysis.tables import table7, table10
from reqat.config.errors import ReqatError
from tests.analysis.conftest import make
from tests.analysis.report.test_document import check_latex

ARTIFACTS = ["table7", "table9", "table10", "table12", "table13", "table14", "table15", "table16", "table17"]
EDITIONS = ["edition-1", "edition-2", "edition-3", "edition-4"]
SETS = {
    name: {"families": {"chain_sum": {"min_terms": k, "max_terms": k}}, "n": 12} for k, name in enumerate(EDITIONS, 2)
} | {
    "validation": {"split": "validation", "n": 30},
    "code": {"families": {"code": {}}, "n": 20},
    "facts": {"families": {"facts": {}}, "n": 40},
}
MODEL = {"source": "pinned", "artifacts": ARTIFACTS}
CHANGES: dict[str, Any] = {
    "models": {"testbed": MODEL | {"shape": dict.fromkeys(("hidden_size", "layers", "heads", "kv_heads", "mlp"), 32)}},
    "budget": {"qat_tokens": 1000, "totals": [2, 4], "claim_total": 4},
    "claim_seeds": {"seeds": [0, 1], "recipes": ["ft", "reqat-tqs"], "precisions": ["BF16", "NVFP4-W4A4KV4"]},
    "evaluation": {"n": 20, "seeds": [0, 1], "sets": SETS},
}
CHANGES["models"]["testbed"]["shape"] |= {"head_dim": 32, "vocabulary": 100}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return make(tmp_path_factory.mktemp("wide"), **CHANGES)


@pytest.fixture(scope="module")
def made(wide: Results) -> dict[str, Table]:
    return {table.name: table for table in tables(wide)}


def read(table: Table) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(table.csv()), keep_default_na=False, na_values=[""], dtype={"condition": object})


def measured(table: Table, metric: str = "accuracy") -> pd.DataFrame:
    data = read(table)
    return data[(data["source"] == "measured") & (data["metric"] == metric)]


def share(results: Results, evaluations: str, family: str = "all") -> float:
    """Percent right, mean over evaluations (which have equally many responses)."""
    frames = [pd.read_parquet(results.root / "evaluations" / id / "outcomes.parquet") for id in evaluations.split()]
    return 100 * float(np.mean([f[(f["family"] == family) | (family == "all")]["correct"].mean() for f in frames]))


def test_all_of_them_are_made_and_read_in_latex_and_markdown(wide: Results, made: dict[str, Table]) -> None:
    assert list(made) == table_names(wide.plan) == [*ARTIFACTS, "claims", "table11", "table8"]
    for table in made.values():
        check_latex(table.latex(), len(table.columns))
        assert "Tier synthetic" in table.markdown() and " nan" not in table.markdown().lower()


@pytest.mark.parametrize("name", [name for name in ARTIFACTS if name != "table9"])
def test_accuracies_are_of_the_outcomes_and_the_papers_numbers_are_all_there(
    wide: Results, made: dict[str, Table], name: str
) -> None:
    data = measured(made[name])
    assert len(data) >= len(wide.of(name))
    for row in data.itertuples():
        assert row.value == pytest.approx(share(wide, row.evaluations, row.family), abs=1e-9)
        assert row.lo <= row.value <= row.hi
    theirs = read(made[name])
    theirs = theirs[theirs["source"] == "paper"]
    assert sorted(theirs["value"]) == sorted(r.value for r in paper.select(name))


@pytest.mark.parametrize("name", ["table7", "table10", "table12", "table13", "table14", "table16", "table17"])
def test_differences_are_to_what_they_say(wide: Results, made: dict[str, Table], name: str) -> None:
    """Where both sides have the same training seeds, the difference is that of the two printed accuracies."""
    data, checked = measured(made[name]), 0
    keys = ["precision", "method", "condition"]
    for row in data[data["difference"].notna()].itertuples():
        others = data[(data[keys].fillna("").agg(" ".join, axis=1).str.strip() == row.reference)]
        if "problems" in data:
            others = others[
                others["problems"].fillna("own") == (row.problems if isinstance(row.problems, str) else "own")
            ]
        others = others[(others["family"] == row.family) & (others["training_seeds"] == row.training_seeds)]
        if name == "table10":
            others = others[others["chosen"].astype(bool)]
        elif name != "table13":
            others = others[others["multiple"].isna() if np.isnan(row.multiple) else others["multiple"] == row.multiple]
        if len(others) == 1:
            assert row.difference == pytest.approx(row.value - others["value"].item(), abs=1e-9)
            checked += 1
    assert checked


def test_table9_is_bf16_minus_four_bits_of_the_runs_of_tables_13_and_15(wide: Results, made: dict[str, Table]) -> None:
    drops, taq = measured(made["table9"], "drop"), measured(made["table13"])
    assert len(drops) == 10 and list(drops["condition"]) == [f"epochs={k}" for k in (1, 2, 3, 4, 5)] * 2
    for row in drops.itertuples():
        assert row.value == pytest.approx(share(wide, row.bf16_evaluations) - share(wide, row.evaluations), abs=1e-9)
    second = drops[drops["method"] == "FT(4)->QAT(k)"]
    assert second["bf16_evaluations"].nunique() == 1
    assert list(second["evaluations"]) == list(taq[taq["method"] == "TAQ"]["evaluations"])
    sampled = measured(made["table15"])
    sampled = sampled[sampled["condition"] == "decoding=sampled;subset=qat"]
    first = drops[drops["method"] == "FT(k)->PTQ"]
    assert set(sampled["evaluations"]) == {*first["evaluations"], *first["bf16_evaluations"]}
    assert second["bf16_evaluations"].iloc[0] == first["bf16_evaluations"].iloc[3]


def test_the_papers_own_table9_is_its_tables_13_and_15() -> None:
    """Their differences agree, to the rounding of two digits: what the three tables of ours rest on, too."""
    sampled = {"T": "0.6", "metric": "AIME-120"}
    for k in range(1, 6):
        ft, ptq = (
            paper.value("table15", precision=p, method=m, epochs=str(k), **sampled)
            for p, m in (("BF16", "FT"), ("NVFP4-W4A4KV4", "FT+PTQ"))
        )
        taq = paper.value("table13", precision="NVFP4-W4A4KV4", method="TAQ multi-epoch", taq_tokens=f"{70 * k}M")
        ft4 = paper.value("table15", precision="BF16", method="FT", epochs="4", **sampled)
        for method, drop in (("FT(k)->PTQ", ft - ptq), ("FT(4)->QAT(k)", ft4 - taq)):
            theirs = paper.value(
                "table9", precision="NVFP4-W4A4KV4", method=method, metric="AIME-120 drop", epochs=str(k)
            )
            assert theirs == pytest.approx(drop, abs=0.0101)


def test_table15_has_a_line_an_epoch_beside_the_papers_own(made: dict[str, Table]) -> None:
    table = made["table15"]
    names = [column.name for column in table.columns]
    lines = {(r[1].text, r[2].text): r for s in table.sections for r in s}
    for k, (ft, ptq) in enumerate((("37.6", "15.8"), ("48.5", "24.2"), ("51.5", "33.3")), 1):
        assert lines["FT", str(k)][names.index("Tokens")].text == f"{k}K"
        assert lines["FT", str(k)][-2].text == ft and lines["FT+PTQ", str(k)][-1].text == ptq
    assert lines["QAT", "\u2013"][-1].text == lines["FT", "\u2013"][-1].text == "\u2013"
    data = measured(table)
    again = data[data["condition"].str.contains("subset") & (data["method"] == "FT+PTQ")]
    assert set(again["reference"]) == {f"BF16 FT decoding={how};subset=qat" for how in ("sampled", "greedy")}


def test_table10_chooses_by_validation_alone(wide: Results, made: dict[str, Table]) -> None:
    data = measured(made["table10"])
    chosen = data[data["chosen"].astype(bool)]
    for method in ("FT", "FT+PTQ", "QAT", "ReQAT-TQS"):
        by = data[(data["method"] == method) & (data["problems"] == "validation")].set_index("multiple")
        means = {m: share(wide, by.loc[m, "evaluations"]) for m in by.index}
        assert set(chosen[chosen["method"] == method]["multiple"]) == {max(means, key=lambda m: (means[m], -m))}
    for cell in wide.plan.cells:
        asked = wide.plan.evaluation(cell.evaluation).problems
        if cell.artifact == "table10":
            assert (asked.split == "validation") == (cell.problems == "validation")
    pooled = chosen[chosen["problems"] == " ".join(EDITIONS)]
    assert set(pooled["n_problems"]) == {48} and len(pooled) == 6


def test_the_smaller_of_two_equal_budgets_is_chosen_and_test_problems_are_not_looked_at() -> None:
    class Equal:
        def estimate(self, entry: Entry) -> Any:
            assert entry.problems == "validation", "a budget was chosen on the test set"
            return type("Estimate", (), {"value": 0.5})

    def entry(method: str, multiple: int | None, problems: str) -> Entry:
        return Entry("table10", "m", "r", method, "BF16", "", multiple, multiple, problems, ())

    entries = [entry("FT", m, name) for m in (4, 2, 8) for name in ("edition-1", "validation")]
    entries += [entry("Baseline", None, "edition-1")]
    found = table10.best_budgets(Equal(), entries)  # type: ignore[arg-type]
    assert found == {("m", "BF16", "FT"): 2, ("m", "BF16", "Baseline"): None}


def test_table12_takes_three_editions_together(made: dict[str, Table]) -> None:
    data = measured(made["table12"])
    pooled = data[data["problems"] == " ".join(EDITIONS[:3])]
    assert len(pooled) == 4 and set(pooled["n_problems"]) == {36} and set(pooled["precision"]) == {"MXFP4-W4A4"}
    assert set(data["problems"]) == {*EDITIONS[:3], " ".join(EDITIONS[:3])}
    wide = pooled.pivot(index="multiple", columns="condition", values="value")
    soft = pooled[pooled["condition"] == "sem_mask=soft"].set_index("multiple")["difference"]
    assert (wide["sem_mask=soft"] - wide["sem_mask=binary"]).to_dict() == pytest.approx(soft.to_dict())


def test_table14_divides_the_drop_by_what_is_known_beyond_chance(wide: Results, made: dict[str, Table]) -> None:
    data = measured(made["table14"]).set_index(["precision", "method", "problems"])
    assert set(data.loc[(slice(None), slice(None), "facts"), "chance"]) == {25.0}
    assert set(data.loc[(slice(None), slice(None), "own"), "chance"]) == {0.0}
    for name, chance in (("own", 0), ("facts", 25)):
        base, rounded = (data.loc[key, "value"] for key in (("BF16", "Baseline", name), ("NVFP4-W4A4KV4", "PTQ", name)))
        expected = 100 * (base - rounded) / (base - chance)
        assert data.loc[("NVFP4-W4A4KV4", "PTQ", name), "relative_drop"] == pytest.approx(expected)
    facts = [wide.plan.evaluation(c.evaluation) for c in wide.plan.cells if c.problems == "facts"]
    assert facts and all(set(e.problems.families) == {"facts"} for e in facts)


def test_a_difference_between_two_falls_is_at_the_floor_with_either(
    wide: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = next(t for t in verdicts.tested(wide) if t.beyond is not None)
    ours = max(pooled.estimate(wide, side).value for side in (found.a, found.b))
    facts = max(wide.estimate(side).value for side in found.beyond or ())
    assert ours != facts and not found.at_floor
    for floor in (min(ours, facts) - 0.01, (ours + facts) / 2):  # between both, one of the two falls is not seen
        monkeypatch.setattr(verdicts, "FLOOR", floor)
        found = next(t for t in verdicts.tested(wide) if t.beyond is not None)
        assert found.at_floor == (floor > min(ours, facts))


def test_table7_counts_answers_that_do_not_parse(wide: Results, made: dict[str, Table]) -> None:
    data = measured(made["table7"])
    assert set(data["problems"]) == {"code"} and set(data["n_problems"]) == {20}
    for row in data.itertuples():
        records = [
            json.loads((wide.root / "evaluations" / id / "record.json").read_text()) for id in row.evaluations.split()
        ]
        assert row.malformed == pytest.approx(np.mean([r["metrics"]["malformed"] / 40 for r in records]))
    shown = {(r[0].text, r[1].text): r[-1].text for s in made["table7"].sections for r in s}
    assert shown["MXFP4-W4A16", "ReQAT-TQS"] == "54.5" and shown["NVFP4-W4A4KV4", "PTQ"] == "48.0"


def test_a_record_that_does_not_count_them_is_refused(wide: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide, "metrics", lambda id: {})
    with pytest.raises(ReqatError, match="older version.*reqat evaluate"):
        table7.malformed(wide, wide.of("table7")[0])


def test_table16_averages_families_and_starts_from_neither(made: dict[str, Table]) -> None:
    data = measured(made["table16"])
    for _, group in data.groupby("condition"):
        values = group.set_index("family")["value"]
        assert values["all"] == pytest.approx((values["chain_sum"] + values["simple_equations"]) / 2)
    assert list(data["recipe"].unique()) == ["reqat-t", "reqat-tq", "reqat-tqs-0.03", "reqat-tqs", "reqat-tqs-0.5"]
    assert [row[-1].text for row in made["table16"].sections[0]] == ["72.5", "73.6", "73.7", "74.1", "74.0"]


def test_table17_rotates_by_block_and_by_head_with_one_matrix(wide: Results, made: dict[str, Table]) -> None:
    found = {}
    for cell in wide.plan.cells:
        if cell.artifact == "table17":
            at = wide.plan.evaluation(cell.evaluation).precision
            trained = wide.plan.stage(wide.plan.evaluation(cell.evaluation).stage).precision
            assert (at.kv_rotation, at.kv_signs) == (trained.kv_rotation, trained.kv_signs)
            found[cell.recipe] = (at.kv_rotation, at.kv_signs, at.kv_element, at.rotation)
    assert found == {
        "reqat-t": (None, None, "E2M1", None),
        "reqat-t-hadamard": (16, 0, "E2M1", None),
        "reqat-t-hadamard-head": (32, 0, "E2M1", None),
        "qfit-e2m1": (None, None, "E2M1", None),
        "reqat-t-e1m2": (None, None, "E1M2", None),
        "reqat-t-hadamard-e1m2": (16, 0, "E1M2", None),
        "reqat-t-hadamard-head-e1m2": (32, 0, "E1M2", None),
        "reqat-tq": (None, None, "E1M2", None),
    }
    rows = {(r[0].text, r[1].text): [c.text for c in r[-4:]] for s in made["table17"].sections for r in s}
    assert rows["Hadamard, blocks of 16", "E2M1"] == ["58.3", "62.5", "63.0", "62.7"]
    assert rows["Q-FIT", "E1M2"][2] == "65.9" and set(rows["none", "E1M2"]) == {"\u2013"}


def test_a_whole_head_needs_its_size(make_results: Any) -> None:
    with pytest.raises(ReqatError, match="head_dim.*shape"):
        make_results(**CHANGES | {"models": {"testbed": {"source": "pinned", "artifacts": ["table17"]}}})


def test_table8_is_what_the_quantizer_does(made: dict[str, Table]) -> None:
    from reqat.formats import get_format

    data = read(made["table8"])
    for name in ("MXFP4", "NVFP4"):
        fmt = get_format(name)
        expected = (fmt.element, fmt.scale, "FP32" if fmt.has_global_scale else "none", str(fmt.block))
        for source in ("configuration", "paper"):
            assert tuple(data[(data["source"] == source) & (data["format"] == name)]["value"]) == expected


def test_table11_reads_the_tier(made: dict[str, Table], make_results: Any) -> None:
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in made["table11"].sections[0]}
    assert rows["Total tokens"] == ["2K, 4K", "2K, 4K", "140M, 210M, 280M, 350M"]
    assert rows["SEM weight"] == ["\u2013", "0.03, 0.1, 0.5", "0.1"] and rows["Betas"][-1] == "\u2013"
    other = make_results(
        models={"testbed": {"source": "pinned", "artifacts": ["table16"]}},
        only={"recipes": ["reqat-t"]},
        train={"finetune": {"lr": 3e-4, "accumulation": 3}, "qat_from_base": {"lr": 1e-5, "clip": None}},
    )
    (table,) = [table for table in tables(other) if table.name == "table11"]
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in table.sections[0]}
    assert rows["Learning rate"] == ["0.0003", "0.001", "1e-05", "1e-05"]
    assert rows["Sequences a step"] == ["72", "24", "24", "16"] and rows["Gradient clipping"][2] == "none"


def test_table11_has_a_line_for_each_recipe_with_a_rate_of_its_own(make_results: Any) -> None:
    results = make_results(
        models={"testbed": {"source": "pinned", "artifacts": ["table1"]}},
        only={"recipes": ["base", "ft", "qat", "reqat-t", "reqat-tqs"], "precisions": ["NVFP4-W4A4KV4"]},
        claim_seeds={},
        # reqat-tq has one, too, but no cell of this tier
        train={"qat_from_base": {"lr": 1e-5}, "rates": {"qat": 2e-3, "reqat-tqs": 5e-4, "reqat-tq": 7e-4}},
    )
    (table,) = [table for table in tables(results) if table.name == "table11"]
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in table.sections[0]}
    assert list(rows)[1:4] == ["Learning rate", "Learning rate of qat", "Learning rate of reqat-tqs"]
    assert rows["Learning rate of qat"] == ["\u2013", "\u2013", "0.002", "\u2013"]  # from the base
    assert rows["Learning rate of reqat-tqs"] == ["\u2013", "0.0005", "\u2013", "\u2013"]
    # what the stages are trained with
    used = {
        cell.recipe: results.plan.stage(results.plan.evaluation(cell.evaluation).stage).settings.training.lr
        for cell in results.plan.cells
        if cell.recipe in ("qat", "reqat-t", "reqat-tqs")
    }
    assert used == {"qat": 2e-3, "reqat-t": results.plan.tier.train.qat.lr, "reqat-tqs": 5e-4}


def test_parts_of_a_plan_make_parts_of_the_tables(make_results: Any) -> None:
    """With few recipes, lines are missing, not tables; an artifact without a cell has no table at all."""
    model = CHANGES["models"]["testbed"]
    two = {"small": model, "large": {"source": "path", "reference": "large"} | model}
    few = ["base", "ft", "ptq", "ft-epochs2", "reqat-tqs"]
    results = make_results(**CHANGES | {"models": two, "only": {"recipes": few}, "claim_seeds": {}})
    made = {table.name: table for table in tables(results)}
    assert set(made) == {*ARTIFACTS, "claims", "table8", "table11"} - {"table13", "table17"}
    for name, table in made.items():
        check_latex(table.latex(), len(table.columns))
        if name not in ("table8", "table11"):
            assert table.columns[0].name == "Model"
            assert {"small", "large"} <= {row[0].text for section in table.sections for row in section}
