"""What a machine can give, read from made-up /proc and control groups of both versions; and who works in a folder."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from reqat.config import machine, working_folder

GIB = 2**30


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Folders that stand for /proc (16 GiB, 10 free) and /sys/fs/cgroup, on a machine of 8 cores."""
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    cgroups.mkdir()
    (proc / "meminfo").write_text(f"MemTotal: {16 * 2**20} kB\nMemFree: 1 kB\nMemAvailable:   {10 * 2**20} kB\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    return proc, cgroups


def test_without_control_groups_the_machine_is_what_proc_says(system: tuple[Path, Path]) -> None:
    assert machine.available_bytes(*system) == 10 * GIB
    assert machine.total_bytes(*system) == 16 * GIB
    assert machine.cores(*system) == 8


def test_the_tightest_control_group_on_the_way_up_is_the_machine(system: tuple[Path, Path]) -> None:
    proc, cgroups = system
    (proc / "self" / "cgroup").write_text("0::/outer/inner\n")
    inner = cgroups / "outer" / "inner"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (inner / "cpu.max").write_text("max 100000\n")
    (inner.parent / "memory.max").write_text(f"{4 * GIB}\n")
    (inner.parent / "memory.current").write_text(f"{3 * GIB}\n")
    (inner.parent / "memory.stat").write_text(f"anon 1\ninactive_file {GIB}\n")
    (inner.parent / "cpu.max").write_text("150000 100000\n")
    assert machine.total_bytes(*system) == 4 * GIB
    assert machine.available_bytes(*system) == 2 * GIB  # a file's cache is given back when it is asked for
    assert machine.cores(*system) == 2
    (inner.parent / "cpu.max").write_text("50000 100000\n")
    assert machine.cores(*system) == 1


def test_control_groups_of_version_1_in_a_container(system: tuple[Path, Path]) -> None:
    proc, cgroups = system
    # The path is the host's; in the container only the mounted root is there.
    (proc / "self" / "cgroup").write_text("5:cpu,cpuacct:/docker/0123\n4:memory:/docker/0123\n1:name=systemd:/x\n")
    for name in ("memory", "cpu"):
        (cgroups / name).mkdir()
    (cgroups / "memory" / "memory.limit_in_bytes").write_text(f"{2 * GIB}\n")
    (cgroups / "memory" / "memory.usage_in_bytes").write_text(f"{GIB}\n")
    (cgroups / "memory" / "memory.stat").write_text(f"total_inactive_file {GIB // 2}\n")
    (cgroups / "cpu" / "cpu.cfs_quota_us").write_text("300000\n")
    (cgroups / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert machine.total_bytes(*system) == 2 * GIB
    assert machine.available_bytes(*system) == 3 * GIB // 2
    assert machine.cores(*system) == 3
    (cgroups / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")  # no limit
    (cgroups / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    assert machine.total_bytes(*system) == 16 * GIB and machine.cores(*system) == 8


def test_what_cannot_be_read_limits_nothing(system: tuple[Path, Path]) -> None:
    proc, cgroups = system
    (proc / "self" / "cgroup").write_text("garbage\n0::/a/../../b\n")
    (cgroups / "memory.max").write_text("lots\n")
    (cgroups / "cpu.max").write_text("a b c\n")
    assert machine.available_bytes(*system) == 10 * GIB and machine.cores(*system) == 8
    (proc / "meminfo").unlink()
    assert machine.available_bytes(*system) == machine.total_bytes(*system) > 0


def test_room_is_looked_for_where_a_folder_would_be_made(tmp_path: Path) -> None:
    assert machine.existing(tmp_path / "a" / "b") == tmp_path
    assert machine.free_disk_bytes(tmp_path / "a" / "b") > 0


def test_who_holds_a_folder_is_known_and_what_a_killed_run_left_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(working_folder, "_held", [])
    stale = tmp_path / working_folder.STALE / "0.input.lock"
    stale.parent.mkdir(parents=True)
    stale.touch()
    assert working_folder.holder(tmp_path) is None
    with (tmp_path / working_folder.LOCK).open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write("123")
        other.flush()
        assert working_folder.holder(tmp_path) == "123"
        assert not working_folder.hold(tmp_path) and stale.exists(), "somebody is at work"
    hold = "import sys, pathlib; from reqat.config.working_folder import hold; print(hold(pathlib.Path(sys.argv[1])))"
    assert subprocess.check_output([sys.executable, "-c", hold, tmp_path], text=True) == "True\n"
    assert not stale.parent.exists()
    assert working_folder.holder(tmp_path) is None, "the system releases what a process held"
