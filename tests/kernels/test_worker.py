"""Providers in processes of their own: whatever a library does to its process costs its own rows, and no others. On no
clock."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from reqat_kernels.bench import Absent, Case, Kernel, Work, Wrong, measure
from reqat_kernels.bench.machine import Bandwidth
from reqat_kernels.bench.turns import Roofline
from reqat_kernels.bench.worker import Died, Restless, Worker, check_threads, cpus, isolated, settle

CASE = Case("k", (("M", 1),), ring_bytes=1)


@pytest.fixture
def probe() -> Iterator[Roofline]:
    probe = Roofline(memory=4096, bandwidth=Bandwidth((1024,), (1e9,), 1024))
    yield probe
    probe.stop()


class Odd(Exception):
    """Cannot be pickled: it takes two arguments."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


class Served:
    def __init__(self) -> None:
        self.calls = 0

    def count(self) -> tuple[int, int]:
        self.calls += 1
        return self.calls, os.getpid()

    def kill(self, number: int) -> None:
        os.kill(os.getpid(), number)

    def leave(self, code: int) -> None:
        os._exit(code)

    def exit(self) -> None:
        sys.exit(3)

    def hang(self) -> None:
        time.sleep(600)

    def odd(self) -> None:
        raise Odd(1, 2)

    def wrong(self) -> None:
        raise Wrong("it is off")


def test_a_worker_is_one_object_in_another_process() -> None:
    with Worker(Served) as worker:
        (first, pid), (second, same) = worker("count"), worker("count")
        assert (first, second) == (1, 2) and pid == same == worker.pid != os.getpid()
        with pytest.raises(Wrong, match="off"):
            worker("wrong")
        with pytest.raises(RuntimeError, match="Odd.*1 and 2"):
            worker("odd")
        with pytest.raises(RuntimeError, match="SystemExit"):
            worker("exit")
        assert worker("count")[0] == 3, "an error is an answer; the process goes on"
    with pytest.raises(Died):
        worker("count")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (("kill", signal.SIGSEGV), "SIGSEGV"),
        (("kill", signal.SIGKILL), "SIGKILL.*memory"),
        (("leave", 0), "exit code 0"),
        (("leave", 7), "exit code 7"),
        (("hang",), "no answer"),
    ],
)
def test_how_a_worker_ended_is_known(call: tuple[Any, ...], says: str) -> None:
    worker = Worker(Served, patience_s=5 if call == ("hang",) else 60)
    with pytest.raises(Died, match=says):
        worker(*call)
    with pytest.raises(Died):
        worker("count")
    worker.stop()
    with pytest.raises(ProcessLookupError):  # nothing is left of it, not even of one that hung
        os.kill(worker.pid, 0)


def test_a_function_apart_gives_its_result_and_its_memory() -> None:
    value, peak = isolated(os.getpid)
    assert value != os.getpid() and peak > 10**6


def test_threads_that_go_on_computing_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the process's time on all cores, which is made up here: a busy machine would starve a real thread."""
    monkeypatch.setattr(time, "process_time", time.perf_counter)  # one core, all the time
    with pytest.raises(Restless):
        settle(limit_s=0.01)
    busy = iter([0.0, 5.0, 5.0, 9.0, 9.0, 9.0])  # seconds at the beginning and end of a look; asleep in the third
    monkeypatch.setattr(time, "process_time", lambda: next(busy))
    settle(limit_s=60)
    assert list(busy) == []


def test_more_threads_than_cpus_are_refused() -> None:
    have = len(cpus())
    check_threads(have)
    for threads in (0, have + 1):
        with pytest.raises(ValueError, match=rf"{threads} threads on {have} CPUs"):
            check_threads(threads)
    with pytest.raises(ValueError, match="CPUs"):
        measure(CASE, Kernel("k"), rounds=1, threads=[have + 1])


# -- stub providers that misbehave -------------------------------------------------------------------------------------


def _raise(error: Exception) -> None:
    raise error


