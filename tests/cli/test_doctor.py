"""`reqat doctor`: what is amiss is said with its remedy, before hours are lost."""

from __future__ import annotations

import fcntl
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from reqat.cli.main import main
from reqat.config import machine, working_folder
from reqat.config.companions import load_companions
from reqat.data.packaged import austen

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout without results, on a machine of 4 cores, 32 GB of free memory and much disk."""
    shutil.copytree(ROOT / "config", tmp_path / "config")
    monkeypatch.chdir(tmp_path)
    for name, value in (("available_bytes", 32 * 10**9), ("cores", 4), ("free_disk_bytes", 10**12)):
        monkeypatch.setattr(machine, name, lambda *_, value=value: value)
    return tmp_path


def doctor(*arguments: str, quick: bool = True) -> int:
    with pytest.raises(SystemExit) as end:
        main(["doctor", *(["--quick"] if quick else []), *arguments])
    return int(end.value.code or 0)


def lines_about(text: str, what: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(("fail", "warn")) and what in line]


def test_a_machine_that_has_what_is_needed_gets_one_line(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("--tier", "smoke") == 0
    out = capsys.readouterr().out
    assert "tier smoke: can run here; " in out and "4 jobs side by side" in out
    assert not lines_about(out, "memory")


@pytest.mark.parametrize(
    ("free", "code", "level", "says"),
    [
        (25 * 10**8, 2, "fail", "close other programs"),  # a job of the tier takes 3
        (7 * 10**9, 0, "warn", "2 jobs will run side by side"),
    ],
)
def test_memory_is_what_is_free_now(
    checkout: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    free: int,
    code: int,
    level: str,
    says: str,
) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda *_: free)
    assert doctor("--tier", "smoke") == code
    (line,) = lines_about(capsys.readouterr().out, "memory")
    assert line.startswith(level) and says in line and "3.0 GB a job" in line


def test_the_benchmark_alone_may_be_short_of_memory(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkout / "config" / "tiers" / "smoke.yaml"
    path.write_text(path.read_text() + "\nresources: {train_memory_mb: 900, evaluate_memory_mb: 900}\n")
    monkeypatch.setattr(machine, "available_bytes", lambda *_: 1_200_000_000)
    assert doctor("--tier", "smoke") == 0
    (line,) = lines_about(capsys.readouterr().out, "benchmark")
    assert line.startswith("warn") and "BENCH=no" in line
    assert doctor("--tier", "smoke", "--no-bench") == 0
    assert not lines_about(capsys.readouterr().out, "benchmark")


def test_disk_folders_base_and_other_runs(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkout / "build").write_text("a file where a folder must be")
    monkeypatch.setattr(machine, "free_disk_bytes", lambda *_: 10**6)
    lock = checkout / working_folder.LOCK
    lock.parent.mkdir()
    with lock.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write("4711")
        other.flush()
        assert doctor("--tier", "laptop") == 2
    out = capsys.readouterr().out
    for what, says in (
        ("build folder", "is a file, not a folder"),
        ("disk for results", "free some space"),
        ("disk for temporary files", "TMPDIR"),
        ("other runs", "4711"),
        ("base model", "pin --what base"),
    ):
        (line,) = lines_about(out, what)
        assert line.startswith("fail") and says in line
    assert "tier laptop: cannot run here" in out


def test_a_tier_for_gpus_cannot_run_without(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("--tier", "paper") == 2
    (line,) = lines_about(capsys.readouterr().out, "accelerators")
    assert "needs" in line and "profiles/gpu" in line


def test_a_tier_of_companions_alone_is_counted_and_its_missing_data_named(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = checkout / "austen"
    monkeypatch.setattr(austen, "PACKAGE", replace(austen.PACKAGE, places=lambda: [data]))
    monkeypatch.delenv(austen.PACKAGE.variable, raising=False)
    parts = load_companions("tsld-rates", checkout / "config")
    assert all("austen" in part.sources for part in parts.values())
    assert doctor("--tier", "tsld-rates", quick=False) == 2, "nothing of the tier can run"
    out = capsys.readouterr().out
    (line,) = lines_about(out, "source austen")
    assert austen.PACKAGE.install in line and f"{len(parts)} of {len(parts)}" in line
    assert line.startswith("fail") and f"{len(parts)} parts of companions" in out and " jobs: " not in out
    file = data / next(iter(austen.PACKAGE.files))
    file.parent.mkdir(parents=True)
    file.touch()
    assert doctor("--tier", "tsld-rates", quick=False) == 0
    assert any(line.startswith("ok") and "source austen" in line for line in capsys.readouterr().out.splitlines())


def test_what_is_missing_of_companions_stops_no_tier_that_has_more(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(austen, "PACKAGE", replace(austen.PACKAGE, places=list))
    monkeypatch.delenv(austen.PACKAGE.variable, raising=False)
    shutil.copytree(ROOT / "results" / "base-converged", checkout / "results" / "base-converged")
    doctor("--tier", "laptop", quick=False)
    out = capsys.readouterr().out
    (line,) = lines_about(out, "source austen")
    assert line.startswith("warn") and "tier laptop: can run here" in out
    assert " jobs: " in out and "parts of companions beside them" in out and "benchmark" in out
