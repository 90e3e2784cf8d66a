"""Disks that are full, folders without permission, paths that cannot be: a harness that runs a verb with such a fault.

``run`` calls the command line in this process and returns how it ended; ``FAULTS`` are context managers that take the
folder in which a target lies; ``complaints`` holds what is left against what must be: exit code 2, one line that names
the place, no traceback, nothing half-written, and what was there untouched.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import io
import os
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2
_CAPABILITIES_V3 = 0x20080522


@dataclass(frozen=True)
class End:
    """How a command ended."""

    code: int
    out: str
    err: str


def run(*arguments: object) -> End:
    """Run ``reqat ARGUMENTS`` in this process. What it prints goes nowhere near a file, so that a limit on files does
    not meet it."""
    from reqat.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(a) for a in arguments])
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    return End(code, out.getvalue(), err.getvalue())


def tree(folder: Path) -> dict[str, str]:
    """Every entry below a folder: path -> digest of a file, target of a link, or ``folder``. Links are not followed."""
    found = {}
    for where, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(where, name)
            if path.is_symlink():
                entry = f"-> {os.readlink(path)}"
            elif path.is_file():
                entry = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                entry = "folder" if path.is_dir() else "other"
            found[path.relative_to(folder).as_posix()] = entry
    return found


@contextlib.contextmanager
def full_disk(folder: Path, bytes_left: int = 0) -> Iterator[None]:
    """No file may grow beyond ``bytes_left``: writing fails in the middle, in the system calls that a full disk fails
    in (EFBIG in place of ENOSPC). Any process may do this to itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python 3.11 keeps what it could write of a module's bytecode, which then can never be imported again.
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, hard))  # Python ignores the signal that comes with it
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        sys.dont_write_bytecode = bytecode


@contextlib.contextmanager
def no_permission(folder: Path) -> Iterator[None]:
    """The folder may be read and not written to, by root neither."""
    mode = folder.stat().st_mode
    folder.chmod(0o500)
    try:
        with _without_privileges():
            yield
    finally:
        folder.chmod(mode)


@contextlib.contextmanager
def _without_privileges() -> Iterator[None]:
    """Take root's right to ignore permissions from this thread for a while (see capset(2))."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_V3, 0)
    before = (ctypes.c_uint32 * 6)()
    if libc.capget(header, before) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    lowered = (ctypes.c_uint32 * 6)(*before)
    lowered[0] &= ~(1 << CAP_DAC_OVERRIDE | 1 << CAP_DAC_READ_SEARCH)  # the effective set; it may be raised again
    if libc.capset(header, lowered) != 0:
        raise OSError(ctypes.get_errno(), "capset")
    try:
        yield
    finally:
        libc.capset(header, before)


FAULTS: dict[str, Callable[[Path], contextlib.AbstractContextManager[None]]] = {
    "no space": full_disk,
    "space for a little": lambda folder: full_disk(folder, 200),
    "no permission": no_permission,
}

# Targets that cannot be, in a folder that holds the file `file`.
IMPOSSIBLE: dict[str, Callable[[Path], Path]] = {
    "below a file": lambda folder: folder / "file" / "out",
    "deep below a file": lambda folder: folder / "file" / "a" / "out",
    "a name of 300 letters": lambda folder: folder / ("n" * 300),
    "a path beyond PATH_MAX": lambda folder: folder.joinpath(*["d" * 200] * 25),
}


def complaints(end: End, folder: Path, before: dict[str, str]) -> list[str]:
    """What is wrong about a command that the system kept from writing into ``folder``; empty where nothing is."""
    wrong = []
    if end.code != 2:
        wrong.append(f"exit code {end.code}")
    lines = [line for line in end.err.splitlines() if line.startswith("reqat: error: ")]
    if len(lines) != 1 or "Traceback" in end.err or "defect" in end.err:
        wrong.append(f"not one line: {end.err[-500:]!r}")
    if "/" not in end.err:
        wrong.append(f"no file is named: {end.err!r}")
    if (after := tree(folder)) != before:
        changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        wrong.append(f"left or changed: {', '.join(changed[:5])}")
    return wrong


# The cases of a campaign. They want a checkout with config/, results/, and what `tests.campaign.material` makes:
# model/, problems.jsonl, traces/, fit.json.

NAMED = {  # verbs (and options) whose target the user names
    "quantize": ["--model", "model", "--precision", "NVFP4-W4A4KV4", "-q", "--out"],
    "entropy": ["--reference", "model", "--problems", "problems.jsonl", "--no-sample", "-q", "--out"],
    "route": ["--reference", "model", "--tier", "smoke", "-q", "--out"],
    "noise": ["--model", "model", "--sigmas", "0.1", "--tier", "smoke", "-q", "--out"],
    "reset": ["--model", "model", "--fit", "fit.json", "--tier", "smoke", "-q", "--out"],
    "fit-reset": ["--model", "model", "--precision", "NVFP4-W4A4KV4", "--tier", "smoke", "-q", "--out"],
    "view": ["traces", "--out"],
    "report --what run": ["--pinned", "--tier", "laptop", "--plots", "build/plots", "--tables"],
    "report --what studies": ["--pinned", "--tier", "laptop", "--plots", "build/plots", "--tables"],
    "report --what benchmark": ["--pinned", "--tier", "laptop", "--plots", "build/plots", "--tables"],
    "report --pinned": ["--tier", "laptop", "--tables", "build/tables", "--plots"],
}
KNOWN = {
    "schema": ([], "config"),
    "data": (["--tier", "smoke", "-q"], "build"),
    "pin": (["--tier", "smoke"], "results"),
}
GRADING = ("route", "noise", "reset", "fit-reset")  # they would grade a model before the first byte is written


@dataclass(frozen=True)
class Case:
    """A verb, where it is to write, and what keeps it from that. To be run in the checkout."""

    name: str
    arguments: tuple[str, ...]
    fault: Callable[[], contextlib.AbstractContextManager[None]]


def cases(root: Path) -> list[Case]:
    """All verbs that write, with all faults; folders that targets lie in are made in ``root`` (use them once)."""
    found = []
    for verb, given in NAMED.items():
        place = root / f"place-{verb}"
        place.mkdir()
        (place / "file").write_text("mine")
        for name, fault in FAULTS.items():
            if name == "no permission" or verb not in GRADING:
                arguments = (*verb.split(), *given, str(place / "out"))
                found.append(Case(f"{verb}, {name}", arguments, functools.partial(fault, place)))
        for name, target in IMPOSSIBLE.items():
            arguments = (*verb.split(), *given, str(target(place)))
            found.append(Case(f"{verb}, {name}", arguments, contextlib.nullcontext))
    for verb, (given, folder) in KNOWN.items():
        (root / folder).mkdir(exist_ok=True)
        for name, fault in FAULTS.items():
            if verb != "pin" or name == "no permission":
                found.append(Case(f"{verb}, {name}", (verb, *given), functools.partial(fault, root / folder)))
    return found


def carry_out(case: Case, root: Path) -> list[str]:
    """Run a case in the checkout ``root``, the working directory; what is wrong about how it ended. Empty folders of
    ``build/`` may be left."""
    before = tree(root)
    with case.fault():
        end = run(*case.arguments)
    for path in sorted(root.glob("build/**"), reverse=True):
        if path.is_dir() and not path.is_symlink() and path.relative_to(root).as_posix() not in before:
            with contextlib.suppress(OSError):
                path.rmdir()
    return complaints(end, root, before)
