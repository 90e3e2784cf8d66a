"""Make the environment that everything else runs in, from exact pins, with nothing but Python's standard library.

Installing is three steps, because one resolver run cannot do it: torch's GPU build insists on an older triton than
the one the kernels need.

1. the pins of ``requirements.lock``, exactly and without resolving anything (``--no-deps``);
2. what the torch that came (CPU or CUDA build, whichever the package index serves this machine) wants besides: the
   CUDA build's runtime libraries, at the versions that torch itself names; nothing for a CPU build;
3. this project, as a link, which gives the ``reqat`` command.

A stamp, written last, says that all three are done for these very pins; without it the next call starts again.

    python tools/environment.py check            is this interpreter good enough? says what to install if not
    python tools/environment.py create .venv     make or update the environment (idempotent; safe to interrupt)
    python tools/environment.py lock             requirements.in -> requirements.lock and environment.yml
"""

# No syntax or module newer than Python 3.7 here: an old interpreter must get as far as saying what is wrong with it.
from __future__ import annotations

import argparse
import collections
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
TOP_LEVEL = ROOT / "requirements.in"
CONDA = ROOT / "environment.yml"
OLDEST_PYTHON = (3, 11)
# Between lines on how far pip is.
EVERY_S = 15
STAMP = ".reqat-complete-"
# Runtime libraries of torch's CUDA build: torch's own metadata pins them, and only where that build is installed.
TORCH_OWN = re.compile(r"^(nvidia|cuda)[-_]")


def main() -> None:
    """Command line of this file; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("check")
    verbs.add_parser("create").add_argument("folder", type=Path)
    verbs.add_parser("torch-libraries")
    verbs.add_parser("lock")
    arguments = parser.parse_args()
    try:
        if arguments.verb == "torch-libraries":  # runs inside the environment, where `packaging` is
            for library in torch_libraries():
                print(library)
            return
        if arguments.verb == "create" and stamp_of(arguments.folder).exists():
            return
        check_python()
        if arguments.verb == "create":
            create(arguments.folder.absolute())
        elif arguments.verb == "lock":
            lock()
    except Problem as problem:
        sys.exit(f"error: {problem}")
    except subprocess.CalledProcessError as failure:
        command = " ".join(str(word) for word in failure.cmd)
        sys.exit(f"error: exit code {failure.returncode} from: {command}\nOnce mended, the same `make` resumes.")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same `make` starts again where it can")


class Problem(Exception):
    """Something that the user can mend; the message says how."""


def check_python() -> None:
    """Raise Problem unless this interpreter can make the environment: version, venv, headers, a C compiler."""
    have, oldest = ".".join(map(str, sys.version_info[:2])), ".".join(map(str, OLDEST_PYTHON))
    if sys.version_info < OLDEST_PYTHON:
        raise Problem(
            f"Python {oldest} or newer is needed; {sys.executable} is {have}. Install one (Debian, Ubuntu: `sudo apt "
            f"install python{oldest} python{oldest}-venv python{oldest}-dev`) or name one: `make env PYTHON=...`."
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        raise Problem(
            f"{sys.executable} has no working venv module. Debian, Ubuntu: `sudo apt install python{have}-venv`."
        ) from None
    # One pin, pycosat (through reasoning-gym), comes as C source on every platform.
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        raise Problem(f"Python.h for {sys.executable} is missing. Debian, Ubuntu: `sudo apt install python{have}-dev`.")
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    if not (shutil.which(compiler) or shutil.which("cc") or shutil.which("gcc")):
        raise Problem("no C compiler found. Debian, Ubuntu: `sudo apt install gcc`.")


def create(folder: Path) -> None:
    """Make or update the environment in ``folder`` and stamp it. Returns at once where the stamp is already there.

    ``folder`` may be any environment with its own pip (a conda one too). A virtual environment that is unfinished or
    no longer works is made afresh; nothing else is ever deleted.
    """
    if os.pathsep in str(folder):
        raise Problem(
            f"{folder}: no environment can lie in a folder with '{os.pathsep}' in its path, which separates folders in "
            "PATH. Move the clone, or name another place: `make env VENV=...`."
        )
    stamp, unfinished = stamp_of(folder), folder / ".reqat-unfinished"
    with only_one_at_a_time():
        if stamp.exists():
            return
        ours = (folder / "pyvenv.cfg").exists()
        if ours and (unfinished.exists() or not works(folder)):
            if folder.is_symlink():
                raise Problem(f"{folder} is a link to an environment of another checkout; remove it first")
            print(f"{folder} is unfinished or was moved here; starting it afresh", flush=True)
            shutil.rmtree(folder)
        if not (folder / "bin" / "python").exists():
            print(f"Making {folder} with Python {sys.version.split()[0]}", flush=True)
            folder.mkdir(parents=True, exist_ok=True)
            unfinished.touch()
            run(sys.executable, "-m", "venv", folder)
        unfinished.touch()
        for old in folder.glob(f"{STAMP}*"):
            old.unlink()
        install(folder / "bin" / "python")
        stamp.touch()
        unfinished.unlink()
        print(f"Ready: {folder}", flush=True)


def install(python: Path) -> None:
    """The three steps of the module's docstring, with the pip that belongs to ``python``."""
    pins = read_pins(LOCK.read_text())
    print(f"Installing {len(pins)} pinned packages; the first time takes some minutes", flush=True)
    # Source distributions are built with the pinned setuptools, not with whatever is newest on the day.
    built_here = ("--no-deps", "--no-build-isolation", "--use-pep517")
    pip(python, "--no-deps", f"setuptools=={pins['setuptools']}")
    pip(python, *built_here, "-r", LOCK)
    libraries = subprocess.check_output([str(python), __file__, "torch-libraries"], text=True).split("\n")[:-1]
    if libraries:
        print(f"Installing the CUDA libraries of torch {pins['torch']}", flush=True)
        pip(python, "--no-warn-conflicts", "-c", LOCK, *libraries)  # that torch wants another triton is known
    print("Compiling this project's kernels (C++; some minutes on a busy machine)", flush=True)
    pip(python, *built_here, "-e", ".")  # run() works in ROOT, whose path may hold what pip reads as options of a link
    warm_up(python)


