"""Which precision a model is prepared for: what is asked for, and what its folder was saved with.

A name such as ``NVFP4-W4A4KV4`` leaves options open. Asked for by the name that the folder was saved with, options that
are not given are the folder's; one that is given and differs is an error, because the model would compute something
else than it was trained, quantized or measured with. Another name is another precision; what differs is reported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from reqat.config.errors import ReqatError
from reqat.config.precision import ACTS_ON, NUMBERS, ROLES, inline_options, without_skip
from reqat.quant import Precision


@dataclass(frozen=True)
class Asked:
    """The precision to prepare, the patterns of layers to leave alone, and where both differ from the folder's."""

    precision: Precision
    skip: tuple[str, ...]
    differs: tuple[str, ...] = ()
    skip_given: bool = False
    """Whether the patterns were asked for, by argument or in the precision's name."""


def settle(
    precision: str | Precision,
    skip: Iterable[str] | None,
    options: Mapping[str, Any],
    saved: Precision,
    saved_skip: tuple[str, ...] | None,
    *,
    override: bool = False,
) -> Asked:
    """What to prepare, given what is asked for and what the folder was saved with.

    Args:
        precision, options: of :meth:`Precision.parse`; a Precision is taken as giving every option.
        skip: patterns, or None for the name's (``skip=*.down_proj|*.o_proj``), or else the folder's, under another name
            too: those layers were never quantized.
        saved: of the folder; BF16 if it was never quantized, which says nothing of options.
        saved_skip: patterns of the folder, or None where it does not know.
        override: take what is asked for as it is.

    Raises ReqatError as ``Precision.parse`` does, and naming each option that differs.
    """
    inline_skip = None
    if isinstance(precision, str):
        precision, inline_skip = without_skip(precision)
    wanted = Precision.parse(precision, **options)
    if not (skip is None or isinstance(skip, list | tuple | set) and all(isinstance(s, str) for s in skip)):
        raise ReqatError(f"skip={skip!r}: give a list of patterns of layers' names, such as ['model.layers.0.*']")
    if inline_skip is not None and skip is not None and tuple(skip) != inline_skip:
        raise ReqatError(f"the precision's name says skip {list(inline_skip)}, and skip={skip!r} is given beside it")
    patterns = inline_skip if skip is None else tuple(skip)
    fresh = Asked(wanted, patterns or (), skip_given=patterns is not None)
    if saved == Precision():
        return fresh
    differs = differences(wanted, saved)
    if patterns is not None and saved_skip is not None and patterns != saved_skip:
        differs["skip"] = f"skip: saved with {list(saved_skip)}, asked for {list(patterns)}"
    if override or wanted.name != saved.name:
        kept = saved_skip if patterns is None and not override and wanted.quantizes_linear else None
        return dataclasses.replace(fresh, skip=fresh.skip or kept or (), differs=tuple(differs.values()))
    given = {"skip"} | (
        set(differs) if isinstance(precision, Precision) else _places({**inline_options(precision), **options})
    )
    conflicts = [text for place, text in differs.items() if place in given]
    if conflicts:
        raise ReqatError(
            f"the checkpoint was saved at {saved} with other options: {'; '.join(conflicts)}. Give the name alone to "
            "take the checkpoint's, or override=True to compute with yours"
        )
    return dataclasses.replace(fresh, precision=saved, skip=patterns if patterns is not None else saved_skip or ())


def differences(wanted: Precision, saved: Precision) -> dict[str, str]:
    """A line for each setting in which two precisions differ, by its place (``inputs.global_scale``, ``rotation``)."""
    found: dict[str, tuple[Any, Any]] = {}
    for role in ROLES:
        now, then = getattr(wanted, role), getattr(saved, role)
        if now is None or then is None:
            found[role] = tuple("unquantized" if fmt is None else fmt.name for fmt in (then, now))  # type: ignore[assignment]
            continue
        for part in dataclasses.fields(now):
            found[f"{role}.{part.name}"] = getattr(then, part.name), getattr(now, part.name)
    for place in NUMBERS:
        found[place] = getattr(saved, place), getattr(wanted, place)
    return {
        place: f"{place}: saved with {then}, asked for {now}" for place, (then, now) in found.items() if then != now
    }


def _places(options: Mapping[str, Any]) -> set[str]:
    """The places on which the options given act. None given for a rotation means none, elsewhere the default."""
    places = set()
    for option, value in options.items():
        if option in NUMBERS:
            places.add(option)
        elif option in ACTS_ON and value is not None:
            roles, part = ACTS_ON[option]
            places |= {f"{role}.{part}" for role in roles}
        elif value is not None:
            places.add(option)
    return places
