"""The command line: what it prints, how it ends."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from reqat.cli.main import main
from reqat.config import Paths, Plan, load
from reqat.config.companions import load_companions
from reqat.config.formats import FORMATS, bits_of
from reqat.records import record

ROOT = Path(__file__).parents[2]
SMOKE = load("smoke", Paths(root=ROOT))


@pytest.fixture(autouse=True)
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with nothing but configuration, and the working directory in it."""
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "config", root / "config")
    monkeypatch.chdir(root)
    return root


def reqat(*arguments: str) -> int:
    """Exit code of the command."""
    with pytest.raises(SystemExit) as end:
        main([*arguments])
    return int(end.value.code or 0)


def test_plan_lists_stages_and_says_what_is_done(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    data = next(stage for stage in SMOKE.needed.values() if stage.kind == "data" and stage.parent is None)
    folder = Path("build/data") / data.id
    with record.job("data", data.id, data, root=Path(), out=folder, partial=Path("p")):
        pass
    monkeypatch.chdir("config")  # found from below, too
    assert reqat("plan", "--tier", "smoke") == 0
    out = capsys.readouterr().out
    assert [line.split()[1] for line in out.splitlines() if line.startswith(data.id)] == ["done"]
    for id in [*SMOKE.stages, *SMOKE.evaluations]:
        assert id in out


def test_plan_says_which_tables_an_evaluation_is_for_and_by_what_method_a_stage_rounds(
    capsys: pytest.CaptureFixture[str],
):
    assert reqat("plan", "--tier", "laptop") == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    plan = load("laptop", Paths(Path()))
    for id in plan.evaluations:
        for cell in (cell for cell in plan.cells if cell.evaluation == id):
            use = [cell.artifact, cell.condition, "" if cell.problems == "own" else cell.problems]
            assert " ".join(word for word in use if word) in lines[id]
    methods = {id: stage.settings.method for id, stage in plan.stages.items() if stage.kind == "ptq"}
    assert len(set(methods.values())) > 3 and all(method in lines[id] for id, method in methods.items())


def test_plan_of_companions_alone_counts_those_alone(capsys: pytest.CaptureFixture[str]):
    assert reqat("plan", "--tier", "tsld-traces-rates") == 0
    parts = len(load_companions("tsld-traces-rates", Path("config")))
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith(f"{parts} parts of companions (") and "beside" not in said


def test_plan_as_json_can_be_run_in_place_of_configuration(capsys: pytest.CaptureFixture[str]):
    assert reqat("plan", "--tier", "smoke", "--json") == 0
    printed = capsys.readouterr().out
    assert Plan.restore(json.loads(printed), "printed").dump() == SMOKE.dump()
    Path("plan.json").write_text(printed)
    shutil.rmtree("config/tiers")
    assert reqat("--plan", "plan.json", "plan", "--tier", "smoke", "--json") == 0
    assert capsys.readouterr().out == printed
    assert reqat("--plan", "plan.json", "plan", "--tier", "laptop") == 2
    assert "plan.json is a plan of tier smoke, not laptop" in capsys.readouterr().err


def test_schema_is_written_and_checked(capsys: pytest.CaptureFixture[str]):
    assert reqat("schema", "--check") == 0
    Path("config/schema.json").write_text("{}")
    assert reqat("schema", "--check") == 2
    assert "run `reqat schema`" in capsys.readouterr().err
    assert reqat("schema") == 0 and reqat("schema", "--check") == 0


FINETUNE = next(id for id in SMOKE.needed if id.startswith("finetune-"))
EVALUATION = next(iter(SMOKE.evaluations))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan", "--tier", "smokey"], "unknown tier 'smokey'. Did you mean 'smoke'?"),
        (["stage", "finetune-0", "--tier", "smoke"], "tier smoke: unknown stage 'finetune-0'. Did you mean 'finetune-"),
        (["evaluate", EVALUATION[:-1], "--tier", "smoke"], f"Did you mean '{EVALUATION}'"),
        (["data", FINETUNE, "--tier", "smoke"], f"is no data stage; `reqat stage {FINETUNE}` runs it"),
        (["stage", FINETUNE, "--tier", "smoke"], f"is not there; make it first (reqat stage {SMOKE.bases['testbed']}"),
        (["compare", "--tier", "smoke"], "no pinned results of tier 'smoke'"),
        (["report", "--pinned", "--tier", "smoke"], "no pinned results of tier 'smoke'"),
        (["pin", "--tier", "smoke"], "tier smoke cannot be pinned:"),
        (["pin", "--tier", "smoke", "--what", "runs"], "--what: unknown part 'runs'. Did you mean 'run'?"),
        (["pin", "--what", "base", "--tier", "smoke"], "so nothing finished here"),
        (["pin", "--what", "base", "--tier", "smoke", "--model", "other"], "it has testbed"),
        (["pin", "--what", "base", "--tier", "smoke", "--dtype", "float8"], "'--dtype': 'float8' is not one of"),
        (["pin", "--what", "base", "--tier", "smoke", "--name", "n"], "--name"),
        (["doctor", "--tier", "latop"], "Did you mean 'laptop'?"),
        (["quantize", "--model", "m", "--precision", "NVFP4-W4A5", "--out", "o"], "unknown precision 'NVFP4-W4A5'"),
        (
            ["quantize", "--model", "m", "--precision", "NVFP4-W4A4", "--out", "o", "--method", "gtpq"],
            "Did you mean 'gptq'?",
        ),
        (["quantize", "--model", "m", "--precision", "NVFP4-W4A4", "--out", "o"], "no model folder at 'm'"),
        (["quantize", "--model", "m", "--precision", "NVFP4-W4A4", "--out", "config"], "config is there already"),
        (
            ["quantize", "--model", "m", "--precision", "NVFP4-W4A4", "--out", "o", "--method", "gptq"],
            "--method gptq needs --calibration",
        ),
        (["--root", "config", "plan"], "no root of this repository"),
    ],
)
def test_what_a_user_can_mend_ends_with_one_error_and_code_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
):
    assert reqat(*arguments) == 2
    err = capsys.readouterr().err
    assert says in err and "reqat: error: " in err and "Traceback" not in err
    assert not Path("o").exists()


