"""One kind of error for everything a user can get wrong: it names the value at fault and the remedy.

The command line prints a `ReqatError` as one line and exits with code 2; anything else is a defect of ours and keeps
its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ReqatError(ValueError):
    """Bad input, or a state that the user can mend. The message gives the offending value and the remedy."""


class MissingFileError(ReqatError, FileNotFoundError):
    """There is no file or folder where one was expected. Its text is whole: it has no errno."""


def unknown(kind: str, name: object, valid: Iterable[str], where: str = "") -> ReqatError:
    """An error for a `name` that is none of `valid`, with the closest match (if any) and the whole list."""
    options = sorted(str(option) for option in valid)
    match = difflib.get_close_matches(str(name), options, n=1, cutoff=0.5) or [
        option for option in options if option.lower() == str(name).lower()
    ]
    hint = f" Did you mean {match[0]!r}?" if match else ""
    prefix = f"{where}: " if where else ""
    return ReqatError(f"{prefix}unknown {kind} {str(name)!r}.{hint} Known: {', '.join(options) or 'none'}.")
