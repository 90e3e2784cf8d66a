"""The error type for everything that a user can correct: it names the offending value and the remedy.

The command line prints a `ReqatError` as one line and exits with code 2; anything else is a defect of ours and keeps
its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ReqatError(ValueError):
    """Bad input, or a state that the user can mend. The message gives the offending value and the remedy."""


class MissingFileError(ReqatError, FileNotFoundError):
    """A file or folder is missing. The message is complete by itself; there is no errno."""


def unknown(
    kind: str, name: object, valid: Iterable[object], where: str = "", remedy: str = "", closest: int = 1
) -> ReqatError:
    """An error for a `name` that is none of `valid`: the `closest` matches (if any), and the whole list or a
    `remedy`."""
    return ReqatError(unknown_text(kind, name, valid, where, remedy, closest))


def unknown_text(
    kind: str, name: object, valid: Iterable[object], where: str = "", remedy: str = "", closest: int = 1
) -> str:
    """The message of :func:`unknown`, for errors of another type. Upper and lower case count as close."""
    options = sorted(str(option) for option in valid)
    by_upper = {option.upper(): option for option in options if option != str(name)}
    close = difflib.get_close_matches(str(name).upper(), by_upper, n=closest, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(by_upper[one]) for one in close)}?" if close else ""
    prefix = f"{where}: " if where else ""
    known = f"Known: {', '.join(options) or 'none'}."
    return f"{prefix}unknown {kind} {name!r}.{hint} {remedy or known}"
