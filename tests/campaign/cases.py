"""What a bad input is, how it is tried, and when its end is right.

Right is: exit code 2 and one message that names what the case says (command line), or a `ReqatError` that does
(Python); in both no traceback, no request to report a defect, and nothing left behind under the name of the result.
"""

from __future__ import annotations

import contextlib
import io
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LONGEST_MESSAGE = 3000
MOST_LINES = 8  # a file of configuration with several faults gets a line each


@dataclass(frozen=True)
class Case:
    """One bad input.

    ``prepare(folder)`` spoils what the case needs in a copy of the material. A command line has ``arguments``, a call
    of the Python API ``call(folder)``. ``says``: texts that the message must hold, each in lower or upper case
    (``a|b``: one of them).
    """

    kind: str
    name: str
    says: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    call: Callable[[Path], Any] | None = None
    prepare: Callable[[Path], None] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    raises: str = "ReqatError"
    """Name of the error that ``call`` must raise; of `reqat.formats`, which knows no `ReqatError`: "ValueError"."""


@dataclass(frozen=True)
class Verdict:
    """How a case ended; ``fault`` is empty where it ended right."""

    kind: str
    name: str
    fault: str
    message: str

    @property
    def ok(self) -> bool:
        """Whether it ended right."""
        return not self.fault


def run(case: Case, folder: Path) -> Verdict:
    """Try a case in ``folder``, a fresh copy of the material that is the working directory meanwhile."""
    before = {name: os.environ.get(name) for name in case.environment}
    here = Path.cwd()
    os.chdir(folder)
    try:
        if case.prepare is not None:
            case.prepare(folder)
        os.environ.update(case.environment)
        fault, message = _call(case, folder) if case.call is not None else _command(case)
    finally:
        os.chdir(here)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
    if not fault:
        fault = _unsaid(case.says, message)
    return Verdict(case.kind, case.name, fault, message)


def _unsaid(says: tuple[str, ...], message: str) -> str:
    if len(message) > LONGEST_MESSAGE or message.count("\n") >= MOST_LINES:
        return f"the message has {len(message)} characters in {message.count(chr(10)) + 1} lines"
    for wanted in says:
        if not any(part.lower() in message.lower() for part in wanted.split("|")):
            return f"the message does not say {wanted!r}"
    return ""


def _command(case: Case) -> tuple[str, str]:
    from reqat.cli.main import main

    before = set(_left())
    out, err, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(list(case.arguments))
        except SystemExit as end:
            code = end.code
        except BaseException:  # what escapes from main is the defect that is looked for
            err.write(traceback.format_exc())
    text = err.getvalue()
    message = text[text.find("reqat: error:") :] if "reqat: error:" in text else text[-2000:]
    message = message.removeprefix("reqat: error: ").strip()
    if "Traceback" in text or "a defect" in text or "--debug shows where" in text:
        return f"a traceback or a defect, exit code {code}", text[-2000:]
    if code == 0:
        return "accepted in silence (exit code 0)", out.getvalue()[-500:]
    if code != 2:
        return f"exit code {code}", message
    left = sorted(set(_left()) - before)
    if left:
        return f"left behind {', '.join(left[:3])}", message
    return "", message


def _left() -> Iterator[str]:
    """What may not be there after a failure: results, and files being written."""
    for path in Path().glob("out*"):
        yield str(path)
    for pattern in ("*.partial", ".*.partial", "*.tmp", ".*.tmp"):
        yield from (str(path) for path in Path().glob(pattern))


def _call(case: Case, folder: Path) -> tuple[str, str]:
    assert case.call is not None
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            got = case.call(folder)
    except Exception as error:
        names = [kind.__name__ for kind in type(error).__mro__]
        message = str(error)
        if case.raises not in names and not (case.raises == "ValueError" and isinstance(error, TypeError)):
            return f"{type(error).__name__}, not {case.raises}", traceback.format_exc()[-2000:]
        return "", message
    return f"accepted in silence: {type(got).__name__}", str(got)[:200]
