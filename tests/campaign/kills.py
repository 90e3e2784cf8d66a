"""SIGKILLs of the DAG: at the end its tables are, byte for byte, those of a run that nobody disturbed.

Both runs are of the smoke tier, in a copy of this checkout below ``build/campaign/kills`` (with a Snakemake folder of
its own, so that nothing else is locked or unlocked). A kill ends Snakemake and all of its jobs at once, after a random
time; the next run goes on. A run that comes to its end before all kills are spent is compared, removed, and
begun anew. The benchmark is left out: its tables hold times.

What was done is kept in ``state.json``: the same command goes on with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from reqat.config.errors import ReqatError
from reqat.config.files import read_json, write_file

ROOT = Path(__file__).resolve().parents[2]
TIER = "smoke"
SHORTEST_S, LONGEST_S = 4.0, 30.0
"""A run lives so long before it is killed: from before its first job to after several."""


@dataclass
class State:
    """How far the campaign came. ``delays_s``: after how many seconds each kill struck; ``ends``: of each run that came
    to its end, the tables that were not those of the undisturbed run."""

    seed: int
    source: str
    delays_s: list[float] = field(default_factory=list)
    ends: list[list[str]] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)


def kill(n: int, *, seed: int, folder: Path, say: Callable[[str], None]) -> State:
    """Strike ``n`` times and let the DAG come to its end each time it can. Raises `ReqatError` if a run fails by
    itself."""
    folder.mkdir(parents=True, exist_ok=True)
    state = _state(folder, seed)
    reference = _checkout(folder / "undisturbed")
    if not (folder / "reference.json").is_file():
        say("an undisturbed run first")
        _finish(reference)
        write_file(folder / "reference.json", json.dumps(_tables(reference), indent=1))
    wanted = read_json(folder / "reference.json", "list of tables", f"remove {folder}")
    disturbed = _checkout(folder / "disturbed")
    while len(state.delays_s) < n:
        delay = random.Random(f"{seed}-{len(state.delays_s)}").uniform(SHORTEST_S, LONGEST_S)
        if _struck(disturbed, delay):
            state.delays_s.append(round(delay, 2))
            say(f"kill {len(state.delays_s)} of {n} after {delay:.1f} s")
        else:  # it came to its end before
            _compare(disturbed, wanted, state, say)
            for name in ("build", "figures"):
                shutil.rmtree(disturbed / name, ignore_errors=True)
        _save(folder, state)
    _finish(disturbed)
    _compare(disturbed, wanted, state, say)
    state.left_over = sorted(str(path.relative_to(disturbed)) for path in (disturbed / "build/partial").glob("*"))
    _save(folder, state)
    return state


def _state(folder: Path, seed: int) -> State:
    source = _source()
    path = folder / "state.json"
    if path.is_file():
        state = State(**read_json(path, "state of the campaign", f"remove {folder}"))
        if (state.source, state.seed) == (source, seed):
            return state
        for name in ("undisturbed", "disturbed"):  # of another code or seed
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / "reference.json").unlink(missing_ok=True)
    return State(seed, source)


def _save(folder: Path, state: State) -> None:
    write_file(folder / "state.json", json.dumps(asdict(state), indent=1))


def _files() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    return [name for name in listed.split("\0") if name and not name.startswith(("tests/", "results/"))]


def _source() -> str:
    digest = hashlib.sha256()
    for name in sorted(_files()):
        path = ROOT / name
        if path.is_file():
            digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _checkout(folder: Path) -> Path:
    if not (folder / "Snakefile").is_file():
        for name in _files():
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, folder / name)
    return folder


def _command() -> list[str]:
    """As `make figures TIER=smoke BENCH=no` calls it."""
    settings = ["--config", f"tier={TIER}", "bench=no"]
    return [sys.executable, "-m", "snakemake", "--cores", "all", *settings, "--", "figures/"]


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("REQAT_", "PYTHONPATH"))}
    return kept | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _start(folder: Path) -> subprocess.Popen[bytes]:
    log = (folder / "snakemake.log").open("ab")
    return subprocess.Popen(_command(), cwd=folder, env=_environment(), stdout=log, stderr=log, start_new_session=True)


def _finish(folder: Path) -> None:
    process = _start(folder)
    try:
        code = process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    if code != 0:
        raise ReqatError(f"{folder}/snakemake.log: the run ended with {code}; see there what failed.")


def _struck(folder: Path, delay: float) -> bool:
    """Start a run and kill it with all its jobs; False if it came to its end before."""
    process = _start(folder)
    try:
        code = process.wait(timeout=delay)
    except subprocess.TimeoutExpired:
        _kill_session(process.pid)
        process.wait()
        return True
    except BaseException:
        _kill_session(process.pid)
        raise
    if code != 0:
        raise ReqatError(f"{folder}/snakemake.log: a run after kills ended with {code}; see there what failed.")
    return False


def _kill_session(leader: int) -> None:
    """SIGKILL for every process of a session: Snakemake, the shells of its jobs, and the jobs."""
    for _ in range(50):
        left = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == leader and fields[0] != "Z":
                left.append(int(stat.parent.name))
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def _tables(folder: Path) -> dict[str, str]:
    """Name -> sha256 of every table."""
    where = folder / "build/tables" / TIER
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(where.iterdir()) if path.is_file()
    }


def _compare(folder: Path, wanted: dict[str, str], state: State, say: Callable[[str], None]) -> None:
    found = _tables(folder)
    different = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    state.ends.append(different)
    say(f"came to its end: {f'{len(different)} tables differ' if different else f'{len(found)} tables identical'}")
