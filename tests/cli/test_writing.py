"""Every verb that writes, pointed at what is not its own: exit code 2, one line, and nothing changed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from reqat.config import Paths, files
from reqat.records import record
from reqat.records.pinned import find
from tests.campaign import faults
from tests.campaign.faults import FAULTS, IMPOSSIBLE, complaints, run, tree

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "quantize": ["--model", "model", "--precision", "NVFP4-W4A4KV4"],
    "entropy": ["--reference", "model", "--problems", "problems.jsonl"],
    "route": ["--reference", "model", "--tier", "smoke"],
    "noise": ["--model", "model", "--sigmas", "0.1", "--tier", "smoke"],
    "reset": ["--model", "model", "--fit", "fit.json", "--tier", "smoke"],
}
FILES = {
    "fit-reset": ["--model", "model", "--precision", "NVFP4-W4A4KV4", "--tier", "smoke"],
    "view": ["traces"],
}
PINNED = find("smollm", "run", Paths(ROOT)).name
RENDERED = {"report": ["--pinned", "--tier", "smollm", "--plots", "build/plots", "--tables"]}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of git with configuration, a model's folder and what else verbs are pointed at."""
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "config", root / "config")
    for name, text in {
        ".git/HEAD": "ref: refs/heads/main",
        "model/config.json": "{}",
        "model/model.safetensors": "weights",
        "problems.jsonl": json.dumps({"prompt": "2 + 2 =", "response": "4"}),
        "fit.json": json.dumps({"schema": "reqat.reset/1", "policy": "reset(t_low=0.3, tau0=0.5)"}),
        "traces/meta.json": "{}",
        "mine/notes.txt": "mine",
        "mine/deep/more.txt": "mine",
        "clone/.git/HEAD": "ref: refs/heads/main",
        "file": "mine",
        "page.html": "<html>mine</html>",
        "other.json": '{"schema": "mine"}',
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "link").symlink_to("mine")
    (root / "dangling").symlink_to("nowhere")
    (root / "link.json").symlink_to("other.json")
    with record.job("else", "other", {}, root=root, out=root / "other-verb") as job:
        (job.partial / "data").write_text("1")
    monkeypatch.chdir(root)
    return root


def refused(root: Path, *arguments: object, names: str = "") -> str:
    """The error of a command that must change nothing."""
    before = tree(root)
    end = run(*arguments)
    assert not complaints(end, root, before), complaints(end, root, before)
    assert names in end.err
    return end.err


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("verb", FOLDERS)
def test_a_folder_that_is_no_result_of_the_verb_is_not_touched(checkout: Path, verb: str, force: bool) -> None:
    more = ["--force"] if force else []
    places = (".", "..", "mine", "file", "clone", "link", "dangling", "model", "model/new", "other-verb", "/")
    for out in places if force else places[:3]:
        refused(checkout, verb, *FOLDERS[verb], "--out", out, *more)
    home = os.environ.get("HOME")
    if home and Path(home).is_dir():
        refused(checkout, verb, *FOLDERS[verb], "--out", home, *more)


@pytest.mark.parametrize("verb", FOLDERS)
def test_a_result_is_replaced_only_when_asked_and_alone_and_by_one(checkout: Path, verb: str) -> None:
    with record.asked_for(verb, checkout / "out", {}, root=checkout, force=False) as job:
        (job.partial / "data").write_text("1")
    given = [verb, *FOLDERS[verb], "--out", "out"]
    assert "--force" in refused(checkout, *given)
    with files.exclusive(files.beside(checkout / "out", "lock"), "out"):
        end = run(*given, "--force")
    assert end.code == 2 and "another process" in end.err
    (checkout / "out" / "notes.txt").write_text("mine")
    assert "notes.txt" in refused(checkout, *given, "--force")
    (checkout / "out" / "notes.txt").unlink()
    shutil.copytree(checkout / "model", checkout / "out" / "model")  # the source lies in it
    source = ["out/model" if word == "model" else word for word in given]
    refused(checkout, *source, "--force", names="out")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("verb", FILES)
def test_a_file_that_the_verb_did_not_write_is_not_touched(checkout: Path, verb: str, force: bool) -> None:
    more = ["--force"] if force else []
    for out in (".", "mine", "file", "page.html", "other.json", "link.json", "dangling", "problems.jsonl", "/dev/full"):
        refused(checkout, verb, *FILES[verb], "--out", out, *more)


def test_a_fit_is_replaced_only_when_asked(checkout: Path) -> None:
    assert "--force" in refused(checkout, "fit-reset", *FILES["fit-reset"], "--out", "fit.json", names="fit.json")


def test_a_pin_replaces_nothing(checkout: Path) -> None:
    place, pin = checkout / "results" / "2026-01-02-smoke", ("pin", "--tier", "smoke", "--name", "2026-01-02-smoke")
    place.mkdir(parents=True)
    (place / "notes.txt").write_text("mine")
    refused(checkout, *pin, names="results/2026-01-02-smoke")
    shutil.rmtree(place)
    place.symlink_to(checkout / "mine")
    refused(checkout, *pin, names="results/2026-01-02-smoke")


