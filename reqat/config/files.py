"""Reading and writing files so that a fault ends in one line: the file, what is wrong with it, and the remedy.

Two halves. *Reading*: :func:`read_text`, :func:`read_json`, :func:`read_yaml` return what is in a file or raise a
:class:`~reqat.config.errors.ReqatError`; whoever reads a file that a user may have touched goes through them.
*Writing*: a file or folder appears under its name whole or not at all (:func:`write_file`, :func:`install`), one
process at a time (:func:`exclusive`). What may be replaced at all is the business of :mod:`reqat.config.targets`.
:func:`explain` turns any ``OSError`` into a ``ReqatError``; the command line does so for those that nobody caught.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from reqat.config.errors import MissingFileError, ReqatError

_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_SHOWN = 300  # characters of a path in a message
_NAME_BYTES = 180  # of a neighbour's name, which gets a suffix; file systems take 255
_OLD = "old"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # <fcntl.h>, <linux/fs.h>
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
    errno.ELOOP: "a link is in the way; remove it, or name another place",
    errno.EFBIG: "the file would be larger than is allowed here; raise the limit (ulimit -f), or write elsewhere",
    errno.EXDEV: "it lies on another file system; name a place on the same one",
    errno.EBUSY: "it is in use; name another place",
    errno.ETXTBSY: "it is in use; name another place",
    errno.ENOLCK: "the file system cannot lock files; name a place on another one",
    errno.EOPNOTSUPP: "the file system cannot do this; name a place on another one",
    errno.ESTALE: "the network file system has lost it; mount it again",
    errno.EPIPE: "the program that read it has ended",
    errno.EIO: "the device reports an input/output error; check the disk",
}


def explain(error: Exception, path: Path | str | None = None) -> ReqatError:
    """The `ReqatError` for an ``OSError``: the file (the error's own, else ``path``), what is wrong, and the remedy.

    Also for what libraries in other languages raise in its place (see :func:`os_error`). An error that speaks in words
    alone, without an errno, keeps them.
    """
    if isinstance(error, ReqatError):
        return error
    found = os_error(error) or OSError(str(error))
    file = found.filename2 if found.filename2 is not None else found.filename
    if isinstance(file, bytes):
        file = os.fsdecode(file)
    place = _shortened(str(file if isinstance(file, str | os.PathLike) else path if path is not None else "a file"))
    remedy = _REMEDIES.get(found.errno) if found.errno is not None else None
    if remedy is not None:
        return ReqatError(f"{place}: {remedy}.")
    reason = " ".join((found.strerror or str(found) or type(error).__name__).split())
    if isinstance(error, FileNotFoundError) and error.errno is None:  # worded by ourselves, with its remedy
        return ReqatError(reason)
    return ReqatError(f"{place}: {reason}; check the path and the disk.")


def os_error(error: BaseException) -> OSError | None:
    """The ``OSError`` that an exception is or tells of, None if it is about something else.

    safetensors, tokenizers and others written in Rust raise exceptions of their own that only say `... (os error 28)`;
    some libraries raise an ``OSError`` without an errno.
    """
    if isinstance(error, ReqatError) or not isinstance(error, Exception):
        return None
    text = str(error)
    if isinstance(error, OSError):
        if error.errno is not None:
            return error
        number = next((n for n in _REMEDIES if os.strerror(n).lower() in text.lower()), None)
        stated = _OS_ERROR.search(text)
        number = int(stated[1]) if stated else number
        return error if number is None else OSError(number, text)
    stated = _OS_ERROR.search(text)
    return OSError(int(stated[1]), text) if stated else None


def _shortened(place: str) -> str:
    """A path that fits on one line: without line breaks, and both ends of one that is too long for the system."""
    place = "".join(c if c.isprintable() else repr(c)[1:-1] for c in place)
    return place if len(place) <= _SHOWN else f"{place[: _SHOWN // 2]}[...]{place[-_SHOWN // 2 :]}"


@contextlib.contextmanager
def explaining(path: Path | str | None = None) -> Iterator[None]:
    """Raise the `ReqatError` of :func:`explain` for any ``OSError`` in the body."""
    try:
        yield
    except OSError as error:
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


def sha256(path: Path) -> str:
    """sha256 of a file, in hex. Raises `ReqatError` if it cannot be read."""
    with explaining(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    """The value in a JSON text. ``where`` names the file (and line) in errors.

    Raises `ReqatError` for what is not JSON, for duplicate keys in an object, and for nesting or numbers beyond what
    Python reads.
    """
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
def exclusive(lock: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Hold an exclusive lock on the file ``lock``, created here and removed at the end. The system
    releases it however the process ends.

    Raises `ReqatError` naming ``what`` at once if another process holds it (``wait``: waits for it instead), or if the
    file cannot be made.
    """
    from filelock import FileLock, Timeout

    held = FileLock(lock, fallback_to_soft=False)  # a soft lock would outlive a killed process
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held.acquire(blocking=wait)
    except Timeout:
        raise ReqatError(f"{what}: another process is making it; wait for it, or end it.") from None
    except OSError as error:
        made = error.filename is None or os.path.lexists(error.filename)
        raise explain(error if made else OSError(error.errno, error.strerror), lock.parent) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            lock.unlink()  # while it is held: whoever waits for it sees that its file is gone, and makes another
        held.release()


def beside(path: Path, suffix: str) -> Path:
    """A hidden neighbour of ``path``: its name with ``suffix``, shortened where the file system would not take it."""
    name = path.name
    if not name:
        raise ReqatError(f"{path} is the root of the file system, which is never replaced; name a folder in it.")
    if len(os.fsencode(name)) > _NAME_BYTES:
        digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:12]
        name = os.fsencode(name)[:_NAME_BYTES].decode("utf-8", "ignore") + digest
    return path.with_name(f".{name}.{suffix}")


