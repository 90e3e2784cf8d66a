"""A process that serves one provider, so that whatever its library does costs that provider alone.

The parent forks it (everything is imported already: milliseconds), sends it one request at a time over a pipe and waits
for the answer; in between the process blocks in a read. A protection fault, an exit, a kill for memory or a call
without end is told apart from an answer, and raised in the parent as :class:`Died`.

Only one process of a benchmark computes at a time. Pools of threads spin for some milliseconds after their work, which
would disturb whoever comes next: :func:`settle` waits until they sleep.

The parent must not have computed with several threads, nor used a CUDA device: neither survives a fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

PATIENCE_S = 900.0
"""Seconds after which a call counts as one without end. The longest honest ones (a loss over 150,000 words on one core,
its check included) take minutes."""
_SETTLED_SHARE, _LOOK_S, _SETTLE_S = 0.1, 2e-3, 0.5
_PR_SET_PDEATHSIG = 1


class Died(Exception):
    """A worker that ended without an answer, or was ended for giving none. Its text says how."""


class Restless(RuntimeError):
    """Threads that go on computing after their call is over."""


class Moved(RuntimeError):
    """A process whose CPUs were changed while it was timed."""


def cpus() -> frozenset[int]:
    """The CPUs that this process may use: its affinity; all of them where the system knows no such thing."""
    try:
        return frozenset(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return frozenset(range(os.cpu_count() or 1))


def check_threads(threads: int) -> None:
    """Raise ValueError for more threads than CPUs, which would measure the scheduler."""
    have = len(cpus())
    if not 1 <= threads <= have:
        raise ValueError(
            f"{threads} threads on {have} CPUs that this process may use: ask for 1 to {have}, or give it more CPUs "
            "(taskset, the container's cpuset)"
        )


def settle(limit_s: float = _SETTLE_S) -> None:
    """Return when this process's threads no longer take a core. Raises :class:`Restless` after ``limit_s`` seconds."""
    end = time.monotonic() + limit_s
    while True:
        wall, busy = time.perf_counter(), time.process_time()
        time.sleep(_LOOK_S)
        if time.process_time() - busy < _SETTLED_SHARE * (time.perf_counter() - wall):
            return
        if time.monotonic() > end:
            raise Restless(f"its threads still compute {limit_s:g} s after a call and would disturb whoever comes next")


def private_bytes(pid: int) -> int:
    """Memory that a process shares with no other: what it adds to its parent's; 0 where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
        return 1024 * sum(int(text.split(f"\n{field}:")[1].split()[0]) for field in ("Private_Clean", "Private_Dirty"))
    return 0


def resident_bytes() -> int:
    """Memory that this process holds, shared or not; 0 where the system does not say."""
    return _status_bytes(os.getpid(), "VmRSS")


def peak_above_bytes(pid: int) -> int:
    """By how much a process has held more than it holds now; 0 where the system does not say."""
    return max(0, _status_bytes(pid, "VmHWM") - _status_bytes(pid, "VmRSS"))


def _status_bytes(pid: int, field: str) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
        return 1024 * int(text.split(f"{field}:")[1].split()[0])
    return 0


class Worker:
    """A forked process in which ``make()`` builds an object, at the first call; calls name its methods.

    Arguments and answers are pickled. What a method raises is raised here; :class:`Died` where the process ended, or
    gave no answer for ``patience_s`` seconds. After that, and after :meth:`stop`, no call can be made.
    """

    def __init__(self, make: Callable[[], Any], patience_s: float = PATIENCE_S) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._patience_s = patience_s
        sys.stdout.flush()
        sys.stderr.flush()
        self._process = context.Process(target=_serve, args=(make, theirs), daemon=False)
        self._process.start()
        theirs.close()  # so that the pipe ends with the process

    @property
    def pid(self) -> int:
        """Its process id."""
        return int(self._process.pid or 0)

    def __call__(self, method: str, *arguments: Any) -> Any:
        """What ``method`` of the object returns. Raises what it raises, and :class:`Died`."""
        try:
            _send(self._pipe, (method, arguments))
            if not self._pipe.poll(self._patience_s):
                self.stop(kill=True)
                raise Died(f"it gave no answer for {self._patience_s:g} s and was ended")
            value, error = pickle.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):
            self._process.join()
            raise Died(how_it_ended(self._process.exitcode)) from None
        if error is not None:
            raise error
        return value

    def stop(self, kill: bool = False) -> None:
        """End the process, and free what it holds. Without effect on one that has ended."""
        if not kill:
            with contextlib.suppress(OSError):
                _send(self._pipe, None)
            self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._pipe.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.stop(kill=error is not None)


class _Call:
    """An object whose only method is a function."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function

    def call(self) -> tuple[Any, int]:
        """What the function returns, and the largest resident set of this process in bytes."""
        value = self._function()
        return value, resident_bytes() + peak_above_bytes(os.getpid())


def isolated(function: Callable[[], Any], patience_s: float = 24 * 3600) -> tuple[Any, int]:
    """What ``function`` returns in a process of its own, and that process's largest memory in bytes.

    Raises what ``function`` raises, and :class:`Died`.
    """
    with Worker(lambda: _Call(function), patience_s) as worker:
        value, peak = worker("call")
    return value, int(peak)


def _serve(make: Callable[[], Any], pipe: Any) -> None:
    _end_with_parent()
    with contextlib.suppress(OSError):  # not Linux, or not allowed
        # If memory runs out, the kernel ends this process before others.
        Path("/proc/self/oom_score_adj").write_text("900", encoding="ascii")
    # A fork has torch make its thread pool anew when it is first asked for, which two threads must not do at once.
    torch.set_num_threads(torch.get_num_threads())
    served: Any = None
    while True:
        try:
            request = pickle.loads(pipe.recv_bytes())
            if request is None:
                # Not through the interpreter's end: a foreign library's destructors are no affair of the benchmark.
                os._exit(0)
            method, arguments = request
            served = make() if served is None else served
            _send(pipe, (getattr(served, method)(*arguments), None))
        except (KeyboardInterrupt, EOFError):
            os._exit(130)  # the parent has been interrupted too, and says so
        except BaseException as error:
            _send(pipe, (None, _portable(error)))


def _send(pipe: Any, value: Any) -> None:
    """As plain bytes: multiprocessing's own pickling moves tensors to shared memory, with threads that serve it."""
    pipe.send_bytes(pickle.dumps(value))


def _portable(error: BaseException) -> Exception:
    """The error in a form that survives the pipe, its traceback as a note; SystemExit, too, is only an error here."""
    error.add_note("".join(traceback.format_exception(error)))
    if isinstance(error, Exception):
        with contextlib.suppress(Exception):
            pickle.loads(pickle.dumps(error))
            return error
    plain = RuntimeError(f"{type(error).__name__}: {error}")
    plain.__notes__ = error.__notes__
    return plain


def _end_with_parent() -> None:
    """Ask Linux to end this process when its parent ends, however that happens."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def how_it_ended(code: int | None) -> str:
    """How a process ended without an answer, for people: the exit code, or the signal's name and what it means."""
    if code is None or code >= 0:
        return f"it ended with exit code {code} and without a result"
    name = signal.Signals(-code).name
    why = {
        "SIGKILL": ", as the system does when memory runs out",
        "SIGSEGV": ", a protection fault",
        "SIGBUS": ", a protection fault",
        "SIGILL": ", an instruction that this CPU does not have",
    }.get(name, "")
    return f"it was ended by {name}{why}"
