"""`reqat lm-eval`: what it adds to lm-eval's own command line."""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from reqat.cli.main import main

ROOT = Path(__file__).parents[2]


def reqat(*arguments: str) -> int:
    """Exit code of the command."""
    with pytest.raises(SystemExit) as end:
        main([*arguments])
    return int(end.value.code or 0)


def test_where_prints_the_folder_of_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    assert reqat("lm-eval", "--where") == 0
    folder = Path(capsys.readouterr().out.strip())
    assert (folder / "reqat_aime24.yaml").is_file()
    assert reqat("lm-eval", "--where", "--tasks", "x") == 2
    assert "--tasks x" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            ["--tasks", "reqat_aime24", "-L", "5"],
            ["run", "--tasks", "reqat_aime24", "-L", "5", "--include_path", "HERE"],
        ),
        (["run", "-t", "a"], ["run", "-t", "a", "--include_path", "HERE"]),
        (["ls", "tasks"], ["ls", "tasks", "--include_path", "HERE"]),
        (["-t", "a", "--include_path", "mine"], ["run", "-t", "a", "--include_path", "mine"]),
        (["run", "-h"], ["run", "-h"]),
        ([], ["-h"]),
    ],
)
def test_lm_eval_gets_every_argument_and_our_folder(
    given: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.__main__
    from lm_eval.api.registry import get_model

    from reqat.lm_eval import TASKS

    seen: list[list[str]] = []
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", lambda: seen.append(sys.argv[1:]))
    assert reqat("lm-eval", *given) == 0
    assert seen == [[str(TASKS) if word == "HERE" else word for word in expected]]
    assert get_model("reqat").__name__ == "ReqatLM"


def test_what_lm_eval_refuses_ends_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["pytest"])
    assert reqat("lm-eval", "--model", "reqat") == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("reqat: error: lm-eval: ") and "task" in line


def test_an_unknown_task_or_file_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    start = TaskManager.__init__

    def ours_alone(self: TaskManager, *given: Any, **options: Any) -> None:  # thousands of lm-eval's own take minutes
        start(self, *given, **{**options, "include_defaults": False})

    monkeypatch.setattr(TaskManager, "__init__", ours_alone)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    for task in ("reqat_aime42", "no/such/task.yaml"):
        assert reqat("lm-eval", "--model", "reqat", "--tasks", task) == 2
        *_, line = capsys.readouterr().err.strip().splitlines()
        assert task in line


def test_newer_versions_find_the_model_type_by_its_entry_point() -> None:
    group = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lm_eval.models"]
    (name,) = group
    assert EntryPoint(name, group[name], "lm_eval.models").load().__name__ == "ReqatLM"
