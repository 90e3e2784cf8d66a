"""Run a function in a forked process, so that a crash of third-party native code affects that function alone.

The process is a fork: it has everything that is imported already and starts in milliseconds. Therefore the caller must
not have computed anything with several threads, nor touched a CUDA device, before.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reqat.records.provenance import own_peak_bytes

_MARK_BYTES = 512
_PR_SET_PDEATHSIG = 1


class Died(Exception):
    """The process of a function ended without a result. ``mark``: what it said last that it was doing."""

    def __init__(self, how: str, mark: str) -> None:
        super().__init__(how)
        self.how, self.mark = how, mark


class Mark:
    """A short text in memory shared with the parent process, readable after the writer has died."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _MARK_BYTES)

    def __call__(self, word: str) -> None:
        """Write ``word`` (its first 500 bytes)."""
        data = word.encode()[: _MARK_BYTES - 2]
        self._memory[:_MARK_BYTES] = len(data).to_bytes(2, "little") + data.ljust(_MARK_BYTES - 2, b"\0")

    @property
    def word(self) -> str:
        """What was written last."""
        size = int.from_bytes(self._memory[:2], "little")
        return bytes(self._memory[2 : 2 + size]).decode(errors="replace")


def isolated(function: Callable[[], Any], mark: Mark) -> tuple[Any, int]:
    """What ``function`` returns in a forked process, and the largest resident set of that process, in bytes.

    Raises what ``function`` raises, and :class:`Died` where its process was ended by a signal or left without a word.
    If memory runs out, the kernel ends that process before others.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    mark("")
    sys.stdout.flush()
    sys.stderr.flush()
    process = context.Process(target=_work, args=(function, sender), daemon=False)
    process.start()
    sender.close()
    try:
        try:
            value, error, peak = receiver.recv()
        except EOFError:
            process.join()
            raise Died(_how(process.exitcode), mark.word) from None
        process.join()
    finally:
        if process.is_alive():
            process.kill()
            process.join()
        receiver.close()
    if error is not None:
        raise error
    return value, peak


def _work(function: Callable[[], Any], sender: Any) -> None:
    _end_with_parent()
    with contextlib.suppress(OSError):  # not Linux, or not allowed
        Path("/proc/self/oom_score_adj").write_text("900", encoding="ascii")
    value, error = None, None
    try:
        value = function()
    except KeyboardInterrupt:
        os._exit(130)  # the parent has been interrupted too, and says so
    except BaseException as caught:
        caught.add_note("".join(traceback.format_exception(caught)))  # a traceback does not travel
        error = caught
    peak = own_peak_bytes()
    try:
        sender.send((value, error, peak))
    except Exception as unsent:  # e.g. an exception that cannot be pickled
        sender.send((None, RuntimeError(f"{type(error or unsent).__name__}: {error or unsent}"), peak))


def _end_with_parent() -> None:
    """Ask Linux to end this process when its parent ends, however that happens."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _how(code: int | None) -> str:
    """How a process ended, for people."""
    if code is None or code >= 0:
        return f"it ended with exit code {code} and without a result"
    name = signal.Signals(-code).name
    why = {"SIGKILL": ", as the system does when memory runs out", "SIGSEGV": ", a protection fault"}.get(name, "")
    return f"it was ended by {name}{why}"
