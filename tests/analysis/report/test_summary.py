"""The claims over all models: which test stands for a claim, and what several verdicts come to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from analysis.build import write_verdicts
from analysis.report import summary, verdicts
from analysis.report.cells import Results
from analysis.report.claims import CLAIMS
from analysis.report.names import REFERENCE_PRECISION
from reqat.config import Paths
from reqat.config.errors import ReqatError

PRIMARY = [c.name for c in CLAIMS if c.main]


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (["agrees", "agrees"], "reproduced"),
        (["agrees", "inconclusive", "inconclusive"], "reproduced (1 of 3)"),
        (["agrees", "one training seed", "no direction"], "reproduced"),  # what tests nothing does not count
        (["disagrees", "inconclusive"], "not reproduced (1 of 2)"),
        (["disagrees", "one training seed"], "not reproduced"),
        (["disagrees", "agrees"], "depends on the model"),
        (["inconclusive", "no direction"], "inconclusive"),
        (["one training seed", "no direction"], "not tested"),
        ([], "not tested"),
    ],
)
def test_only_what_was_tested_and_found_decides(given: list[str], word: str) -> None:
    assert summary.verdict_over_models(given) == word


def test_a_claim_stands_for_its_primary_test(results: Results) -> None:
    (run,) = summary.tests_of(results, ["results/x"], "testbed")
    other = replace(run, heading="other", by_claim={k: v for k, v in run.by_claim.items() if "traces" in k})
    table = summary.build([run, other, summary.not_run("real weights")])
    found = verdicts.tested(results)
    named = list(dict.fromkeys(table.data["claim"]))
    assert named == [*PRIMARY, *(c.name for c in CLAIMS if not c.main and c.name in run.by_claim)]
    assert set(table.data["claim"]) == {t.claim.name for t in found}
    for name, t in run.by_claim.items():
        same = [other for other in found if other.claim.name == name]
        assert t.primary == any(s.primary for s in same)
        if any(s.precision == "NVFP4-W4A4KV4" and s.multiple == 3 for s in same):
            assert t.precision == "NVFP4-W4A4KV4"
    row = table.data[(table.data["claim"] == "ReQAT-TQS above QAT")].iloc[0]
    expected = next(t for t in found if t.primary and t.claim.name == "ReQAT-TQS above QAT")
    assert (row["difference"], row["p_holm"], row["training_seeds"]) == (expected.value, expected.holm, 3)
    assert row["verdict_over_models"] == "reproduced"
    assert len(table.data[table.data["model"] == "other"]) == len(other.by_claim)
    assert len(table.sections[0]) == 2 * len(PRIMARY) and table.latex(), "on accuracy and on likelihood"
    traces = next(row for row in table.sections[0] if row[0].text == "same traces above different")
    # It is at MXFP4-W4A16 here, with one training seed, and so is the paper's number.
    assert "MXFP4-W4A16" in traces[1].text and "one training seed at MXFP4-W4A16" in traces[2].detail
    assert traces[4].text == "not run yet" and traces[5].text == "not tested"


def test_a_column_has_what_the_first_of_its_runs_tests(results: Results) -> None:
    (run,) = summary.tests_of(results, ["results/x"], "converged")
    names = list(run.by_claim)
    first = replace(run, by_claim={name: run.by_claim[name] for name in names[:3]})
    second = replace(
        run, folders=("results/y",), by_claim={n: replace(t, value=t.value + 1) for n, t in run.by_claim.items()}
    )
    (both,) = summary.merged([[first], [second]])
    assert set(both.by_claim) == set(names)
    assert [both.by_claim[n].value - run.by_claim[n].value for n in names[:4]] == pytest.approx([0, 0, 0, 1])
    assert "results/x" in both.where and "results/y" in both.where
    assert summary.merged([[run], [second]]) == [run], "a run that adds nothing is not named"
    other = replace(second, model="another", heading="converged, another")
    assert summary.merged([[first], [other]]) == [first, other] and summary.merged([]) == []


def test_a_run_at_the_reference_precision_comes_before_one_at_another(results: Results) -> None:
    (run,) = summary.tests_of(results, ["results/x"], "converged")
    name, found = next((name, found) for name, found in run.by_claim.items() if found.precision == REFERENCE_PRECISION)
    other = replace(run, folders=("results/y",), by_claim={name: replace(found, precision="MXFP4-W4A16", value=-7)})
    for order in ([[other], [run]], [[run], [other]]):
        (both,) = summary.merged(order)
        assert both.by_claim[name] == found


def test_readme_has_the_claims_that_matter_most_in_one_table(results: Results) -> None:
    (run,) = summary.tests_of(results, ["results/x"], "testbed")
    runs = [run, summary.not_run("converged"), summary.not_run("real weights")]
    lines = [line for line in summary.block(runs).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["claim", "paper", "testbed", "converged", "real weights", "verdict"]
    assert len({len(row) for row in cells}) == 1 and 12 <= len(cells) - 2 <= 15
    assert [row[0] for row in cells[2:7]] == [f"**{name}**" for name in PRIMARY]
    assert all(row[3] == row[4] == "not run yet" for row in cells[2:])
    assert set(summary.SHOWN) <= {c.name for c in CLAIMS if not c.main}


def test_the_table_is_written_between_the_markers_and_nowhere_else(results: Results, tmp_path: Path) -> None:
    runs = summary.tests_of(results, ["results/x"], "testbed")
    paths = Paths(tmp_path)
    assert write_verdicts(paths, runs) == [paths.results / "verdicts.md"]
    readme = tmp_path / "README.md"
    readme.write_text("no markers\n")
    assert write_verdicts(paths, runs) == [paths.results / "verdicts.md"] and readme.read_text() == "no markers\n"
    readme.write_text(f"before\n{summary.BEGIN}\nold\n{summary.END}\nafter\n")
    assert write_verdicts(paths, runs) == [paths.results / "verdicts.md", readme]
    text = readme.read_text()
    assert text == f"before\n{summary.BEGIN}\n{summary.block(runs)}{summary.END}\nafter\n"
    write_verdicts(paths, runs)
    assert readme.read_text() == text, "again: the same"
    readme.write_text(f"before\n{summary.END}\n")
    with pytest.raises(ReqatError, match=r"README\.md"):
        write_verdicts(paths, runs)


def test_without_a_claim_there_is_no_table(make_results: Callable[..., Results]) -> None:
    with pytest.raises(ReqatError, match="reqat pin"):
        summary.build([summary.not_run("testbed")])
