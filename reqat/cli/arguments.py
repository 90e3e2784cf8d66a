"""Types and checks of command-line options, applied before anything is loaded.

A check is a typer callback (``typer.Option(..., callback=arguments.precision)``): it gets the value as given and raises
a `ReqatError` that names option and value. Bounds of whole numbers stand beside the options (``min=1,
max=arguments.MOST``); so large a number is a slip of the finger, and would fill the memory or never end.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from reqat.config.catalogue import EXPORT_FORMATS, PTQ_METHODS
from reqat.config.decoding import Threshold
from reqat.config.errors import ReqatError, unknown
from reqat.config.policy import Decoding
from reqat.config.precision import check_rotation, family
from reqat.config.ptq import settled
from reqat.config.vocabulary import check_embeddings, check_head
from reqat_kernels.isas import CHOICES

MOST = 10**9
LONGEST = 2**24
"""Rows, tokens, bins: the length of an axis."""
_SEEDS_END = 2**63

T = TypeVar("T", int, float)
Element = Literal["E1M2", "E2M1"]
GlobalScale = Literal["dynamic", "row", "static"]


def numbers(text: str, option: str, kind: type[T]) -> list[T]:
    """Numbers between commas, each once. Raises `ReqatError` naming the option."""
    try:
        found = [kind(part) for part in text.split(",")]  # type: ignore[call-arg]
    except ValueError:
        raise ReqatError(
            f"{option} {_shown(text)}: write {'whole ' * (kind is int)}numbers with commas, 0,1,2."
        ) from None
    if len(set(found)) < len(found):
        raise ReqatError(f"{option} {_shown(text)}: a number stands twice; give each once.")
    return found


def seed_list(text: str, option: str = "--seeds") -> list[int]:
    """Seeds between commas, each once. Raises `ReqatError` naming the option."""
    found = numbers(text, option, int)
    for seed in found:
        if not 0 <= seed < _SEEDS_END:
            raise ReqatError(f"{option} {_shown(text)}: a seed is a whole number from 0 up to 2^63 - 1.")
    return found


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:60]}...{text[-20:]}"


def _callback(check: Callable[[Any, str], Any]) -> Callable[..., Any]:
    """A typer callback that runs ``check(value, option)`` on a value, or each of several, that was given."""

    def callback(param: typer.CallbackParam, value: Any) -> Any:
        option = param.opts[0] if param.opts[0].startswith("-") else str(param.metavar or param.name).upper()
        for one in value if isinstance(value, list | tuple) else [value]:
            if one is not None:
                check(one, option)
        return value

    return callback


def _reading(read: Callable[[Any], Any]) -> Callable[..., Any]:
    """A typer callback for values that ``read`` accepts; its error is prefixed with the option."""

    def check(value: Any, option: str) -> None:
        try:
            read(value)
        except ReqatError as error:
            raise ReqatError(f"{option}: {error}") from None

    return _callback(check)


def _between(low: float, high: float, closed: str, wanted: str) -> Callable[..., Any]:
    """A typer callback for numbers from low to high; ``closed`` holds "l" or "h" where that end belongs to them."""

    def check(value: float, option: str) -> None:
        inside = (low < value or ("l" in closed and low == value)) and (
            value < high or ("h" in closed and high == value)
        )
        if not inside:  # NaN neither
            raise ReqatError(f"{option} {value}: {wanted}.")

    return _callback(check)


def _check_model(value: object, option: str) -> None:
    if str(value).strip() in ("", "package:"):
        raise ReqatError(f"{option} {_shown(str(value))}: give a model's folder, or package:NAME with a name.")


def _check_families(text: str, option: str) -> None:
    from reqat.tasks import FAMILIES

    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in FAMILIES:
            raise unknown("task family", name, FAMILIES, where=option)
    if len(set(names)) < len(names):
        raise ReqatError(f"{option} {_shown(text)}: a family stands twice; give each once.")


def _check_rotation(value: int, option: str) -> None:
    if value != 0:
        check_rotation(value, option)


def _check_ptq_method(name: str, option: str) -> None:
    if name not in PTQ_METHODS:
        raise unknown("PTQ method", name, PTQ_METHODS, where=option)


def method_options(method: str, options: Sequence[str], **named: Any) -> dict[str, Any]:
    """What is asked of a PTQ method: ``NAME=VALUE`` each, and ``named`` where not None; those at their defaults are
    left out. Raises `ReqatError` for what the method does not have, and for one that is given twice."""
    found = {name: value for name, value in named.items() if value is not None}
    for text in options:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not (name and equals and value):
            raise ReqatError(f"--option {_shown(text)}: write NAME=VALUE, as in --option grid=50.")
        if name in found:
            raise ReqatError(f"--option {_shown(text)}: {name} is given twice.")
        try:
            found[name] = json.loads(value)  # a number or a truth value
        except ValueError:
            found[name] = value
    return settled(method, found)


def _check_export_format(name: str, option: str) -> None:
    if name not in EXPORT_FORMATS:
        raise unknown("export format", name, EXPORT_FORMATS, where=option)


def _check_threads(value: int, option: str) -> None:
    cores = os.cpu_count() or 1
    most = max(256, 4 * cores)
    if not 0 <= value <= most:
        raise ReqatError(f"{option} {_shown(value)}: 0 (the environment's) to {most}; this machine has {cores} cores.")


def _check_sigmas(text: str, option: str) -> None:
    found = numbers(text, option, float)
    if not all(math.isfinite(value) and value >= 0 for value in found):
        raise ReqatError(f"{option} {_shown(text)}: sizes of noise are finite numbers, 0 or more.")
    if len({f"{value:g}" for value in found}) < len(found):
        raise ReqatError(f"{option} {_shown(text)}: one stands twice (conditions are named by six digits).")


precision = _reading(family)
policy = _reading(Decoding.parse)
head = _callback(check_head)
embeddings = _callback(check_embeddings)
threshold = _reading(Threshold.parse)
seeds = _callback(lambda text, option: seed_list(text, option))
sigmas = _callback(_check_sigmas)
model = _callback(_check_model)
families = _callback(_check_families)
rotation = _callback(_check_rotation)
ptq_method = _callback(_check_ptq_method)
export_format = _callback(_check_export_format)
positive = _between(0, math.inf, "", "it must be a positive finite number")
unit = _between(0, 1, "h", "it must lie above 0 and at 1 at most")
share = _between(0, 1, "", "it must lie between 0 and 1")
floor = _between(0, 1, "lh", "it must lie between 0 and 1, ends included")

threads = _callback(_check_threads)

Threads = Annotated[
    int, typer.Option(callback=threads, help="Threads to compute with (0: leave it to the environment).")
]
Seeds = Annotated[str, typer.Option(callback=seeds, help="Sampling seeds, 0,1,2.")]
Policy = Annotated[str, typer.Option(callback=policy, help="Decoding: greedy, sample(...) or reset(...).")]
Problems = Annotated[int, typer.Option("--n", min=1, max=MOST, help="Problems of the tier's evaluation split.")]


def check_text(arguments: Sequence[str]) -> None:
    """Refuse arguments that no record, table or page can hold: empty ones, and bytes that are no text.

    Raises `ReqatError` naming the argument.
    """
    for before, argument in zip(["", *arguments], arguments, strict=False):
        where = f"{before} {argument!r}" if before.startswith("-") and "=" not in before else repr(argument)
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            raise ReqatError(
                f"{_escaped(where)}: not text in UTF-8; rename the file, or set LC_ALL=C.UTF-8 if it is in UTF-8."
            ) from None
        if not argument.strip() or (argument.startswith("--") and argument.endswith("=")):
            raise ReqatError(f"{where}: an empty argument; give a value, or leave the option out.")
        if "\0" in argument:
            raise ReqatError(f"{where}: a NUL character, which no file name holds.")


def _escaped(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def check_environment() -> None:
    """Refuse values of environment variables that would fail late, or be ignored. Raises `ReqatError` naming one."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        text = os.environ.get(name, "").strip()
        if text and not re.fullmatch(r"\s*[1-9]\d{0,4}\s*(,\s*[1-9]\d{0,4}\s*)*", text):
            raise ReqatError(f"{name}={_shown(text)}: write a positive whole number of threads, or unset it.")
    isa = os.environ.get("REQAT_ISA", "").strip().lower()
    if isa and isa not in CHOICES:
        raise unknown("instruction set", isa, CHOICES, where="REQAT_ISA")
    for name, what in (("REQAT_LIBRARY", "a build of the native library"), ("REQAT_GGML", "the folder of ggml")):
        given = os.environ.get(name)
        if given and not Path(given).exists():
            raise ReqatError(f"{name}={_shown(given)}: there is nothing there; name {what}, or unset it.")
