"""A record means a whole result: what happens when a job fails, dies, or is tampered with."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reqat.config import ReqatError
from reqat.config.errors import MissingFileError
from reqat.records import provenance, record

CONFIG = {"lr": 1e-3, "source": "nowhere"}


def run(root: Path, id: str = "qat-1", text: str = "weights", **metrics: float) -> Path:
    out = root / "build" / id
    with record.job("qat", id, CONFIG, root=root, out=out, partial=root / "partial" / id, tier="smoke") as job:
        (job.partial / "model").mkdir()
        (job.partial / "model" / "w.bin").write_text(text)
        job.metrics, job.seeds, job.inputs = metrics, [3], {"parent": {"id": "base-1", "sha256": "00"}}
    return out


def test_a_finished_job_leaves_its_files_and_a_record_of_them(tmp_path: Path):
    out = run(tmp_path, loss=0.5)
    found = record.verify(out, id="qat-1")
    assert found["outputs"].keys() == {"model/w.bin"} and found["outputs"]["model/w.bin"]["bytes"] == 7
    assert (
        found["metrics"] == {"loss": 0.5}
        and found["seeds"] == [3]
        and found["kind"] == "qat"
        and found["tier"] == "smoke"
    )
    assert found["config"] == CONFIG and len(found["config_sha256"]) == 64
    assert found["peak_memory_bytes"] > 2**20 and found["wall_s"] >= 0 and found["hardware"]["cores"] >= 1
    assert {"python", "torch", "transformers"} <= found["versions"].keys()
    assert not list((tmp_path / "partial").iterdir())


def test_a_peak_leaves_out_the_memory_of_whoever_started_the_process():
    held = 400 * 2**20
    ask = "from reqat.records import provenance; print(provenance.peak_memory_bytes(), provenance.own_peak_bytes())"
    start = "import subprocess, sys; x = bytearray(b'1') * int(sys.argv[1]); subprocess.run(sys.argv[2:], check=True)"
    command = [sys.executable, "-c", start, str(held), sys.executable, "-c", ask]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], check=True, capture_output=True, text=True)
    assert all(2**20 < int(peak) < held for peak in done.stdout.split())


def test_commit_and_dirtiness_come_from_git(tmp_path: Path):
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    assert provenance.commit(tmp_path) == {"commit": None, "source": None, "dirty": None}
    git("init", "-q")
    for folder in ("reqat", "kernels"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "library.py").write_text("1")
    (tmp_path / "code.py").write_text("1")
    git("add", "code.py", "reqat", "kernels")
    git("commit", "-qm", "one")
    clean = provenance.commit(tmp_path)
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (tmp_path / "untracked").write_text("1")
    assert provenance.commit(tmp_path) == clean
    (tmp_path / "code.py").write_text("2")
    assert provenance.commit(tmp_path) == clean | {"dirty": True}
    git("commit", "-qam", "two")
    later = provenance.commit(tmp_path)
    assert later["commit"] != clean["commit"] and later["source"] == clean["source"] and not later["dirty"]
    sources = {clean["source"]}
    for folder in ("reqat", "kernels"):  # both compute, so a change of either is another source
        (tmp_path / folder / "new.py").write_text("1")
        assert provenance.commit(tmp_path)["dirty"] is True  # code that no commit holds
        git("add", folder)
        git("commit", "-qm", folder)
        sources.add(provenance.commit(tmp_path)["source"])
        assert provenance.commit(tmp_path)["dirty"] is False
    assert len(sources) == 3


def test_the_build_of_the_native_kernels_enters_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from reqat_kernels.native import library
    from reqat_kernels.native.fingerprint import fingerprint

    def native() -> dict[str, str] | None:
        with record.job("data", "a", CONFIG, root=tmp_path, out=tmp_path / "a", partial=tmp_path / "partial") as job:
            (job.partial / "x").write_text("1")
        found = record.read(tmp_path / "a")["native"]
        shutil.rmtree(tmp_path / "a")
        return found

    used = library.instruction_set()
    assert native() == {"fingerprint": fingerprint() if used != "torch" else "none", "instruction_set": used}
    monkeypatch.setattr(library, "library", lambda: None)
    assert native() == {"fingerprint": "none", "instruction_set": "torch"}
    monkeypatch.delitem(sys.modules, "reqat_kernels.native.library")
    assert native() is None  # the job loaded no kernels


def test_no_path_of_the_machine_enters_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    here = str(tmp_path.resolve())
    monkeypatch.setattr(
        sys, "argv", ["/usr/bin/reqat", "stage", "x", "--models", f"{here}/models", "--build", "/else/where"]
    )
    out = tmp_path / "out"
    with record.job(
        "qat", "x", {"file": f"{here}/data/a.jsonl"}, root=tmp_path, out=out, partial=tmp_path / "p"
    ) as job:
        job.metrics = {"log": tmp_path / "logs" / "x", "note": f"read {here}/data/a.jsonl"}
    text = (out / "record.json").read_text()
    assert here not in text and "/else/where" not in text
    found = json.loads(text)
    assert found["command"] == "reqat stage x --models models --build .../where"
    assert found["config"] == {"file": "data/a.jsonl"}
    assert found["metrics"] == {"log": "logs/x", "note": "read data/a.jsonl"}


def test_a_metric_without_a_value_is_null_and_costs_nothing(tmp_path: Path):
    assert record.read(run(tmp_path, a=math.nan, b=math.inf, c=1.0))["metrics"] == {"a": None, "b": None, "c": 1.0}


def test_a_failed_job_leaves_nothing_and_spares_what_was_there(tmp_path: Path):
    with (
        pytest.raises(ZeroDivisionError),
        record.job("qat", "x", {}, root=tmp_path, out=tmp_path / "o", partial=tmp_path / "p") as job,
    ):
        (job.partial / "half").write_text("1")
        _ = 1 / 0
    assert not list(tmp_path.iterdir())
    out = run(tmp_path, text="first")
    with (
        pytest.raises(RuntimeError),
        record.job("qat", "qat-1", CONFIG, root=tmp_path, out=out, partial=tmp_path / "partial" / "qat-1"),
    ):
        raise RuntimeError
    record.verify(out, id="qat-1")
    run(tmp_path, text="second")
    assert (out / "model" / "w.bin").read_text() == "second" and len(list(out.parent.iterdir())) == 1
    record.verify(out, id="qat-1")


def test_a_killed_job_leaves_nothing_and_the_next_one_starts_clean(tmp_path: Path):
    code = (
        "import os, signal, sys; from pathlib import Path; from reqat.records import record; root = Path(sys.argv[1])\n"
        "with record.job('qat', 'qat-1', {}, root=root, out=root / 'build' / 'qat-1', partial=root / 'partial' / "
        "'qat-1') as job:\n"
        "    (job.partial / 'leftover').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    assert done.returncode == -signal.SIGKILL
    assert list((tmp_path / "partial").glob("qat-1-*/leftover")) and not (tmp_path / "build" / "qat-1").exists()
    assert record.verify(run(tmp_path))["outputs"].keys() == {"model/w.bin"}
    assert not list((tmp_path / "partial").iterdir()) and [p.name for p in (tmp_path / "build").iterdir()] == ["qat-1"]


def test_an_empty_folder_made_for_the_output_is_no_obstacle(tmp_path: Path):
    (tmp_path / "build" / "qat-1").mkdir(parents=True)  # as Snakemake does
    record.verify(run(tmp_path))


@pytest.mark.parametrize("where", ["body", "record"])
def test_full_disk_is_said_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "record":
        monkeypatch.setattr(record, "write", full)
    with (
        pytest.raises(ReqatError, match="no space left.*free some"),
        record.job("qat", "x", {}, root=tmp_path, out=tmp_path / "o", partial=tmp_path / "p"),
    ):
        if where == "body":
            full()
    assert not (tmp_path / "o").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_while_writing_for_real(tmp_path: Path):
    with (
        pytest.raises(ReqatError, match="no space left"),
        record.job("q", "x", {}, root=tmp_path, out=tmp_path / "o", partial=tmp_path / "p"),
    ):
        Path("/dev/full").write_text("x" * 100)
    assert not (tmp_path / "o").exists()


def test_verify_finds_what_is_not_what_was_written(tmp_path: Path):
    out = run(tmp_path)
    with pytest.raises(ReqatError, match="qat-1, not qat-2"):
        record.verify(out, id="qat-2")
    weights = out / "model" / "w.bin"
    weights.write_text("Weights")  # same size
    record.verify(out, deep=False)
    with pytest.raises(ReqatError, match=r"w\.bin is not the file"):
        record.verify(out)
    weights.write_text("w")
    with pytest.raises(ReqatError, match=r"w\.bin is not the file"):
        record.verify(out, deep=False)
    weights.unlink()
    with pytest.raises(ReqatError, match=r"w\.bin is missing"):
        record.verify(out, deep=False)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "nothing finished here"),
        ("{", "not a whole record"),
        ("[]", "not a whole record"),
        ('{"id": 1, "id": 2}', "'id' is in it twice"),
        ('{"id": 1}', "lacks"),
    ],
)
def test_a_record_that_is_none_is_refused(tmp_path: Path, text: str | None, says: str):
    if text is not None:
        (tmp_path / "record.json").write_text(text)
    with pytest.raises(ReqatError, match=says):
        record.read(tmp_path)


def test_record_of_another_version_is_refused(tmp_path: Path):
    path = run(tmp_path) / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    with pytest.raises(ReqatError, match="version 99.*reads 1"):
        record.read(path.parent)


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "id": lambda r: r.update(id=7),
    "kind": lambda r: r.update(kind=None),
    "config": lambda r: r.update(config=[]),
    "metrics": lambda r: r.update(metrics="good"),
    "metrics.loss": lambda r: r["metrics"].update(loss=float("nan")),
    "metrics.curve.1": lambda r: r["metrics"].update(curve=[0.5, float("inf")]),
    "inputs": lambda r: r.update(inputs=["base-1"]),
    "parent": lambda r: r["inputs"].update(parent="base-1"),
    "dirty": lambda r: r.update(dirty="no"),
    "outputs": lambda r: r.update(outputs=["model/w.bin"]),
    "w.bin": lambda r: r["outputs"].update({"model/w.bin": "sha"}),
    "w.bin without bytes": lambda r: r["outputs"]["model/w.bin"].pop("bytes"),
    "w.bin of negative bytes": lambda r: r["outputs"]["model/w.bin"].update(bytes=-7),
    "w.bin of bytes that are a text": lambda r: r["outputs"]["model/w.bin"].update(bytes="7"),
    "w.bin of another digest": lambda r: r["outputs"]["model/w.bin"].update(sha256="0" * 63),
    "../secret": lambda r: r["outputs"].update({"../secret": r["outputs"]["model/w.bin"]}),
    "model/../../secret": lambda r: r["outputs"].update({"model/../../secret": r["outputs"]["model/w.bin"]}),
    "/etc/passwd": lambda r: r["outputs"].update({"/etc/passwd": r["outputs"]["model/w.bin"]}),
    "pinned_outputs": lambda r: r.update(pinned_outputs=3),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_record_names_file_and_place(what: str, tmp_path: Path):
    path = run(tmp_path, loss=0.5) / "record.json"
    found = json.loads(path.read_text())
    DAMAGE[what](found)
    path.write_text(json.dumps(found))
    place = what.split(" of ")[0].split(" without ")[0].replace(".", r"\.")
    for look in (record.read, record.verify):
        with pytest.raises(ReqatError, match=rf"record\.json: .*{place}.*run its stage again"):
            look(path.parent)


def test_an_absent_record_is_a_missing_file(tmp_path: Path):
    with pytest.raises(MissingFileError, match="nothing finished here"):
        record.verify(tmp_path)