MISBEHAVIOUR: dict[str, tuple[Callable[[], object], str]] = {
    "crashes": (lambda: os.kill(os.getpid(), signal.SIGSEGV), "SIGSEGV"),
    "is killed": (lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL"),
    "leaves": (lambda: os._exit(3), "exit code 3"),
    "exits": (lambda: sys.exit(3), "SystemExit"),
    "hangs": (lambda: time.sleep(600), "no answer"),
    "raises": (lambda: _raise(RuntimeError("this CPU cannot")), "RuntimeError: this CPU cannot"),
    "raises oddly": (lambda: _raise(Odd(1, 2)), "Odd: 1 and 2"),
}


def stub(kernel: Kernel, name: str, act: Callable[[], object], when: str, **options: Any) -> None:
    """A provider that does something when it is made, checked, or timed for the second time."""

    def make(case: Case) -> Work:
        timed = 0

        def run(i: int) -> None:
            nonlocal timed
            timed += 1
            if when == "timed" and timed > 12:  # past the warm-up, whose calls are six
                act()

        if when == "made":
            act()
        return Work(run, 4, bytes_moved=1000, check=act if when == "checked" else lambda: None)  # type: ignore[arg-type]

    kernel.provider(name, format="BF16", **options)(make)


@pytest.mark.parametrize("when", ["made", "checked", "timed"])
@pytest.mark.parametrize("how", list(MISBEHAVIOUR))
def test_a_peer_that_misbehaves_costs_its_own_rows(how: str, when: str, probe: Roofline) -> None:
    act, says = MISBEHAVIOUR[how]
    kernel = Kernel("k")
    stub(kernel, "before", lambda: None, "never")
    stub(kernel, how, act, when)
    stub(kernel, "mine", lambda: None, "never", ours=True)
    result = measure(CASE, kernel, rounds=20, burst_s=0, probe=probe, patience_s=8 if how == "hangs" else 600)
    by_name = {row.provider: row for row in result.rows}
    assert set(by_name) == {"before", how, "mine"} and len(result.rows) == 3
    for name in ("before", "mine"):
        row = by_name[name]
        assert row.failure is None and row.n + row.set_aside == 20 and row.median_us > 0
    lost = by_name[how]
    assert lost.failure is not None and says in lost.failure and lost.n == 0 and lost.median_us != lost.median_us
    (sentence,) = result.refused
    assert how in sentence and says in sentence


def test_a_peer_that_is_wrong_is_not_timed(probe: Roofline) -> None:
    kernel = Kernel("k")
    stub(kernel, "theirs", lambda: _raise(Wrong("it is off")), "checked")
    stub(kernel, "missing", lambda: _raise(Absent("nobody installed it.")), "made")
    result = measure(CASE, kernel, rounds=1, probe=probe)
    assert [(row.provider, row.failure) for row in result.rows] == [("theirs", "it is off")]
    assert result.skipped == ["k, missing: nobody installed it."]


@pytest.mark.parametrize(("how", "error"), [("crashes", Died), ("raises", RuntimeError), ("exits", RuntimeError)])
def test_what_our_own_code_does_ends_the_run(how: str, error: type[Exception], probe: Roofline) -> None:
    kernel = Kernel("k")
    stub(kernel, "mine", MISBEHAVIOUR[how][0], "timed", ours=True)
    with pytest.raises(error):
        measure(CASE, kernel, rounds=20, burst_s=0, probe=probe)


@pytest.mark.skipif(len(cpus()) < 2, reason="one CPU: there is no other affinity")
@pytest.mark.parametrize("ours", [False, True])
def test_a_change_of_cpus_costs_the_row(ours: bool, probe: Roofline) -> None:
    kernel = Kernel("k")
    stub(kernel, "moves", lambda: os.sched_setaffinity(0, {min(cpus())}), "timed", ours=ours)
    stub(kernel, "stays", lambda: None, "never")
    result = measure(CASE, kernel, rounds=20, burst_s=0, probe=probe)
    failures = {row.provider: row.failure for row in result.rows}
    assert failures["stays"] is None and "CPUs changed" in str(failures["moves"])
    assert len(cpus()) > 1, "only in its own process"


@pytest.mark.skipif(len(cpus()) < 2, reason="one CPU")
def test_every_number_of_threads_has_a_row_and_is_checked(probe: Roofline) -> None:
    import torch

    kernel, before = Kernel("k"), torch.get_num_threads()

    def make(case: Case) -> Work:
        def check() -> None:
            if torch.get_num_threads() == 2:
                raise Wrong("two threads add up wrongly")

        return Work(lambda i: None, 2, 8, check)

    kernel.provider("theirs", format="BF16")(make)
    stub(kernel, "other", lambda: None, "never")
    result = measure(CASE, kernel, rounds=2, threads=[1, 2], probe=probe)
    assert [(r.provider, r.threads, r.failure is None) for r in result.rows] == [
        ("other", 1, True), ("other", 2, True), ("theirs", 1, False), ("theirs", 2, False),
    ]  # fmt: skip
    assert set(probe.rates) == {1, 2} and torch.get_num_threads() == before


def test_a_kernel_that_is_not_resident_has_one_provider_in_memory(tmp_path: Any, probe: Roofline) -> None:
    kernel, log = Kernel("k", resident=False), tmp_path / "log"

    def register(name: str) -> None:
        def make(case: Case) -> Work:
            with log.open("a") as file:
                file.write(f"{name} {os.getpid()}\n")
            return Work(lambda i: None, 1, 8, lambda: None)

        kernel.provider(name, format="FP32")(make)

    for name in "ab":
        register(name)
    result = measure(CASE, kernel, rounds=3, probe=probe)
    assert [(row.provider, row.n + row.set_aside) for row in result.rows] == [("a", 3), ("b", 3)]
    made = [line.split() for line in log.read_text().splitlines()]
    assert [name for name, _ in made] == ["a", "b", "b", "a", "a", "b"], "turns"
    assert len({pid for _, pid in made}) == 6, "each in a process that ended before the next one"
