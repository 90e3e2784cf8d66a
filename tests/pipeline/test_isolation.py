"""Code that dies costs itself: forked sections of the benchmark, and what a failed benchmark leaves to see."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from reqat.cli.main import main
from reqat.config.errors import ReqatError
from reqat.config.throughput import Throughput, load_throughput
from reqat.pipeline.benchmark import Bench, measured
from reqat.pipeline.isolation import Died, Mark, isolated
from reqat.records import record
from reqat_kernels.bench import Case, Kernel, Work, machine, measure
from reqat_kernels.bench.measure import Result

ROOT = Path(__file__).parents[2]


def test_a_function_gives_its_result_or_its_error() -> None:
    value, peak = isolated(lambda: os.getpid(), Mark())
    assert value != os.getpid() and peak > 10**6
    with pytest.raises(ReqatError, match="mend this"):
        isolated(lambda: (_ for _ in ()).throw(ReqatError("mend this")), Mark())


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_how_a_process_died_and_at_what_is_known(number: signal.Signals) -> None:
    mark = Mark()

    def dies() -> None:
        mark("ggml Q4_0")
        os.kill(os.getpid(), number)

    with pytest.raises(Died) as died:
        isolated(dies, mark)
    assert died.value.mark == "ggml Q4_0" and number.name in died.value.how


def test_a_section_is_measured_again_without_the_provider_that_died() -> None:
    kernel, said = Kernel("k"), list[str]()

    def work(calls: Any) -> Any:
        return lambda case: Work(calls, 4, bytes_moved=1000, check=lambda: None)

    kernel.provider("theirs", format="BF16")(work(lambda i: os.kill(os.getpid(), signal.SIGSEGV)))
    kernel.provider("another", format="BF16")(work(lambda i: None))
    kernel.provider("mine", format="BF16", ours=True)(work(lambda i: None))

    def section(bench: Bench) -> tuple[Result, list[Any]]:
        case = Case("k", (("M", 1),))
        found = measure(
            case, kernel.providers, rounds=2, probe=machine.Probe(64), avoid=bench.avoid, entering=bench.mark
        )
        return found, []

    found = measured("k", section, Bench(Throughput(), 10**9, Path(), Path(), said.append))
    assert [row.provider for row in found.result.rows] == ["another", "mine"]
    (sentence,) = found.result.refused
    assert "theirs BF16" in sentence and "SIGSEGV" in sentence and len(said) == 1
    assert found.peak_memory_bytes > 0


def test_a_section_that_dies_of_our_own_code_ends_the_benchmark() -> None:
    def section(bench: Bench) -> tuple[Result, list[Any]]:
        bench.mark("")
        os.kill(os.getpid(), signal.SIGKILL)
        return Result(), []

    with pytest.raises(ReqatError, match="decode-0.*memory"):
        measured("decode-0", section, Bench(Throughput(), 10**9, Path(), Path(), lambda _: None))


def test_a_provider_of_others_that_raises_costs_its_rows_and_ours_the_run() -> None:
    def raises(i: int) -> None:
        raise RuntimeError("this CPU cannot")

    def make(case: Case) -> Work:
        return Work(raises, 4, bytes_moved=1000, check=lambda: None)

    kernel = Kernel("k")
    kernel.provider("theirs", format="BF16")(make)
    result = measure(Case("k", (("M", 1),)), kernel.providers, rounds=1, probe=machine.Probe(64))
    assert not result.rows and "theirs" in result.skipped[0] and "this CPU cannot" in result.skipped[0]
    kernel.provider("mine", format="BF16", ours=True)(make)
    with pytest.raises(RuntimeError):
        measure(Case("k", (("M", 1),)), kernel.providers, rounds=1, probe=machine.Probe(64))


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [2**20, 480 * 2**20, 2**40])
def test_rings_and_probe_are_bounded_whatever_size_the_cache_is_said_to_have(
    monkeypatch: pytest.MonkeyPatch, cache: int
) -> None:
    monkeypatch.setenv(machine.CACHE_VARIABLE, str(cache))
    device, memory = machine.DEVICES["cpu"], 4 * 10**9
    assert device.cache_bytes() == cache
    assert device.probe_bytes(memory) == min(8 * cache, 10**9) and device.ring_bytes(memory) == min(2 * cache, 10**8)
    case = Case("k", (), memory_bytes=memory)
    assert case.copies(1000) * 1000 <= 10**8 + 1000
    assert 20 * device.ring_bytes(memory) + device.probe_bytes(memory) <= 0.8 * memory


@pytest.mark.parametrize("given", ["", "0", "-1", "480M", "1e9"])
def test_a_cache_size_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv(machine.CACHE_VARIABLE, given)
    with pytest.raises(ValueError, match=machine.CACHE_VARIABLE):
        machine.last_level_cache_bytes()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose smoke tier has a tiny benchmark with little memory."""
    shutil.copytree(ROOT / "config", tmp_path / "config")
    tiny = {"linear": {"m": [1], "nk": [1024], "rounds": 1}, "burst_ms": 0.1, "memory_mb": 1500}
    (tmp_path / "config" / "throughput.yaml").write_text(yaml.safe_dump({"tiers": {"smoke": tiny}}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_benchmark_stays_within_its_memory_beside_a_cache_of_480_mib(checkout: Path) -> None:
    environment = os.environ | {machine.CACHE_VARIABLE: str(480 * 2**20), "PYTHONPATH": str(ROOT)}
    bench = [sys.executable, "-m", "reqat.cli", "bench", "--tier", "smoke", "--quiet"]
    subprocess.run(bench, cwd=checkout, env=environment, check=True)
    settings = load_throughput("smoke", checkout / "config")
    assert settings is not None
    folder = checkout / "build" / "throughput" / settings.id
    found = record.verify(folder)
    budget = found["metrics"]["memory"]["budget_bytes"]
    assert budget <= 1500 * 10**6
    assert 10**8 < found["metrics"]["memory"]["peak_bytes"]["linear"] <= found["peak_memory_bytes"] <= budget
    rows = pd.read_csv(folder / "throughput.csv")
    assert (rows.last_level_cache_bytes == 480 * 2**20).all()
    assert (rows.working_set_bytes <= budget).all()
    assert (rows.cold == (rows.working_set_bytes > rows.last_level_cache_bytes)).all()


# -- a benchmark that failed -------------------------------------------------------------------------------------------


def reqat(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main([*arguments])
    return int(end.value.code or 0)


def test_figure_and_tables_of_a_failed_benchmark_say_why(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = load_throughput("smoke", checkout / "config")
    assert settings is not None
    state, log = checkout / "build" / "throughput" / f"{settings.id}.json", checkout / "log"
    log.write_text("linear, M=1\nreqat: error: the benchmark needs 1.5 GB of $free$ memory\n")
    failed = ("bench-failed", settings.id, "--log", str(log), "--code")
    for interrupted in (130, 143):
        assert reqat(*failed, str(interrupted)) == interrupted and not state.exists()
    assert reqat(*failed, "137") == 0 and "SIGKILL" in json.loads(state.read_text())["reason"]
    assert reqat(*failed, "2") == 0
    assert reqat("report", "--what", "benchmark", "--tier", "smoke") == 0
    tables, plots = checkout / "build" / "tables" / "smoke", checkout / "build" / "plots" / "smoke"
    assert "needs 1.5 GB" in (tables / "throughput-linear.md").read_text()
    assert "43%" in (tables / "figure6-error.md").read_text(), "the model's errors need no benchmark"
    assert (plots / "figure6.png").stat().st_size > 5000 and (plots / "figure6.pdf").exists()
    capsys.readouterr()
    assert reqat("pin", "--what", "benchmark", "--tier", "smoke") == 2, "a placeholder is never pinned"
