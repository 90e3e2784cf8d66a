"""A sample of the campaign's bad inputs (`python -m tests.campaign --only inputs` tries all), and what it rests on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaign import configuration, options
from tests.campaign.cases import Case, run
from tests.campaign.inputs import sample
from tests.campaign.material import ROOT, inside

# What these options name is looked at after torch is imported; the campaign tries them.
_LATE = ("--model", "--reference", "--calibration", "--fit", "--logprobs", "--method", "--policy", "view", "doctor")
CHEAP = [
    case
    for case in [*options.cases(), *configuration.cases()]
    if not any(word in case.name for word in _LATE) and "bench" not in case.arguments
]
SAMPLE = [CHEAP[i] for i in sample(CHEAP, 70, seed=1)]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with configuration, problems and a plan, to be copied."""
    from reqat.config import Paths, load

    folder = tmp_path_factory.mktemp("campaign") / "checkout"
    shutil.copytree(ROOT / "config", folder / "config")
    (folder / "problems.jsonl").write_text('{"prompt": "So 2 + 2 ="}\n', encoding="utf-8")
    with inside(folder):
        (folder / "plan.json").write_text(json.dumps(load("smoke", Paths()).dump()), encoding="utf-8")
    return folder


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: f"{case.kind}: {case.name}"[:60])
def test_a_bad_input_ends_with_one_line_that_names_it(case: Case, checkout: Path, tmp_path: Path):
    verdict = run(case, Path(shutil.copytree(checkout, tmp_path / "checkout")))
    assert verdict.ok, f"{verdict.fault}\n{verdict.message}"


def test_the_campaign_sees_what_is_accepted_and_what_is_a_defect(checkout: Path, monkeypatch: pytest.MonkeyPatch):
    accepted = run(Case("test", "good", (), ("plan", "--tier", "smoke")), checkout)
    assert "accepted" in accepted.fault
    unsaid = run(Case("test", "unsaid", ("another word",), ("plan", "--tier", "smokey")), checkout)
    assert "another word" in unsaid.fault
    monkeypatch.setattr("reqat.cli.app.load", lambda *_: {}["no such"])
    assert "defect" in run(Case("test", "defect", (), ("plan", "--tier", "smoke")), checkout).fault
    assert "accepted" in run(Case("test", "call", (), call=lambda _: 5), checkout).fault
    assert "KeyError" in run(Case("test", "call", (), call=lambda _: {}["x"]), checkout).fault


def test_bad_options_are_refused_before_torch_is_imported():
    code = """
import contextlib, io, json, sys
from reqat.cli.main import main
for arguments in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            main(arguments)
        except SystemExit as end:
            assert end.code == 2, (arguments, said.getvalue())
    assert "torch" not in sys.modules, arguments
"""
    tried = [
        ["quantize", "--model", "m", "--precision", "X", "--out", "o"],
        ["quantize", "--model", "m", "--precision", "NVFP4-W4A4", "--out", "o", "--rotation", "-4"],
        ["noise", "--model", "m", "--out", "o", "--sigmas", "nan"],
        ["entropy", "--reference", "m", "--out", "o", "--families", "nope"],
        ["entropy", "--reference", "m", "--out", "o", "--decoding", "beam"],
        ["stage", "x", "--tier", "smoke", "--threads", "1000000000"],
        ["plan", "--tier", "smokey"],
    ]
    done = subprocess.run([sys.executable, "-c", code, json.dumps(tried)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.flags.utf8_mode == 1, reason="the interpreter is in UTF-8 mode already")
def test_a_locale_without_unicode_changes_nothing(tmp_path: Path):
    """Where the locale is C and Python may not change that, paths beyond ASCII are neither refused nor mangled."""
    shutil.copytree(ROOT / "config", tmp_path / "ü" / "config")
    (tmp_path / "ü" / "config" / "tiers" / "smoke.yaml").write_text("bugdet: ü\n", encoding="utf-8")
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON"))}
    done = subprocess.run(
        [sys.executable, "-m", "reqat.cli", "--root", str(tmp_path / "ü"), "plan", "--tier", "smoke"],
        cwd=ROOT, capture_output=True, env=plain | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    )  # fmt: skip
    said = done.stderr.decode("utf-8")
    assert done.returncode == 2 and "bugdet" in said and "Traceback" not in said and "codec" not in said
