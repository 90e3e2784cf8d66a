"""Checks on output paths: what exists is replaced only if it is a result of reqat and `--force` was given.

Everything that writes goes through one of three functions. :func:`making` is for a folder that appears whole,
:func:`making_file` for a single file, :func:`making_files` for files that go into a folder beside others. Each checks
the target before any work is done and again before it is touched, holds a lock on it in between (of two processes the
second is refused at once), and works in a folder of its own, of which nothing is left if the work fails.

A result of ours is told from anything else by a list of its files that lies in it: `record.json`, or the list that
:func:`write_list` writes. A folder with other files in it is not replaced, whatever was asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from reqat.config.errors import ReqatError
from reqat.config.files import (
    beside,
    exclusive,
    explain,
    explaining,
    flush,
    install,
    os_error,
    recover,
    unique,
    unique_of,
    write_file,
)

Names = Callable[[Path], Collection[str]]
"""The files of a result of ours in a folder, by their paths within it. Raises `ReqatError` saying what else it is."""

LIST = ".reqat-files.json"
_LIST_SCHEMA = "reqat.files/1"
PAGE_MARK = '<meta name="generator" content="reqat view">'
"""In the head of every page that `reqat view` writes: a page may lie in the folder of traces that it shows."""
_HEAD_BYTES = 2000
_NAMED = 3


# What is there


def check_folder(target: Path, ours: Names, *, replace: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuse a ``target`` that a result folder may not be written to, before any work is done.

    It may be absent or empty; or, with ``replace``, a result of ours (``ours`` names its files) that holds nothing
    else. Never a link, a file, a checkout of git, the current folder, the home, a mount point, or a folder above or
    below one of ``inputs`` (what the result is made from). Raises `ReqatError` naming the target and the remedy.
    """
    with explaining(target):
        _check_place(target, inputs)
        if not target.is_dir() or not any(target.iterdir()):
            return
        _check_no_checkout(target)
        try:
            names = ours(target)
        except ReqatError as error:
            raise ReqatError(f"{target} is there already, and it is {error} Name another folder.") from None
        if not replace:
            raise ReqatError(
                f"{target} is there already; name another folder, or replace it with --force (Python: overwrite=True)."
            )
        if others := _others(target, names):
            raise ReqatError(
                f"{target} is a result, but other files lie in it ({_some(others)}); move them elsewhere first, or "
                "name another folder."
            )