def warm_up(python: Path) -> None:
    """Import what commands and jobs import, so that Python compiles it now, while somebody expects to wait, and not in
    the first command or in every worker of the tests at once. Nothing depends on it: an import that fails says so where
    it is needed."""
    print("Compiling the Python modules that are used, once (half a minute)", flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    program = "from reqat.cli.warm import import_everything; import_everything()"
    command = [str(python), "-W", "ignore", "-c", program]
    with contextlib.suppress(OSError):
        subprocess.run(command, cwd=str(ROOT), env=environment, stderr=subprocess.DEVNULL)


def torch_libraries() -> list[str]:
    """Requirements of the installed torch that the lock does not hold, as pip arguments."""
    from importlib.metadata import requires

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    locked = {canonicalize_name(name) for name in read_pins(LOCK.read_text())}
    wanted = [Requirement(line) for line in requires("torch") or []]
    wanted = [item for item in wanted if item.marker is None or item.marker.evaluate({"extra": ""})]
    for item in wanted:
        item.marker = None  # it holds here; what is left prints as pip takes it: name[extras]==version
    return [str(item) for item in wanted if canonicalize_name(item.name) not in locked]


def lock() -> None:
    """Resolve requirements.in, installing nothing, and write requirements.lock and environment.yml from the answer."""
    lines = [line.strip() for line in TOP_LEVEL.read_text().splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    alone = [line for line in lines if line.endswith("# no-deps")]
    resolved = [line for line in lines if line not in alone]
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        pip(Path(sys.executable), "--dry-run", "--ignore-installed", "--report", report, *resolved)
        answer = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    pins = read_pins("\n".join([f"{item['name']}=={item['version']}" for item in answer] + alone))
    pins = {name: version for name, version in pins.items() if not TORCH_OWN.match(name)}
    LOCK.write_text(lock_text(pins))
    CONDA.write_text(conda_text(pins))


def read_pins(text: str) -> dict[str, str]:
    """``name==version`` lines as a dictionary, in their order; a local version label (``+cpu``) is dropped."""
    pins = {}
    for line in text.splitlines():
        line = line.split("#")[0].strip()
        if not line:
            continue
        name, equals, version = line.partition("==")
        if not equals:
            raise Problem(f"not an exact pin: {line!r}; write name==version")
        pins[name] = version.partition("+")[0]
    return pins


def lock_text(pins: dict[str, str]) -> str:
    """requirements.lock for these pins."""
    header = """\
# Exact pins of the whole environment; written by `make lock` from requirements.in, do not edit.
# `make env` (tools/environment.py) installs them without resolving: pip install --no-deps -r requirements.lock
"""
    return header + "".join(f"{name}=={pins[name]}\n" for name in sorted(pins, key=str.lower))


def conda_text(pins: dict[str, str]) -> str:
    """environment.yml with the same pins, for conda users."""
    header = """\
# The pins of requirements.lock for conda users; written by `make lock`, do not edit.
#   PIP_NO_DEPS=1 conda env create -f environment.yml    (the pins are complete; resolving them again would fail)
#   conda activate reqat
#   make figures VENV="$CONDA_PREFIX"                    (adds torch's CUDA libraries where needed, and reqat itself)
name: reqat
channels:
  - conda-forge
dependencies:
  - python=3.11
  - pip
  - pip:
"""
    return header + "".join(f"      - {name}=={pins[name]}\n" for name in sorted(pins, key=str.lower))


def stamp_of(folder: Path) -> Path:
    """Where the stamp lies; its name hashes what the environment depends on: pins, what is built, our place."""
    digest = hashlib.sha256(str(ROOT).encode())
    digest.update(b"native" if shutil.which(os.environ.get("CXX") or "g++") else b"")  # one that came later is used
    native = sorted((ROOT / "kernels" / "reqat_kernels" / "native").glob("*.[ch]*"))
    for file in (LOCK, ROOT / "pyproject.toml", ROOT / "setup.py", Path(__file__), *native):
        digest.update(file.read_bytes())
    return folder / f"{STAMP}{digest.hexdigest()[:16]}"


def works(folder: Path) -> bool:
    """Whether a virtual environment still runs and stands where it was made (its scripts hold absolute paths)."""
    try:
        subprocess.run([str(folder / "bin" / "python"), "-c", ""], check=True)
        return str(folder / "bin") in (folder / "bin" / "pip").read_text()
    except (OSError, subprocess.CalledProcessError):
        return False


@contextlib.contextmanager
def only_one_at_a_time():
    """Hold a lock that the system gives back however the process ends: two `make` calls may start together."""
    with open(ROOT / ".venv.lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print("Waiting for another `make env` to finish", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def pip(python: Path, *arguments: object) -> None:
    """``pip install``, which takes minutes on a slow network: in place of its lines, hundreds of them, one every
    :data:`EVERY_S` seconds says how far it is. What pip complains of is shown as it comes, and where it fails its last
    lines, too. Index, proxy and cache stay as the user configured them.

    Modules are compiled when first imported (:func:`warm_up`): compiling all of 190 packages is 40% of the work of
    installing them.
    """
    options = ["--no-compile", "--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    words = [str(word) for word in (python, "-m", "pip", "install", *options, *arguments)]
    progress, ended = PipProgress(), threading.Event()

    def speak() -> None:
        while not ended.wait(EVERY_S):
            print(progress.line(), flush=True)

    with subprocess.Popen(
        words, stdout=subprocess.PIPE, universal_newlines=True, errors="replace", cwd=str(ROOT), env=clean_environment()
    ) as process:
        threading.Thread(target=speak, daemon=True).start()
        try:
            for line in process.stdout or ():
                progress.note(line)
        except BaseException:
            process.kill()
            raise
        finally:
            ended.set()
    if process.returncode:
        print("\n".join(progress.last), flush=True)
        raise subprocess.CalledProcessError(process.returncode, words)
    print(progress.line(), flush=True)


class PipProgress:
    """How far a run of ``pip install`` is, from its own lines on standard output."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.found = 0
        """Packages that pip has looked up, and fetched but for the last."""
        self.doing = "looking for packages"
        self.last: collections.deque[str] = collections.deque(maxlen=20)

    def note(self, line: str) -> None:
        """Take a line of pip's into account."""
        text = line.strip()
        self.last.append(text)
        for start, doing in (
            ("Collecting ", "fetching {}"),
            ("Processing ", "fetching {}"),
            ("Obtaining ", "fetching {}"),
            ("Requirement already satisfied: ", "{} is there"),
            ("Building wheel for ", "building {}"),
            ("Installing collected packages: ", "unpacking them"),
            ("Successfully installed ", "done"),
        ):
            if text.startswith(start):
                self.found += doing.startswith(("fetching", "{}"))
                self.doing = doing.format(re.split(r"[ =<>;,[]", text[len(start) :] + " ")[0])

    def line(self) -> str:
        """``  57 looked up, 1 min 20 s: fetching torch``"""
        minutes, seconds = divmod(round(time.monotonic() - self.began), 60)
        took = f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
        return f"  {self.found} looked up, {took}: {self.doing}"


def run(*command: object) -> None:
    """Run a command."""
    words = [str(word) for word in command]
    subprocess.run(words, check=True, cwd=str(ROOT), env=clean_environment())


def clean_environment() -> dict[str, str]:
    """This process's, free of settings that would send an installation elsewhere."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_NO_DEPS")
    clean = {name: value for name, value in os.environ.items() if name not in hidden}
    return {**clean, "PYTHONNOUSERSITE": "1"}


if __name__ == "__main__":
    main()
