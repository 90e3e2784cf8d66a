"""Data and models that package managers deliver, prepared as plain files: one module a source.

Nothing of them is in this repository and nothing is fetched here: a source is found where its package manager puts it,
or in a folder that the user names, is held to the sha256 that its package had when it was last looked at, and is
written out in a form that needs no further care. A module has a `PACKAGE` and a function ``prepare(out, given=None)``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from reqat.config.catalogue import modules_of
from reqat.config.errors import MissingFileError, ReqatError, unknown
from reqat.config.files import sha256


@dataclass(frozen=True)
class Package:
    """Where a source comes from."""

    name: str
    """As companions call it: `fashion-mnist`."""
    files: Mapping[str, str]
    """File within the package's folder -> its sha256; of a pattern (`c???`), that of all files together
    (:func:`digest_of`); empty where files state their own. The first file tells the folder."""
    places: Callable[[], Iterable[Path]]
    """Folders where its package manager puts it, likely or not."""
    install: str
    """The command that installs it."""
    licence: str
    """Of the data."""

    @property
    def variable(self) -> str:
        """Environment variable that names another folder: `REQAT_FASHION_MNIST`."""
        return f"REQAT_{self.name.upper().replace('-', '_')}"

    def find(self, given: Path | None = None) -> Path:
        """The package's folder: within that of `variable`, within `given` (None: not named), or of `places`.

        Raises `ReqatError` (`MissingFileError`) that says how to install it, or that a folder named by the user does
        not hold it.
        """
        first = next(iter(self.files))
        named = os.environ.get(self.variable)
        for folder, who in ((Path(named) if named else None, f"{self.variable}={named}"), (given, str(given))):
            if folder is None:
                continue
            found = _within(folder, first)
            if found is None:
                raise MissingFileError(
                    f"source {self.name}: {who} holds no file {first}; unpack the package there ({self.install}), or "
                    "name another folder."
                )
            return found
        for folder in self.places():
            if _is_there(folder, first):
                return folder
        raise MissingFileError(
            f"source {self.name} is not installed: {self.install}; or unpack that package anywhere and name the folder "
            f"in {self.variable}."
        )

    def checked(self, given: Path | None = None) -> Path:
        """As `find`, after every file was held to its sha256. Raises `ReqatError` naming one that is another."""
        folder = self.find(given)
        for name, wanted in self.files.items():
            found = sorted(folder.glob(name))
            if not found:
                raise ReqatError(f"source {self.name}: {folder / name} is missing; {self._again}.")
            is_pattern = any(sign in name for sign in "*?[")
            if (digest_of(found, folder) if is_pattern else sha256(found[0])) != wanted:
                raise ReqatError(
                    f"source {self.name}: {folder / name} is damaged, or of another version of the package (its sha256 "
                    f"is not {wanted[:12]}...); {self._again}."
                )
        return folder

    @property
    def _again(self) -> str:
        return f"install it again ({self.install})"


def digest_of(files: Iterable[Path], folder: Path) -> str:
    """One sha256 over names within `folder` and contents of several files, whatever their order."""
    lines = sorted(f"{sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def names() -> tuple[str, ...]:
    """Names of the sources, one a module of this package: `fashion-mnist` is `fashion_mnist.py`."""
    return tuple(name.replace("_", "-") for name in modules_of("data.packaged"))


def package_of(name: str) -> Package:
    """The package of a source. Raises `ReqatError` with the closest name if there is none."""
    return _module(name).PACKAGE  # type: ignore[attr-defined, no-any-return]


def prepare(name: str, out: Path, given: Path | None = None) -> None:
    """Write the source `name` into the folder `out`. Raises `ReqatError` if it is not installed or not whole."""
    _module(name).prepare(out, given)  # type: ignore[attr-defined]


def _module(name: str) -> object:
    if name not in names():
        raise unknown("source", name, names())
    return import_module(f"{__name__}.{name.replace('-', '_')}")


def _is_there(folder: Path, name: str) -> bool:
    return folder.is_dir() and next(folder.glob(name), None) is not None


def _within(folder: Path, name: str) -> Path | None:
    """The folder at or below `folder` that holds a file; of several, the first by name."""
    if _is_there(folder, name):
        return folder
    found = sorted(folder.rglob(name)) if folder.is_dir() else []
    return found[0].parents[name.count("/")] if found else None


# Where package managers put things.


def debian(*folders: str) -> Callable[[], list[Path]]:
    """Folders of Debian packages, by their absolute paths."""
    return lambda: [Path(folder) for folder in folders]


def python(module: str, within: str = ".") -> Callable[[], list[Path]]:
    """A folder of an installed Python package, which is not imported."""

    def places() -> list[Path]:
        found = importlib.util.find_spec(module)
        return [Path(place) / within for place in (found.submodule_search_locations or [])] if found else []

    return places


def npm(package: str) -> Callable[[], list[Path]]:
    """Folders of a package of npm: of the working folder, of NODE_PATH, and global ones."""

    def places() -> list[Path]:
        named = [Path(place) for place in os.environ.get("NODE_PATH", "").split(os.pathsep) if place]
        prefixes = (Path(sys.prefix), Path("/usr/local"), Path("/usr"), Path.home() / ".npm-global")
        roots = [Path("node_modules"), *named, *(prefix / "lib" / "node_modules" for prefix in prefixes)]
        return [root / package for root in roots]

    return places
