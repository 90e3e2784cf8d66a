"""Table 3: every method at NVFP4 and MXFP4, before and after fine-tuning on one line, the paper's numbers beside it."""

from __future__ import annotations

import pytest

from analysis.report import paper
from analysis.report.cells import Results
from analysis.report.document import EMPTY
from analysis.report.lines import Line
from analysis.tables import table3
from reqat.config.stage import PTQSettings, TrainSettings

INT4 = "INT4-row-W4+AINT4-row-A4KV4"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    from tests.analysis.conftest import make

    return make(
        tmp_path_factory.mktemp("table3"),
        models={"testbed": {"source": "pinned", "artifacts": ["table3"]}},
        budget={"qat_tokens": 1000, "totals": [2], "claim_total": 2},
    )


def test_each_published_method_is_there_at_both_formats(results: Results) -> None:
    methods = {"AWQ", "GPTQ", "GPTAQ", "MR-GPTQ", "SmoothQuant", "QuaRot", "FlatQuant", "PTQ"}
    for precision in ("MXFP4-W4A4", "NVFP4-W4A4KV4"):
        found = {e.method for e in results.of("table3") if e.precision == precision}
        assert found >= methods | {f"FT+{m}" for m in methods} | {"QAT", "QAD", "FT+QAD", "ReQAT-TQS"}
    assert {e.method for e in results.of("table3") if e.precision == INT4} == {
        m for name in ("PTQ", "QuaRot", "FlatQuant") for m in (name, f"FT+{name}")
    }


def test_every_number_of_the_paper_stands_beside_a_line_of_ours(results: Results) -> None:
    lines = [
        Line(e.model, e.precision, table3.method(e), e.condition, e.problems, {e.multiple: e})
        for e in results.of("table3")
    ]
    shown = [value for li in lines for m in li.by if (value := table3.of_paper(li, m)) is not None]
    assert sorted(set(shown)) == sorted({r.value for r in paper.select("table3")})


def test_a_line_has_both_columns_and_training_keeps_its_name(results: Results) -> None:
    table = table3.build(results)
    heads = [column.name for column in table.columns]
    at = heads.index("Method")
    untrained, trained = at + 1, at + 2
    lines = {
        (section_line[0].text, section_line[at].text): section_line
        for section in table.sections
        for section_line in section
    }
    both = lines[INT4, "QuaRot"]
    assert both[untrained].text != EMPTY and both[trained].text != EMPTY
    assert lines[INT4, "QuaRot"][1].text == "row" and lines["AINT4-g32-W4A16", "AWQ"][1].text == "32"
    assert ("NVFP4-W4A4KV4", "FT+QAD") in lines and ("NVFP4-W4A4KV4", "QAD") in lines
    assert ("NVFP4-W4A4KV4", "FT+GPTQ") not in lines


def test_whose_outputs_distillation_imitates(results: Results) -> None:
    plan, base = results.plan, results.plan.bases["testbed"]
    for entry in results.of("table3"):
        if "QAD" not in entry.method:
            continue
        stage = plan.stages[plan.evaluation(entry.cells[0].evaluation).stage]
        assert isinstance(stage.settings, TrainSettings)
        assert [term.name for term in stage.settings.training.objective] == ["qad"]
        assert stage.teacher is None and stage.parent is not None  # none: the model that it starts from
        if entry.method == "QAD":
            assert stage.parent == base and stage.budget_tokens == 2000
        else:
            assert plan.stages[stage.parent].kind == "finetune"
            assert stage.budget_tokens + plan.stages[stage.parent].budget_tokens == 2000


def test_rotations_of_mr_gptq_are_those_of_its_evaluation(results: Results) -> None:
    for entry in results.of("table3"):
        if entry.method.endswith("MR-GPTQ"):
            evaluation = results.plan.evaluation(entry.cells[0].evaluation)
            stage = results.plan.stages[evaluation.stage]
            assert isinstance(stage.settings, PTQSettings) and stage.settings.method == "mr_gptq"
            assert (
                evaluation.precision.rotation == stage.precision.rotation == (16 if "NVFP4" in entry.precision else 32)
            )
