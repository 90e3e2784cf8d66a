"""The paper's numbers: read whole, and found again by name."""

from __future__ import annotations

import csv

import pytest

from analysis.report import paper


def test_every_row_is_read_as_it_stands() -> None:
    with paper.SOURCE.open(newline="") as file:
        raw = list(csv.DictReader(file))
    assert len(raw) == len(paper.reported()) == 296
    for text, r in zip(raw, paper.reported(), strict=True):
        assert (text["artifact"], text["model"], text["format"], text["method"], text["metric"]) == (
            r.artifact,
            r.model,
            r.precision,
            r.method,
            r.metric,
        )
        assert float(text["value"]) == r.value
        assert set(text["condition"].replace("=", ";").split(";")) - {""} <= {*r.condition, *r.condition.values()}


def test_lookup_finds_the_best_nvfp4_row_of_table1() -> None:
    row = paper.by_budget("table1", precision="NVFP4-W4A4KV4", method="ReQAT-TQ")
    assert row == {140_000_000: 59.79, 210_000_000: 63.44, 280_000_000: 65.94, 350_000_000: 65.21}
    assert paper.budgets("table1") == tuple(row)
    assert [paper.multiple(t) for t in (*row, None)] == [2, 3, 4, 5, None]
    assert paper.value("table1", precision="BF16", method="Baseline") == 56.83
    assert (
        paper.value(
            "table5",
            precision="NVFP4-W4A4KV4",
            method="ReQAT",
            metric="final_loss",
            e1m2="1",
            pre_rope_scale="1",
            post_rope_shift="1",
        )
        == 0.7633
    )
    assert paper.value("table2", precision="NVFP4-W4A4KV4", method="QAT", metric="GSM8K") is None


def test_an_ambiguous_lookup_is_refused() -> None:
    with pytest.raises(ValueError, match="4 numbers of table1 match BF16 FT.*name a condition"):
        paper.value("table1", precision="BF16", method="FT")
    with pytest.raises(ValueError, match="more than one number a budget"):
        paper.by_budget("table2", precision="BF16", method="FT", metric=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("text", "count"), [("140M", 140_000_000), ("1.5K", 1500), ("2B", 2_000_000_000), ("7", 7)])
def test_token_counts(text: str, count: int) -> None:
    assert paper.parse_tokens(text) == count


@pytest.mark.parametrize("text", ["", "M", "-3M", "1.2.3M", "70MB"])
def test_token_counts_that_mean_nothing(text: str) -> None:
    with pytest.raises(ValueError, match="cannot read"):
        paper.parse_tokens(text)


def test_conditions() -> None:
    assert paper.parse_condition("greedy;epochs=2") == {"greedy": "1", "epochs": "2"}
    assert paper.parse_condition("") == {}
    with pytest.raises(ValueError, match="gives 'a' twice"):
        paper.parse_condition("a=1;a=2")


def test_frame_is_tidy() -> None:
    data = paper.frame()
    assert len(data) == 296
    assert data.loc[data.artifact == "table1", "total_tokens"].dropna().nunique() == 4


def test_what_was_read_off_says_so_and_is_kept_apart() -> None:
    # 199 values were taken from figures and from tables beyond the others; eight of them are numbers of tables.
    extra = [*paper.select("table16", metric="Avg"), *paper.select("table10", model="R1-Qwen-14B", precision="BF16")]
    extra = [r for r in extra if r.metric == "Avg" or "(" in r.method]
    assert len(paper.digitized()) == 191 == 199 - len(extra)
    assert all(r.how.startswith("read off") or r.how == "counted" for r in paper.digitized())
    assert all(r.how == "table" for r in paper.reported())
    assert {r.metric: r.value for r in paper.read_off("figure5e")} == {"best alpha_s": 0.85, "best alpha_m": 0.05}
    assert [r.value for r in paper.read_off("figure1a", metric="GSM8K drop")] == [1.88, 0.71, 0.0, 0.22]
    with pytest.raises(ValueError, match="no numbers of table1"):
        paper.read_off("table1")
