"""Reading and writing files so that a fault ends in one line: the file, what is wrong with it, and the remedy.

Two halves. *Reading*: :func:`read_text`, :func:`read_json`, :func:`read_yaml` return what is in a file or raise a
:class:`~reqat.config.errors.ReqatError`; whoever reads a file that a user may have touched goes through them.
*Writing*: a file or folder appears under its name whole or not at all (:func:`write_file`, :func:`install`), one
process at a time (:func:`exclusive`), and never over something that is not ours to replace (:func:`check_target`).
:func:`explain` turns any ``OSError`` into a ``ReqatError``; the command line does so for those that nobody caught.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from reqat.config.errors import MissingFileError, ReqatError

RECORD = "record.json"  # written last into every result of ours: a folder without it is none

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_REMEDIES = {
    errno.ENOSPC: "no space left there; free some disk space, or write elsewhere",
    errno.EDQUOT: "the disk quota is used up; free some space, or write elsewhere",
    errno.EACCES: "no permission; change the permissions, or name another place",
    errno.EPERM: "no permission; change the permissions, or name another place",
    errno.EROFS: "the file system is read-only; name another place",
    errno.ENAMETOOLONG: "the path is too long; name a shorter one",
    errno.ENOTDIR: "a part of this path is a file and not a folder; remove that file, or name another place",
    errno.EISDIR: "this is a folder where a file is needed; remove it, or name another place",
    errno.EEXIST: "something is there already; remove it, or name another place",
    errno.ENOTEMPTY: "the folder is not empty; remove what is in it, or name another place",
    errno.ENOENT: "no such file or folder; check the path",
    errno.EMFILE: "too many open files; raise the limit (ulimit -n) and run again",
    errno.ELOOP: "the link leads to itself; remove it",
    errno.EIO: "the device reports an input/output error; check the disk",
}


def explain(error: OSError, path: Path | str | None = None) -> ReqatError:
    """The `ReqatError` for an ``OSError``: the file (the error's own, else ``path``), what is wrong, and the remedy.

    An error without an errno (libraries in other languages raise such) keeps its own words; if these speak of space,
    permission or length, the remedy is that errno's.
    """
    file = error.filename2 if error.filename2 is not None else error.filename
    where = os.fsdecode(file) if isinstance(file, str | bytes) else str(file) if file is not None else None
    place = where if where is not None else (str(path) if path is not None else "a file")
    number = error.errno if error.errno is not None else _errno_in(str(error))
    reason = error.strerror or str(error) or type(error).__name__
    remedy = _REMEDIES.get(number) if number is not None else None
    return ReqatError(f"{place}: {remedy}." if remedy else f"{place}: {reason}; check the path and the disk.")


def _errno_in(text: str) -> int | None:
    """The errno that a message without one speaks of (`... (os error 28)`, `No space left on device`)."""
    for number in _REMEDIES:
        if f"os error {number})" in text or os.strerror(number).lower() in text.lower():
            return number
    return None


@contextlib.contextmanager
def explaining(path: Path | str | None = None) -> Iterator[None]:
    """Raise the `ReqatError` of :func:`explain` for any ``OSError`` in the body."""
    try:
        yield
    except OSError as error:
        if isinstance(error, ReqatError):
            raise
        raise explain(error, path) from error


# Reading


def read_text(path: Path, what: str = "text file", remedy: str = "check the path") -> str:
    """The text of a UTF-8 file (a byte order mark at its start is dropped).

    ``what`` names the kind of file and ``remedy`` what to do if it is absent or damaged, for the error's message.
    Raises `ReqatError` if it is absent (`MissingFileError`), unreadable or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such {what}; {remedy}.") from None
    except UnicodeDecodeError as error:
        raise ReqatError(f"{path}: not a {what}, byte {error.start} is not UTF-8 ({error.reason}); {remedy}.") from None
    except OSError as error:
        raise explain(error, path) from error


def read_json(path: Path, what: str, remedy: str) -> dict[str, Any]:
    """The object in a JSON file. Raises `ReqatError` if it is absent, unreadable, not JSON or not an object."""
    data = parse_json(read_text(path, what, remedy), str(path), what, remedy)
    if not isinstance(data, dict):
        raise ReqatError(f"{path}: not a {what}, it holds {_kind(data)} where an object is needed; {remedy}.")
    return data


def read_json_list(path: Path, what: str, remedy: str) -> list[Any]:
    """The list in a JSON file. Raises `ReqatError` if it is absent, unreadable, not JSON or not a list."""
    data = parse_json(read_text(path, what, remedy), str(path), what, remedy)
    if not isinstance(data, list):
        raise ReqatError(f"{path}: not a {what}, it holds {_kind(data)} where a list is needed; {remedy}.")
    return data


def parse_json(text: str, where: str, what: str, remedy: str) -> Any:
    """The value in a JSON text. ``where`` names the file (and line) in the `ReqatError` for what is not JSON, for a
    key that stands twice in one object, and for nesting or numbers beyond what Python reads."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except _Duplicate as error:
        raise ReqatError(f"{where}: not a {what}, the key {error.key!r} is in it twice; {remedy}.") from None
    except (ValueError, RecursionError) as error:  # a number of more than 4300 digits is a plain ValueError
        raise ReqatError(f"{where}: not a {what} ({_one_line(error)}); {remedy}.") from None


def read_yaml(path: Path, what: str = "configuration file") -> dict[str, Any]:
    """The mapping in a YAML file. Raises `ReqatError` if it is absent, unreadable, not YAML or not a mapping, or if a
    key stands in it twice (YAML would silently take the last one).
    """
    text = read_text(path, what)
    try:
        data = yaml.load(text, Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        raise ReqatError(f"{path}: not valid YAML: {_one_line(error)}") from None
    except (RecursionError, ValueError) as error:  # e.g. a date that is none
        raise ReqatError(f"{path}: not valid YAML ({_one_line(error)}); correct the file.") from None
    if not isinstance(data, dict):
        raise ReqatError(f"{path}: expected a mapping of keys, found {_kind(data)}.")
    return data


class _UniqueKeys(yaml.SafeLoader):
    """yaml.SafeLoader that refuses a key that stands twice in one mapping."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *anchor` may stand beside the keys it is overridden by
                continue
            key = self.construct_object(key_node, deep=True)
            try:
                twice = key in seen
            except TypeError:
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a word or a number", key_node.start_mark
                ) from None
            if twice:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is in the mapping twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Duplicate(Exception):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Duplicate(key)
        found[key] = value
    return found


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "nothing"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _one_line(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return " ".join(str(error).split())


# Writing


@contextlib.contextmanager
def exclusive(lock: Path, what: str) -> Iterator[None]:
    """Hold an exclusive lock on the file ``lock`` (made if need be; the system releases it however the process ends).

    Raises `ReqatError` naming ``what`` if another process holds it, or if the file cannot be opened.
    """
    with explaining(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = lock.open("a")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ReqatError(f"{what}: another process is writing it; wait for it, or end it.") from None
        yield


def write_file(path: Path, data: str | bytes) -> None:
    """Write a file atomically and durably; text in UTF-8. Raises `ReqatError` if it cannot be written, and leaves
    nothing behind then."""
    temporary = path.with_name(f".{path.name[:200]}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data if isinstance(data, bytes) else data.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise explain(error, path) from error


def flush(path: Path) -> None:
    """Make a file, or the entries of a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def install(folder: Path, target: Path) -> None:
    """Rename ``folder`` to ``target``, in place of the folder that stood there. ``folder`` must lie on the same file
    system."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        old = target.with_name(f".{target.name[:200]}.{os.getpid()}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
        try:
            os.rename(folder, target)
        except OSError:
            os.rename(old, target)  # what stood there stays
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(folder, target)
    flush(target.parent)
