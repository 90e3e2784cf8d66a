"""Resources available to a process: free memory, cores, disk space; limits of control groups are taken into account.

In a container the kernel reports the whole host's memory and cores; what may be used is what every control group on
the way up allows, and the smallest of these is the machine. A limit that cannot be read limits nothing.

``python -m reqat.config.machine cores`` and ``... memory-mb`` print one number each, for shell scripts.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

MB = 10**6  # Snakemake's `mem_mb` counts these
_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
#: Share of the free memory that jobs may be given; the rest is for page cache, Snakemake and what starts meanwhile.
USABLE = 0.9


def available_bytes(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int:
    """Bytes of memory that can be taken now without pushing anything out: what the kernel estimates, and what each
    control group's limit leaves. Physical memory where the system says nothing."""
    left = [_meminfo(proc, "MemAvailable") or _physical_bytes()]
    for limit, used, reclaimable in _memory_groups(proc, cgroups):
        left.append(max(0, limit - max(0, used - reclaimable)))
    return min(left)


def total_bytes(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int:
    """Bytes of memory of this machine, or of the container that it is."""
    total = _meminfo(proc, "MemTotal") or _physical_bytes()
    return min([total, *(limit for limit, _, _ in _memory_groups(proc, cgroups))])


def cores(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int:
    """Cores that this process may use: its affinity, and the control groups' quotas rounded up; 1 at least."""
    try:
        found = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        found = os.cpu_count() or 1
    return min(found, cores_by_quota(proc, cgroups) or found)


def cores_by_quota(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int | None:
    """Cores that the control groups' quotas allow, rounded up, whatever the affinity; None without a quota."""
    quotas = [max(1, math.ceil(quota)) for quota in _cpu_quotas(proc, cgroups)]
    return min(quotas, default=None)


def usable_mb() -> int:
    """Megabytes (10^6) that jobs side by side may be given now."""
    return int(USABLE * available_bytes() / MB)


def free_disk_bytes(folder: Path) -> int:
    """Bytes that may still be written where ``folder`` is, or would be made."""
    return shutil.disk_usage(existing(folder)).free


def existing(path: Path) -> Path:
    """The path itself if it is there, else the closest folder above it that is."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _physical_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _meminfo(proc: Path, field: str) -> int | None:
    try:
        for line in (proc / "meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _memory_groups(proc: Path, cgroups: Path) -> Iterator[tuple[int, int, int]]:
    """(limit, used, of which the kernel can take back) of each control group above this process that has a limit."""
    for folder in _folders(proc, cgroups, "memory"):
        version2 = (folder / "memory.max").exists()
        limit = _number(folder / ("memory.max" if version2 else "memory.limit_in_bytes"))
        used = _number(folder / ("memory.current" if version2 else "memory.usage_in_bytes"))
        # Version 1 writes "no limit" as a number near 2^63.
        if limit is None or used is None or limit >= 2**60:
            continue
        yield limit, used, _stat(folder / "memory.stat", "inactive_file" if version2 else "total_inactive_file")


def _cpu_quotas(proc: Path, cgroups: Path) -> Iterator[float]:
    """Cores that each control group above this process allows, for those that say so."""
    for folder in _folders(proc, cgroups, "cpu"):
        try:
            if (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
            else:
                quota, period = (
                    (folder / f"cpu.cfs_{name}_us").read_text(encoding="utf-8").strip() for name in ("quota", "period")
                )
            if quota != "max" and int(quota) > 0 and int(period) > 0:
                yield int(quota) / int(period)
        except (OSError, ValueError):
            continue


def _folders(proc: Path, cgroups: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's control groups, from its own up to the root, of either version."""
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, names, path = (line.split(":", 2) + ["", ""])[:3]
        if not names:
            root = cgroups
        elif controller in names.split(","):
            root = cgroups / controller if (cgroups / controller).is_dir() else cgroups / names
        else:
            continue
        # In a container whose namespace hides the host's groups the path may lie outside of what is mounted.
        inside = Path(path.lstrip("/"))
        for part in [inside, *inside.parents]:
            if ".." not in part.parts and (root / part).is_dir():
                yield root / part


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # "max" among them
        return None


def _stat(path: Path, field: str) -> int:
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(" ")
            if name == field:
                return int(value)
    except (OSError, ValueError):
        pass
    return 0


if __name__ == "__main__":
    print({"cores": cores, "memory-mb": usable_mb}[sys.argv[1]]())
