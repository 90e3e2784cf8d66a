"""Opening the native library, and saying which path is in use.

The library is built by the package's own installation (setup.py). Where it is missing (no compiler), or was built
from other sources, every kernel still works by its PyTorch path; :func:`status` says so in one line.

Environment: ``REQAT_ISA`` limits the instruction set: ``amx``, ``avx512``, ``avxvnni``, ``avx2``, ``portable``, or
``torch`` for no native code at all. The best of what this machine has up to there is used. ``REQAT_LIBRARY`` names
another build of the library (with sanitizers, say).
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import warnings
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

from reqat_kernels.isas import CHOICES, ISAS, LACKS
from reqat_kernels.native.fingerprint import fingerprint

OK, NO_MEMORY, NOT_FINITE = 0, 1, 2  # what entry points return, by reqat::Status
_HERE = Path(__file__).resolve().parent
_LOCK = threading.Lock()

#: Operators of all kernels live in torch's namespace ``reqat``: ``torch.ops.reqat.<name>``.
OPERATORS = torch.library.Library("reqat", "FRAGMENT")


@cache
def library() -> ctypes.CDLL | None:
    """The native library, or None where every kernel takes its PyTorch path. Looked up once a process.

    Raises ValueError for a ``REQAT_ISA`` that names no instruction set.
    """
    # Without the lock two threads could get two objects, one of which lacks the argument types that callers set.
    with _LOCK:
        return _opened()


@cache
def _opened() -> ctypes.CDLL | None:
    wanted = _wanted()
    if wanted not in ("", *CHOICES):
        raise ValueError(f"REQAT_ISA={wanted!r}: choose {', '.join(CHOICES)}, or leave it unset")
    path = _path()
    if wanted == "torch" or path is None:
        return None
    try:
        lib = ctypes.CDLL(str(path))
        lib.reqat_fingerprint.restype = ctypes.c_char_p
        found = lib.reqat_fingerprint().decode()
    except (OSError, AttributeError) as error:
        warnings.warn(f"{path} cannot be used ({error}): FP4 kernels run in PyTorch, slowly", stacklevel=3)
        return None
    if found != fingerprint():
        warnings.warn(
            f"{path} was built from other sources ({found}, not {fingerprint()}): FP4 kernels run in PyTorch, slowly; "
            "run `make env` again to build it",
            stacklevel=3,
        )
        return None
    if wanted:
        lib.reqat_limit_isa(ISAS.index(wanted))
    return lib


def instruction_set() -> str:
    """Which of ``ISAS`` the native kernels use, or ``torch`` where there is no native library."""
    lib = library()
    return "torch" if lib is None else ISAS[lib.reqat_isa()]


def instruction_sets() -> list[str]:
    """Those of ``ISAS`` that can be used here, from the least on, whatever ``REQAT_ISA`` says; none without library."""
    lib = library()
    return [] if lib is None else [isa for isa in ISAS if not lib.reqat_lack(ISAS.index(isa))]


def build() -> dict[str, str]:
    """What computes in this process: ``fingerprint`` of the library's sources (``none`` without one) and
    ``instruction_set``."""
    kind = instruction_set()
    return {"fingerprint": "none" if kind == "torch" else fingerprint(), "instruction_set": kind}


def status() -> str:
    """One line for people: which path the CPU kernels take, and why not a better one."""
    wanted, lib = _wanted(), library()
    if lib is None:
        missing = "no native library: install a C++ compiler, then reinstall the package"
        return f"native CPU kernels: none, PyTorch instead ({'REQAT_ISA=torch' if wanted == 'torch' else missing})"
    best = lib.reqat_isa()
    asked = len(ISAS) - 1 if wanted == "" else ISAS.index(wanted)
    why = _lacks(lib, range(best + 1, asked + 1))
    if wanted:
        why = f"REQAT_ISA={wanted}" + (f", but {why}" if why else "")
    if ISAS[best] == "amx" and lib.reqat_tile_twin():
        why = ", ".join(["its instructions computed in C++", *([why] if why else [])])
    return f"native CPU kernels: {ISAS[best]}" + (f" ({why})" if why else "")


def _lacks(lib: ctypes.CDLL, isas: range) -> str:
    """What is said about instruction sets that cannot be used, each reason once."""
    names: dict[int, list[str]] = {}
    for isa in isas:
        names.setdefault(lib.reqat_lack(isa), []).append(ISAS[isa])
    return ", and ".join(LACKS[lack].format(" or ".join(group)) for lack, group in names.items() if lack)


def _wanted() -> str:
    return os.environ.get("REQAT_ISA", "").strip().lower()


def threads(work: int, per_thread: int) -> int:
    """How many threads to use: torch's number, no more than this thread may run on now, than :func:`limit_threads`
    allows, and than leave each ``per_thread`` of ``work``.

    Threads that share a core wait for each other at the end of every product. Results do not depend on the number.
    """
    most = min(torch.get_num_threads(), _most_threads, work // per_thread)
    return min(most, _allowed()) if most > 1 else 1


def limit_threads(most: int) -> None:
    """Use no more than ``most`` threads from now on, as where a container may use fewer cores than it sees. At least 1.

    Raises ValueError for less.
    """
    global _most_threads
    if most < 1:
        raise ValueError(f"at most {most} threads: at least 1 is needed")
    _most_threads = most


_most_threads = sys.maxsize


def _allowed() -> int:
    """CPUs on which the calling thread may run now; its affinity may change while the process runs."""
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not Linux
        return sys.maxsize


def _path() -> Path | None:
    if given := os.environ.get("REQAT_LIBRARY"):
        return Path(given)
    for suffix in EXTENSION_SUFFIXES:
        path = _HERE.parent / f"_native{suffix}"
        if path.exists():
            return path
    return None
