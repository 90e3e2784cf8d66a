"""Jobs that a server forks are the jobs that the command line runs by itself: output, exit code, folder, signals."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from reqat.cli import warm

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """Socket and process id of a server."""
    process = warm.start([sys.executable], ROOT, tmp_path_factory.mktemp("server") / "log")
    assert process is not None
    path = os.environ.pop(warm.VARIABLE)  # of this process: the tests beside these must not see it
    yield path, process.pid
    os.environ[warm.VARIABLE] = path
    warm.stop(process)
    assert warm.VARIABLE not in os.environ and not Path(path).parent.exists()


def run(*arguments: str, server: str | None, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    given = {key: value for key, value in os.environ.items() if key != warm.VARIABLE} | environment
    if server is not None:
        given[warm.VARIABLE] = server
    command = [sys.executable, "-m", "reqat.cli", *arguments]
    given["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    return subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True, timeout=300)


def test_a_job_says_and_ends_as_without_a_server(server: tuple[str, int], tmp_path: Path) -> None:
    for arguments in (["evaluate", "evaluation-000000000000", "--tier", "smoke"], ["stage"], ["data", "--no"]):
        alone, forked = (run(*arguments, server=path) for path in (None, server[0]))
        assert alone.returncode == 2
        assert (forked.returncode, forked.stdout, forked.stderr) == (alone.returncode, alone.stdout, alone.stderr)
    outside = run("stage", "x", "--tier", "smoke", server=server[0], folder=tmp_path)
    assert outside.returncode == 2 and str(tmp_path) in outside.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_job_ends_with_its_command(server: tuple[str, int], tmp_path: Path, number: signal.Signals) -> None:
    plan = tmp_path / "plan.json"
    os.mkfifo(plan)  # the job waits for somebody to write
    command = [sys.executable, "-m", "reqat.cli", "--plan", str(plan), "stage", "x", "--tier", "smoke"]
    given = {**os.environ, warm.VARIABLE: server[0]}
    client = subprocess.Popen(command, cwd=ROOT, env=given, stderr=subprocess.PIPE)
    job = wait_for(lambda: next(iter(jobs_of(server)), None))
    time.sleep(1)  # a signal before the job has its handlers would end it, too, with another code
    client.send_signal(number)
    client.wait(60)
    assert client.returncode == {signal.SIGINT: 130, signal.SIGTERM: 128 + 15, signal.SIGKILL: -9}[number]
    wait_for(lambda: job not in jobs_of(server))


def jobs_of(server: tuple[str, int]) -> set[int]:
    """Processes that the server forked to be jobs: they lead sessions of their own."""
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != server[1]:
            try:
                command = (folder / "cmdline").read_bytes().split(b"\0")
                state, _, _, session = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:4]
            except OSError:
                continue
            if server[0].encode() in command and session == folder.name and state != "Z":
                found.add(int(folder.name))
    return found


def wait_for(something: Callable[[], T]) -> T:
    """What it gives, once that is true."""
    end = time.monotonic() + 120
    while not (found := something()) and time.monotonic() < end:
        time.sleep(0.05)
    assert found
    return found


def test_an_unexpected_error_shows_where_it_happened(server: tuple[str, int]) -> None:
    shown = run("--debug", "stage", "x", "--tier", "smoke", server=server[0])
    assert shown.returncode == 1 and "Traceback" in shown.stderr and "ReqatError" in shown.stderr


def test_without_an_answer_the_command_does_the_job_itself(tmp_path: Path) -> None:
    gone = run("stage", "--help", server=str(tmp_path / "nobody"))
    assert gone.returncode == 0 and "Run stages" in gone.stdout
    with socket.socket(socket.AF_UNIX) as listener:  # a server that dies while it imports
        listener.bind(str(tmp_path / "dying"))
        listener.listen()
        threading.Thread(target=lambda: listener.accept()[0].close(), daemon=True).start()
        dying = run("stage", "--help", server=str(tmp_path / "dying"))
    assert dying.returncode == 0 and dying.stdout == gone.stdout


def test_a_job_of_changed_sources_is_not_handed_over(server: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(warm.VARIABLE, server[0])
    monkeypatch.setattr(warm, "sources", lambda: "of another time")
    assert warm.handed_over(["stage", "x", "--tier", "smoke"]) is None


def test_verbs_that_measure_are_not_handed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(warm.VARIABLE, str(tmp_path / "never-asked"))
    assert warm.handed_over(["bench", "x"]) is None
    assert warm.handed_over(["bench", "x", "--tier", "data"]) is None
    assert warm.handed_over(["stage", "x", "--threads", "0"]) is None


def test_jobs_find_their_imports_made(tmp_path: Path) -> None:
    """What a job imports anew it pays for: after the server's imports, making data, training and grading need a few
    small modules more. (Thousands, if a library is forgotten.)"""
    program = """
import os, sys
from reqat.cli import warm
warm.import_everything()
print(len(os.listdir("/proc/self/task")))
from reqat.cli.main import main
from reqat.config import load
plan = load("smoke")
asked = next(id for id, one in plan.evaluations.items() if plan.stage(one.stage).kind == "base")
made = set(sys.modules)
for job in [id for id in plan.stages if id in plan.behind(asked)] + [asked]:
    verb = {"data": "data", "evaluation": "evaluate"}.get(job.split("-")[0], "stage")
    sys.argv = ["reqat", "--build", BUILD, verb, job, "--tier", "smoke"]
    try:
        main()
    except SystemExit as end:
        assert end.code in (0, None), job
print(len(set(sys.modules) - made))
"""
    program = program.replace("BUILD", repr(str(tmp_path / "build")))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=ROOT,
        env={**os.environ, **warm.ONE_THREAD, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    numbers = [int(line) for line in done.stdout.splitlines() if line.isdigit()]
    assert numbers[0] == 1, "a fork would lack threads"
    assert numbers[1] < 100