def unique(path: Path) -> Path:
    """``path`` with this process's id and a random number, for what nobody else may use (see :func:`unique_of`)."""
    return path.with_name(f"{path.name}-{os.getpid()}-{secrets.token_hex(4)}")


def unique_of(path: Path) -> list[Path]:
    """The folders that :func:`unique` named after ``path``; links are none."""
    if not path.parent.is_dir():
        return []
    name = re.compile(re.escape(path.name) + r"-\d+-[0-9a-f]{8}")
    return [p for p in path.parent.iterdir() if name.fullmatch(p.name) and p.is_dir() and not p.is_symlink()]


def write_file(path: Path, data: str | bytes) -> None:
    """Write a file atomically and durably; text in UTF-8. Raises `ReqatError` if it cannot be written, and leaves
    nothing behind then."""
    temporary = unique(beside(path, "tmp"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(data if isinstance(data, bytes) else data.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise explain(_of(error, temporary, path), path) from error
        raise


def _of(error: OSError, temporary: Path, path: Path) -> OSError:
    """An error about the temporary file as one about the file that the user named."""
    named = error.filename is not None and os.fspath(error.filename) == os.fspath(temporary)
    return OSError(error.errno, error.strerror, os.fspath(path)) if named else error


def flush(path: Path) -> None:
    """Make a file, or the entries of a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def install(folder: Path, target: Path) -> Path | None:
    """Rename ``folder`` to ``target``; returns where the folder that stood there is now, None if there was none or an
    empty one.

    At every moment ``target`` is the old folder or the new one, where the system can exchange two names (Linux); else
    there is a moment without either, after which :func:`recover` brings the old one back. Both must lie on one file
    system. A file or link at ``target`` is not replaced (``OSError``).
    """
    old: Path | None = None
    if _empty_or_absent(target):
        os.rename(folder, target)
    elif not target.is_dir() or target.is_symlink():
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
    elif _exchange(folder, target):
        old = folder
    else:
        old = unique(beside(target, _OLD))
        os.rename(target, old)
        try:
            os.rename(folder, target)
        except OSError:
            os.rename(old, target)  # what stood there stays
            raise
    flush(target.parent)
    return old


def recover(target: Path) -> None:
    """Bring back the folder that :func:`install` had just moved away from ``target`` when its process died."""
    if not os.path.lexists(target):
        for old in unique_of(beside(target, _OLD)):
            os.rename(old, target)
            return


def _empty_or_absent(target: Path) -> bool:
    if not os.path.lexists(target):
        return True
    return target.is_dir() and not target.is_symlink() and not any(target.iterdir())


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two names in one step. False where the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(a), None, str(b))
