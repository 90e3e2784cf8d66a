"""The `reqat` command: verbs, shared options, and how errors end.

Whatever a user can get wrong ends with one line on standard error and exit code 2; `--debug` shows the traceback. So
does whatever the system refuses: a full disk, a missing permission, a path that is too long. Interrupting ends with
exit code 130 and says how to go on. torch is imported by the verbs that compute, after the number of threads is known.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from typing import Any

import typer

# Importing a module of verbs registers them.
import reqat.cli.bench
import reqat.cli.companion
import reqat.cli.doctor
import reqat.cli.entropy
import reqat.cli.export
import reqat.cli.inspect
import reqat.cli.intervene
import reqat.cli.lm_eval
import reqat.cli.reset
import reqat.cli.results
import reqat.cli.run
import reqat.cli.serve
import reqat.cli.study
import reqat.cli.traces
import reqat.cli.train
import reqat.cli.view  # noqa: F401
from reqat.cli.app import INTERRUPTED, app, session
from reqat.cli.arguments import check_environment, check_text
from reqat.config.errors import ReqatError
from reqat.config.files import explain, os_error
from reqat.config.launch import launched

READER_GONE = 141
_NO_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")  # as torch and CUDA say it


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Exits with 0; 2 for what a user can mend; 130 if interrupted; 1 for a defect; 141, as
    other commands do, if whoever read its output has ended (`reqat plan | head`)."""
    if arguments is None and sys.getfilesystemencoding().lower() != "utf-8":
        _restart_in_utf8()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot show must not end the run
            stream.reconfigure(errors="backslashreplace")
    given = sys.argv[1:] if arguments is None else arguments
    session.debug = "--debug" in given
    try:
        check_text(given)
        check_environment()
        code = app(given, standalone_mode=False)
        if code == INTERRUPTED:  # typer turns Ctrl-C into this
            raise KeyboardInterrupt
        _print_all()
    except BrokenPipeError:
        _drop_output()
        sys.exit(READER_GONE)
    except SystemExit as end:
        # typer catches a broken pipe itself and ends with 1, which is our code for a defect.
        sys.exit(READER_GONE if type(sys.stdout).__name__ == "PacifyFlushWrapper" else end.code)
    except (KeyboardInterrupt, typer.Abort):
        _exit(INTERRUPTED, "interrupted; nothing half-written counts as done. The same command goes on from there.")
    except Exception as error:
        meant = _mendable(error)
        if meant is not None:
            if session.debug:
                raise
            _exit(2, str(meant))
        show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
        if callable(show) and code is not None:  # a usage error, found by typer
            if not given:  # then it is the help
                show()
                sys.exit(code)
            verb = getattr(getattr(error, "ctx", None), "info_name", None)
            _exit(code, f"{_usage(error, given)} (reqat {f'{verb} ' if verb in given else ''}--help)")
        traceback.print_exc()
        _exit(1, f"{type(error).__name__}: {error} - a defect; please report it with the lines above.")
    sys.exit(code if isinstance(code, int) else 0)


def _print_all() -> None:
    """Write out what is still buffered, while an error can be told: at exit Python only complains of it."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop_output()
        raise explain(error, "standard output") from error


def _drop_output() -> None:
    """Let standard output lead nowhere, so that nothing fails at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _mendable(error: Exception) -> ReqatError | None:
    """What to tell a user who can mend it: bad input, what the system refuses, too little memory. None for a defect."""
    if isinstance(error, ReqatError):
        return error
    if os_error(error) is not None or isinstance(error, OSError):  # libraries in Rust have errors of their own for it
        return explain(error)
    if isinstance(error, MemoryError) or any(words in str(error).lower() for words in _NO_MEMORY):
        what = " ".join(str(error).split())[:200] or "no word of how much"
        return ReqatError(f"out of memory ({what}); lower batch rows, tokens or problems, or take a larger machine.")
    return None


def _usage(error: Any, given: list[str]) -> str:
    """What typer found wrong with the arguments, with the value that was given."""
    text = str(error.format_message()).replace("Value error, ", "")
    for option in getattr(getattr(error, "param", None), "opts", ()):
        values = [after for before, after in zip(given, given[1:], strict=False) if before == option]
        values += [argument.removeprefix(f"{option}=") for argument in given if argument.startswith(f"{option}=")]
        if values and repr(values[-1]) not in text:
            text = text.replace("Invalid value for", f"Invalid value {values[-1][:80]!r} for")
    return text


def _restart_in_utf8() -> None:
    """Run this command again in Python's UTF-8 mode: under LC_ALL=C with that turned off, paths beyond ASCII could
    neither be printed nor be written into records."""
    os.environ["PYTHONUTF8"] = "1"  # for processes that jobs start, too
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def _exit(code: int, message: str) -> None:
    which = ""
    with contextlib.suppress(ReqatError):  # which is what is being said
        rank, size, _ = launched()
        which = f" (process {rank} of {size})" if size > 1 else ""
    print(f"reqat: error{which}: {message}", file=sys.stderr)
    sys.exit(code)
