"""A lock on the working folder: one run of the workflow at a time, released by the system even when a run is killed.

Snakemake locks a folder with files, which a killed run leaves behind; the next one then refuses to start. A run of this
workflow holds an ``flock`` besides, which the system releases however the process ends. Whoever gets it knows that no
other run is alive, so that files of Snakemake's locks found then are left over.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from pathlib import Path
from typing import IO

LOCK = Path(".snakemake") / "reqat.lock"
STALE = Path(".snakemake") / "locks"
_held: list[IO[str]] = []  # for as long as the process lives


def hold(folder: Path = Path()) -> bool:
    """Hold ``folder`` until this process ends, and remove what a killed Snakemake left locked there.

    False if another process holds it, or if the file system knows no locks: then nothing is removed.
    """
    if _held:
        return True
    try:
        (folder / LOCK).parent.mkdir(exist_ok=True)
        handle = (folder / LOCK).open("a+", encoding="ascii")
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        return False
    _held.append(handle)
    with contextlib.suppress(OSError):  # a full disk: the number is only for people
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
    shutil.rmtree(folder / STALE, ignore_errors=True)
    return True


def holder(folder: Path = Path()) -> str | None:
    """The process number of the run that holds ``folder`` (or "?"), None if none does."""
    try:
        with (folder / LOCK).open("r", encoding="ascii") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return handle.read().strip() or "?"
    except (OSError, ValueError):
        pass
    return None