def test_the_base_is_never_replaced(checkout: Path) -> None:
    base, pin = checkout / "results" / "base", ("pin", "--what", "base", "--tier", "smoke")
    base.mkdir(parents=True)
    (base / "notes.txt").write_text("mine")
    refused(checkout, *pin, names="results/base")
    shutil.rmtree(base)
    base.symlink_to(checkout / "mine")
    refused(checkout, *pin, names="results/base")
    base.unlink()
    shutil.copytree(ROOT / "results" / "base", base)
    assert "git rm" in refused(checkout, *pin, names="results/base")


@pytest.mark.parametrize("verb", [*FOLDERS, *FILES])
@pytest.mark.parametrize("place", IMPOSSIBLE)
def test_places_that_cannot_be(checkout: Path, verb: str, place: str) -> None:
    given = FOLDERS.get(verb) or FILES[verb]
    refused(checkout, verb, *given, "--out", IMPOSSIBLE[place](checkout))


@pytest.mark.parametrize("verb", [*FOLDERS, *FILES, *RENDERED, "schema", "data", "pin", "study"])
def test_without_permission(checkout: Path, verb: str) -> None:
    place = checkout / {"schema": "config", "data": "build", "study": "build", "pin": "results"}.get(verb, "place")
    place.mkdir(exist_ok=True)
    (checkout / "build").mkdir(exist_ok=True)
    if verb in RENDERED:
        shutil.copytree(ROOT / "results" / PINNED, checkout / "results" / PINNED)
        given: list[object] = [*RENDERED[verb], place / "out"]
    elif verb in FOLDERS or verb in FILES:
        given = [*(FOLDERS.get(verb) or FILES[verb]), "--out", place / "out"]
    else:
        given = [] if verb == "schema" else ["--tier", "smoke"]
    before = tree(checkout)
    with FAULTS["no permission"](place):
        end = run(verb, *given)
    assert not complaints(end, checkout, before), complaints(end, checkout, before)
    assert "no permission" in end.err


@pytest.mark.parametrize("what", ["file", "lock"])
def test_files_where_folders_must_be_in_build(checkout: Path, what: str) -> None:
    if what == "file":
        (checkout / "build").mkdir()
        (checkout / "build" / "partial").write_text("mine")
    else:
        id = next(word for word in run("plan", "--tier", "smoke").out.split() if word.startswith("data-"))
        (checkout / "build" / "locks" / id).mkdir(parents=True)
    before = tree(checkout)
    end = run("data", "--tier", "smoke", "-q")
    after = {name: entry for name, entry in tree(checkout).items() if name in before or entry != "folder"}
    assert end.code == 2 and "Traceback" not in end.err and end.err.count("\n") == 1 and after == before
    assert ("build/partial" if what == "file" else "build/locks/") in end.err


@pytest.mark.parametrize("verb", [*RENDERED, "schema", pytest.param("data", marks=pytest.mark.slow)])
def test_on_a_full_disk(checkout: Path, verb: str) -> None:
    if verb in RENDERED:
        shutil.copytree(ROOT / "results" / PINNED, checkout / "results" / PINNED)
    given = [*RENDERED[verb], checkout / "new"] if verb in RENDERED else [] if verb == "schema" else ["--tier", "smoke"]
    before = tree(checkout)
    with FAULTS["space for a little"](checkout):
        end = run(verb, *given)
    left = {name: entry for name, entry in tree(checkout).items() if name in before or entry != "folder"}
    assert end.code == 2 and "ulimit" in end.err and left == before, end
    assert end.err.count("reqat: error") == 1 and "Traceback" not in end.err


def test_tables_beside_files_of_others(checkout: Path) -> None:
    shutil.copytree(ROOT / "results" / PINNED, checkout / "results" / PINNED)
    assert run("report", *RENDERED["report"], "paper").code == 0
    name = next((checkout / "paper").glob("*.tex"))
    assert name.is_file() and run("report", *RENDERED["report"], "paper").code == 0
    shutil.rmtree(checkout / "paper")
    name.parent.mkdir()
    name.write_text("mine")
    for more in ([], ["--force"]):
        refused(checkout, "report", *RENDERED["report"], "paper", *more, names=name.name)


def test_output_that_nobody_reads_ends_quietly(checkout: Path) -> None:
    command = [sys.executable, "-m", "reqat.cli", "plan", "--tier", "laptop", "--json"]
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with os.fdopen(writer, "wb") as pipe:
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, env=environment)
    assert done.returncode == 141 and done.stderr == b""
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"no space left" in done.stderr


def test_the_campaign_has_a_case_for_every_verb_and_fault(checkout: Path) -> None:
    found = faults.cases(checkout)
    assert len(found) >= 60 and len({case.name for case in found}) == len(found)
    for name in ("view, below a file", "noise, no permission", "schema, no space", "quantize, a name of 300 letters"):
        (case,) = (case for case in found if case.name == name)
        assert faults.carry_out(case, checkout) == []