def test_faults_of_configuration_are_said_once_and_without_traceback(capsys: pytest.CaptureFixture[str]):
    path = Path("config/tiers/smoke.yaml")
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"bugdet": 1}))
    assert reqat("plan", "--tier", "smoke") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(
        "reqat: error: config/tiers/smoke.yaml: unknown key 'bugdet'. Did you mean 'budget'?"
    )


def test_debug_shows_the_traceback():
    from reqat.config import ReqatError

    with pytest.raises(ReqatError):
        main(["--debug", "plan", "--tier", "smokey"])


def test_every_format_is_listed(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["formats"])
    head, *rows = capsys.readouterr().out.partition("\n\n")[0].splitlines()
    assert not end.value.code and head.split()[0] == "format"
    assert [(name, int(bits)) for name, bits, *_ in map(str.split, rows)] == [(f, bits_of(f)) for f in FORMATS]


def test_unknown_verbs_and_options_are_usage_errors(capsys: pytest.CaptureFixture[str]):
    assert reqat("staeg") == 2
    assert "stage" in capsys.readouterr().err
    assert reqat("plan", "--teir", "smoke") == 2
    assert "--tier" in capsys.readouterr().err


def test_outside_the_repository_it_says_where_to_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert reqat("plan") == 2
    assert "run in the repository, or name it with --root" in capsys.readouterr().err
    assert reqat("--root", "checkout", "schema", "--check") == 0


def test_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    from reqat.cli import run

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_stage", interrupt)
    assert reqat("stage", FINETUNE, "--tier", "smoke") == 130
    assert "interrupted" in capsys.readouterr().err


def test_two_processes_do_not_make_the_same_result():
    from reqat.config import ReqatError
    from reqat.pipeline.jobs import running

    def start() -> Any:
        return running("qat", "qat-1", {}, Path("out"), Paths(), tier="smoke", force=False)

    with start() as job:
        assert job is not None
        with pytest.raises(ReqatError, match="another process"), start():
            pytest.fail("a second process was let in")


def test_a_changed_input_is_refused(capsys: pytest.CaptureFixture[str]):
    stage = SMOKE.stage(FINETUNE)
    for id in stage.inputs.values():
        given = SMOKE.stage(id)
        with record.job(given.kind, id, given, root=Path(), out=Paths().stage(given), partial=Path("p") / id) as job:
            (job.partial / "weights").write_text("as made")
    (Paths().stage(SMOKE.stage(str(stage.parent))) / "weights").write_text("changed")
    assert reqat("stage", FINETUNE, "--tier", "smoke") == 2
    assert "weights is not the file that its record describes" in capsys.readouterr().err


def test_help_needs_no_torch():
    code = """
import sys
from reqat.cli.main import main
try:
    main(["--help"])
except SystemExit:
    print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip().endswith("False")
