"""Sections of the benchmark: what they plan of memory, what they leave out, and what is left to see of a failed one."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import yaml

from reqat.cli.main import main
from reqat.config.errors import ReqatError
from reqat.config.paths import Paths
from reqat.config.throughput import Throughput, load_throughput
from reqat.pipeline import benchmark
from reqat.pipeline.bench_kept import Kept
from reqat.pipeline.bench_sections import Bench, Section, apart, planned_bytes, sections
from reqat.pipeline.benchmark import measured
from reqat.records import record
from reqat_kernels.bench.machine import Bandwidth
from reqat_kernels.bench.measure import Result, Row, failed_row
from reqat_kernels.bench.worker import Died, cpus

ROOT = Path(__file__).parents[2]


def bench_of(memory: int = 4 * 10**9, threads: int = 0, **settings: object) -> Bench:
    bench = Bench(Throughput.model_validate(settings), memory, Path(), Path(), lambda _: None, threads)
    vars(bench)["bandwidth"] = Bandwidth((2**20, 2**21), (9e9, 1e9), 2**20)  # measured already
    return bench


def test_a_section_that_dies_of_our_own_code_ends_the_benchmark() -> None:
    def section(bench: Bench) -> Section:
        return apart(lambda bench, probe: os.kill(os.getpid(), signal.SIGKILL), bench)  # type: ignore[return-value, arg-type]

    with pytest.raises(ReqatError, match="entropy-0.*SIGKILL.*memory"):
        measured("entropy-0", section, bench_of())
    with pytest.raises(ReqatError, match="linear.*x: gone"):
        measured("linear", lambda bench: (_ for _ in ()).throw(Died("x: gone")), bench_of())


def test_a_section_apart_gives_its_rows_its_probe_and_its_memory() -> None:
    found = measured(
        "k", lambda bench: apart(lambda bench, probe: (Result(skipped=["x"]), {"heads": [{}]}), bench), bench_of()
    )
    assert found.result.skipped == ["x"] and found.compared == {"heads": [{}]} and len(found.rates) == 10
    assert found.peak_memory_bytes > 10**6


def test_threads_beyond_the_cpus_are_left_out_and_named() -> None:
    have, result = len(cpus()), Result()
    bench = bench_of()
    assert bench.able("linear", [1, have, have + 1], result) == [1, have]
    (sentence,) = result.skipped
    assert f"linear, {have + 1} threads" in sentence and f"{have} CPUs" in sentence
    assert bench_of(threads=1).able("linear", [1, 10**6], Result()) == [1], "--threads takes their place"


def test_memory_is_planned_before_the_start_and_refused_with_the_number() -> None:
    asked: dict[str, Any] = {"linear": {"m": [1], "nk": [1024]}, "sem_loss": {"shapes": ["tiny"]}}
    bench = bench_of(**asked)
    told: list[str] = []
    bench.say = told.append
    try:
        planned = planned_bytes(bench)
        assert list(planned) == ["linear", "sem_loss-tiny"] and all(
            0 < bytes < bench.memory for bytes in planned.values()
        )
        assert all(name in told[0] for name in planned)
        bench.memory = 10**8
        with pytest.raises(ReqatError, match="section linear.*0.1.*memory_mb"):
            planned_bytes(bench)
    finally:
        bench.stop()


def test_sections_are_named_by_their_place() -> None:
    decode = {"model": "pinned", "batches": [1], "output_tokens": [2]}
    asked = Throughput.model_validate({"decode": [decode, decode], "table": {"sizes": [16]}})
    assert list(sections(asked)) == ["table", "decode-0", "decode-1"]


# -- on a small checkout -----------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose smoke tier has a tiny benchmark with little memory."""
    shutil.copytree(ROOT / "config", tmp_path / "config")
    tiny = {"linear": {"m": [1], "nk": [1024], "rounds": 1}, "burst_ms": 0.1, "memory_mb": 2000}
    (tmp_path / "config" / "throughput.yaml").write_text(yaml.safe_dump({"tiers": {"smoke": tiny}}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_benchmark_stays_within_its_memory(checkout: Path) -> None:
    bench = [sys.executable, "-m", "reqat.cli", "bench", "--tier", "smoke", "--quiet"]
    subprocess.run(bench, cwd=checkout, env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}, check=True)
    settings = load_throughput("smoke", checkout / "config")
    assert settings is not None
    folder = checkout / "build" / "throughput" / settings.id
    metrics = record.verify(folder)["metrics"]
    memory, read = metrics["memory"], metrics["read_bandwidth"]
    assert memory["budget_bytes"] <= 2000 * 10**6
    assert 10**8 < memory["peak_bytes"]["linear"] <= memory["planned_bytes"]["linear"] <= memory["budget_bytes"]
    assert len(read["bytes"]) == len(read["bytes_per_s"]) > 5
    rows = pd.read_csv(folder / "throughput.csv")
    known = read["cold_bytes"]
    assert (rows.cold == (False if known is None else rows.ring_bytes >= known)).all()


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


# -- what outlives a kill ----------------------------------------------------------------------------------------------


def row(**more: Any) -> Row:
    return replace(failed_row("linear", "ours", "NVFP4", "N=K=16", 1, 1, "none"), failure=None, **more)


def test_a_kept_section_comes_back_as_it_was_measured(tmp_path: Path) -> None:
    paths, bench = Paths(tmp_path), bench_of(table={"sizes": [16]})
    section = Section(Result([row(n=3, median_us=1.5, min_us=0.5)], ["a"]), {"heads": [{"x": 1}]}, [3.0], 7)
    kept = Kept(tmp_path / "kept", bench, paths)
    assert kept.read("table") is None and not kept.used
    kept.bandwidth(bench)
    kept.write("table", section, {1: [1e9], 2: [2e9]})
    again, other = Kept(tmp_path / "kept", bench, paths), bench_of(table={"sizes": [16]})
    del vars(other)["bandwidth"]
    again.bandwidth(other)
    assert other.bandwidth == bench.bandwidth
    found = again.read("table")
    assert found is not None and found[1] == {1: [1e9], 2: [2e9]} and list(again.used) == ["table"]
    assert repr(found[0]) == repr(section), "NaN is not equal to itself, its text is"


def test_what_was_kept_with_other_code_settings_or_libraries_is_not_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = [tmp_path / "kernels" / "reqat_kernels" / "a.cpp", tmp_path / "reqat" / "training" / "b.py"]
    for code in codes:
        code.parent.mkdir(parents=True)
        code.write_text("1")
    paths, asked = Paths(tmp_path), {"table": {"sizes": [16]}}

    def kept(memory: int = 10**9, threads: int = 0, **settings: Any) -> Kept:
        return Kept(tmp_path / "kept", bench_of(memory, threads, **settings), paths)

    kept(**asked).write("table", Section(Result()), {})
    assert kept(**asked).read("table") is not None
    for other in ({"table": {"sizes": [32]}}, asked | {"threads": 2}, asked | {"memory": 2 * 10**9}):
        assert kept(**other).read("table") is None, other  # type: ignore[arg-type]
    for name, value in (("REQAT_GGML", "x"), ("CUDA_VISIBLE_DEVICES", "")):
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            assert kept(**asked).read("table") is None, name
    with monkeypatch.context() as changed:
        changed.setattr(importlib.metadata, "distributions", lambda: [])
        assert kept(**asked).read("table") is None
    for code in codes:
        code.write_text("2")
        assert kept(**asked).read("table") is None, code
        code.write_text("1")
    assert kept(**asked).read("table") is not None


def test_a_section_of_which_something_failed_is_measured_again(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "kept", bench_of(), Paths(tmp_path))
    kept.write("table", Section(Result([replace(row(), failure="it died")])), {})
    kept.write("linear", Section(Result(refused=["too much memory"])), {})
    assert kept.read("table") is None and kept.read("linear") is None


def test_rates_of_an_earlier_attempt_count_for_the_roofline(tmp_path: Path) -> None:
    def section(bench: Bench) -> Section:
        vars(bench)["probe"].rates.setdefault(2, []).append(5.0)
        return Section(Result())

    first, second = bench_of(), bench_of()
    for bench, rates in ((first, {1: [1.0]}), (second, {1: [3.0]})):
        vars(bench)["probe"] = SimpleNamespace(rates=rates)
    paths = Paths(tmp_path)
    benchmark.measured_once("a", section, first, Kept(tmp_path, first, paths))
    benchmark.measured_once("a", section, second, Kept(tmp_path, second, paths))
    assert second.own_rates() == {1: [3.0]} and second.read_rates() == {1: [3.0], 2: [5.0]}


def test_an_attempt_after_a_kill_measures_only_what_is_missing(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"table": {"sizes": [16]}, "sem_loss": {"shapes": ["tiny"]}, "memory_mb": 2000}
    (checkout / "config" / "throughput.yaml").write_text(yaml.safe_dump({"tiers": {"smoke": tiny}}))
    done: list[str] = []

    def of(name: str, fails: bool) -> Callable[[Bench], Section]:
        def work(bench: Bench) -> Section:
            if fails:
                raise KeyboardInterrupt
            done.append(name)
            return Section(Result([row(kernel=name, gb_per_s=1.0)]))

        return work

    for fails in (True, False):
        monkeypatch.setattr(benchmark, "sections", lambda _, fails=fails: {"a": of("a", False), "b": of("b", fails)})
        monkeypatch.setattr(benchmark, "planned_bytes", lambda _: {})
        monkeypatch.setattr(benchmark, "preload", lambda _: None)
        monkeypatch.setattr(
            Kept, "bandwidth", lambda self, bench: vars(bench).update(bandwidth=Bandwidth((), (), None))
        )
        reqat("bench", "--tier", "smoke", "--quiet")
    assert done == ["a", "b"]
    (folder,) = (checkout / "build" / "throughput").glob("throughput-*/")
    kept = record.verify(folder)
    assert kept["resumed"] and list(kept["metrics"]["measured_before"]) == ["a"]
    assert list(pd.read_csv(folder / "throughput.csv").kernel) == ["a", "b"]
    assert not list((checkout / "build" / "checkpoints").glob("*")), "the result is there: nothing is kept any more"