def check_file(target: Path, ours: Callable[[Path], bool], *, replace: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuse a ``target`` that a single file may not be written to, as :func:`check_folder` does for folders. ``ours``
    says whether the file there is one that we wrote."""
    with explaining(target):
        _check_parents(target)
        if target.is_symlink():
            raise ReqatError(f"{target} is a link to {os.readlink(target)}; name that file, or remove the link.")
        if target.is_dir():
            raise ReqatError(f"{target} is a folder where a file is to be written; name a file in it.")
        if not os.path.lexists(target):
            return
        if not target.is_file():
            raise ReqatError(f"{target} is a device or a pipe, not a file; name another file.")
        if any(_same(target, given) for given in inputs):
            raise ReqatError(f"{target} is what the result is made from; name another file.")
        if not ours(target):
            raise ReqatError(f"{target} is there already, and it is no file of ours; name another file, or remove it.")
        if not replace:
            raise ReqatError(
                f"{target} is there already; name another file, or replace it with --force (Python: overwrite=True)."
            )


def never(path: Path) -> bool:
    """For files that are never replaced."""
    return False


def _check_place(target: Path, inputs: Iterable[Path]) -> None:
    _check_parents(target)
    if target.is_symlink():
        raise ReqatError(f"{target} is a link to {os.readlink(target)}; name that folder, or remove the link.")
    if os.path.lexists(target) and not target.is_dir():
        raise ReqatError(f"{target} is a file, not a folder; name another place, or remove it.")
    here = target.resolve()
    for given in inputs:
        other = given.resolve()
        if here == other or here in other.parents or other in here.parents:
            how = "is" if here == other else "holds" if here in other.parents else "lies in"
            raise ReqatError(f"{target} {how} {given}, which the result is made from; name a folder apart from it.")
    if not target.is_dir():
        return
    for special, what in ((Path.cwd(), "the current folder"), (_home(), "your home")):
        if special is not None and (here == special.resolve() or here in special.resolve().parents):
            how = "is" if here == special.resolve() else "holds"
            raise ReqatError(f"{target} {how} {what}, which is never replaced; name a new folder.")
    if os.path.ismount(target):
        raise ReqatError(f"{target} is a mount point, which is never replaced; name a folder in it.")


def _check_parents(target: Path) -> None:
    """Refuse a target below a file: no folder can be made there."""
    for parent in target.parents:
        if os.path.lexists(parent):
            if not parent.is_dir():
                raise ReqatError(f"{target} would lie in {parent}, which is a file; name another place.")
            return


def _check_no_checkout(target: Path) -> None:
    if os.path.lexists(target / ".git"):
        raise ReqatError(f"{target} is a checkout of git, which is never replaced; name a new folder.")


def _home() -> Path | None:
    try:
        return Path.home()
    except RuntimeError:
        return None


def _same(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve()


def _files(folder: Path) -> list[str]:
    """Every file and link below a folder, by its path within it; links are not followed."""
    found = []
    for where, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(where, name))]
        found += [Path(where, name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(found)


def _others(folder: Path, names: Collection[str]) -> list[str]:
    """Files in a folder that are not among ``names`` and are no pages of `reqat view`."""
    return [name for name in _files(folder) if name not in names and not is_page(folder / name)]


def is_page(path: Path) -> bool:
    """Whether a file is a page that `reqat view` wrote."""
    try:
        if path.suffix != ".html" or path.is_symlink():
            return False
        with path.open("rb") as file:
            return PAGE_MARK.encode() in file.read(_HEAD_BYTES)
    except OSError:
        return False


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


# Making


@contextlib.contextmanager
def making(
    target: Path,
    ours: Names,
    *,
    replace: bool = False,
    inputs: Iterable[Path] = (),
    partial: Path | None = None,
    set_aside: bool = False,
) -> Iterator[Path]:
    """A new, empty folder to work in; if the body succeeds, it is renamed to ``target``.

    Args:
        target: what may be there, see :func:`check_folder`. At every moment it is the old folder or the new one.
        ours: names the files of an old result.
        replace: whether an old result may be replaced.
        inputs: files and folders that the result is made from.
        partial: the working folder is named after this path, on the same file system (default: beside the target).
        set_aside: for places of our own (``build/``): what is there need not be a result; files that the new result
            does not have are kept, under another name beside it, and a warning says so.

    Raises `ReqatError` where the target may not be written to, another process is making it, or the system refuses to
    write; nothing is left behind then but what was there.
    """
    inputs = list(inputs)
    target = Path(os.path.abspath(target))
    partial = beside(target, "partial") if partial is None else partial

    def check() -> None:
        with explaining(target):
            _check_parents(partial)
            if set_aside:
                _check_place(target, inputs)
                if target.is_dir():
                    _check_no_checkout(target)
            else:
                check_folder(target, ours, replace=replace, inputs=inputs)

    check()
    with _parents(target, partial), exclusive(beside(target, "lock"), str(target)):
        with explaining(target):
            recover(target)
        check()
        for stale in unique_of(partial):  # of a process that died: the lock is ours
            shutil.rmtree(stale, ignore_errors=True)
        work = unique(partial)
        try:
            with _spoken_of(work, target):
                work.mkdir()
                yield work
            try:
                check()
            except ReqatError as error:  # hours of work are not thrown away because something came into the way
                os.rename(work, kept := _free(target, "made"))
                raise ReqatError(f"{error} What was made is in {kept}.") from None
            with explaining(target):
                old = install(work, target)
            if old is not None:
                _dispose(old, target, ours)
        finally:
            shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def making_file(
    target: Path, ours: Callable[[Path], bool], *, replace: bool = False, inputs: Iterable[Path] = ()
) -> Iterator[Callable[[str | bytes], None]]:
    """A function that writes the file ``target``, whole or not at all; to be called at the end of the body.

    See :func:`check_file` for what may be there. Raises `ReqatError` as :func:`making` does.
    """
    inputs = list(inputs)
    target = Path(os.path.abspath(target))

    def write(data: str | bytes) -> None:
        check_file(target, ours, replace=replace, inputs=inputs)
        write_file(target, data)

    check_file(target, ours, replace=replace, inputs=inputs)
    with _parents(target), exclusive(beside(target, "lock"), str(target)):
        yield write


@contextlib.contextmanager
def making_files(folder: Path, *, replace: bool = False, own: bool = False) -> Iterator[Path]:
    """An empty folder to write files into; if the body succeeds, all of them are moved into ``folder``, where other
    files may lie.

    A file there is replaced if it is the one that we wrote before (a list in the folder says so); if it was changed
    since, only with ``replace``; never if somebody else wrote it. In a folder of our own (``own``: in ``build/``) any
    file of the same name is replaced, and no list is kept.

    Raises `ReqatError` naming the first file that may not be replaced; nothing is changed then.
    """
    folder = Path(os.path.abspath(folder))
    with explaining(folder):
        _check_parents(folder)
        if os.path.lexists(folder) and not folder.is_dir():
            raise ReqatError(f"{folder} is a file, not a folder; name another place, or remove it.")
    partial = folder / ".reqat-partial"
    with _parents(partial):
        work = unique(partial)
        try:
            with _spoken_of(work, folder):
                work.mkdir()
                yield work
            # Tables, studies and benchmarks of one tier go into one folder at the same time: wait for one another.
            with exclusive(folder / ".reqat-lock", str(folder), wait=True), _spoken_of(work, folder):
                for stale in unique_of(partial):
                    if stale != work and not _alive(stale):
                        shutil.rmtree(stale, ignore_errors=True)
                _move_in(work, folder, replace, own)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _move_in(work: Path, folder: Path, replace: bool, own: bool) -> None:
    listed = {} if own else _read_list(folder, missing={})
    names = _files(work)
    for name in names:
        target = folder / name
        if not own and target.is_file() and _digest(target) == _digest(work / name):
            continue
        check_file(target, lambda path, name=name: own or name in listed, replace=True)  # type: ignore[misc]
        changed = not own and target.is_file() and _digest(target) != listed[name].get("sha256")
        if changed and not replace:
            raise ReqatError(
                f"{target} was changed since it was written; name another folder, or replace it with --force."
            )
    for name in names:
        listed = listed | {name: {"sha256": _digest(work / name)}}
    if not own:
        write_file(folder / LIST, _list_text("files", listed))  # first: what is not yet moved in is not there
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(work / name, folder / name)
    flush(folder)


def _dispose(old: Path, target: Path, ours: Names) -> None:
    """Remove what a new result replaced, if all of it belonged to the old one or has a successor; else keep it."""
    names = set(_files(target))
    with contextlib.suppress(ReqatError, OSError):
        names |= set(ours(old))
    others = _others(old, names)
    if not others:
        shutil.rmtree(old, ignore_errors=True)
        return
    os.rename(old, aside := _free(target, "aside"))
    print(f"reqat: warning: {target} held files of others ({_some(others)}); they are in {aside} now.", file=sys.stderr)


def _free(target: Path, word: str) -> Path:
    """A name beside the target that nothing has."""
    n = 1
    while os.path.lexists(path := target.with_name(f"{target.name}.{word}-{n}")):
        n += 1
    return path


@contextlib.contextmanager
def _parents(*targets: Path) -> Iterator[None]:
    """Make the folders that targets are to lie in; if the body fails, those that were made and are empty go again."""
    made: list[Path] = []
    try:
        for target in targets:
            missing = []
            with explaining(target):
                for parent in target.parents:
                    if os.path.lexists(parent):
                        break
                    missing.append(parent)
                for parent in reversed(missing):
                    with contextlib.suppress(FileExistsError):  # another process was faster
                        parent.mkdir()
                        made.append(parent)
        yield
    except BaseException:
        for parent in reversed(made):
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


@contextlib.contextmanager
def _spoken_of(work: Path, target: Path) -> Iterator[None]:
    """Errors of the system in the body as `ReqatError` that speak of the target, not of the folder worked in."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ReqatError):
            raise
        about_files = isinstance(error, OSError) or os_error(error) is not None
        if not about_files or isinstance(error, BrokenPipeError):  # that is our output's reader
            raise
        raise ReqatError(str(explain(error, target)).replace(str(work), str(target))) from error


def _alive(path: Path) -> bool:
    """Whether the process that named a folder (`unique`) still runs."""
    try:
        os.kill(int(path.name.split("-")[-2]), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


# The list of files


def write_list(folder: Path, kind: str) -> None:
    """List all files of a folder in a file of its own, so that the folder is known as a result of ours: its `kind`,
    and the size of each file."""
    sizes = {name: {"bytes": (folder / name).lstat().st_size} for name in _files(folder)}
    write_file(folder / LIST, _list_text(kind, sizes))


def listed(kind: str, what: str) -> Names:
    """`Names` of folders that :func:`write_list` has listed as a ``kind``; ``what`` describes such a folder."""

    def names(folder: Path) -> Collection[str]:
        found = _read_list(folder, kind=kind)
        if found is None:
            raise ReqatError(f"no {what} that we wrote.")
        for name, entry in found.items():
            path = folder / name
            if os.path.lexists(path) and path.lstat().st_size != entry.get("bytes"):
                raise ReqatError(f"a {what} that was changed since it was written ({name}).")
        return {*found, LIST}

    return names


def _list_text(kind: str, files: Mapping[str, Any]) -> str:
    return json.dumps({"schema": _LIST_SCHEMA, "kind": kind, "files": files}, indent=1, sort_keys=True) + "\n"


def _read_list(folder: Path, kind: str = "files", missing: Any = None) -> Any:
    """Name -> entry of the list in a folder; ``missing`` where there is none of this kind, or not a whole one."""
    try:
        found = json.loads((folder / LIST).read_text(encoding="utf-8"))
        files = found["files"] if (found["schema"], found["kind"]) == (_LIST_SCHEMA, kind) else missing
        return {str(name): dict(entry) for name, entry in files.items()} if files is not missing else missing
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return missing


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
