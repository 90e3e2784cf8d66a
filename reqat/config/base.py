"""Strict, frozen configuration models, and the canonical form that identities are made of.

Two small ideas. First, a configuration key that nobody reads is a mistake that runs for a night before it is seen, so
unknown keys are refused, with the closest key that exists. Second, a stage is *named by what it computes*: the sha256
of its settings in canonical JSON (sorted keys, no spaces, shortest float repr), so that the same work has the same
name wherever it is asked for, and another name as soon as one setting differs.
"""

from __future__ import annotations

import hashlib
import json
import math
import reprlib
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from reqat.config.errors import ReqatError, unknown


class Strict(BaseModel):
    """A frozen model that refuses unknown keys and names the closest one it knows.

    Numbers are finite, and a truth value is no number: YAML reads ``n: yes`` as one, and Python would count it as 1.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            fields = {field.alias or name for name, field in cls.model_fields.items()}
            for key in data:
                if key not in fields:
                    raise unknown("key", key, fields)
            for name, field in cls.model_fields.items():
                if _holds_truth_value(data.get(name)) and not _takes_truth_values(field.annotation):
                    raise ReqatError(f"{name}: a number or a text is needed, not {data[name]!r}.")
        return data


def _holds_truth_value(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(isinstance(v, bool) for v in value))


def _takes_truth_values(annotation: Any) -> bool:
    """Whether a field of this type may be true or false itself (the values of a mapping are their own affair)."""
    if annotation in (bool, Any):
        return True
    if get_origin(annotation) in (Union, types.UnionType, Annotated, list, tuple):
        return any(_takes_truth_values(part) for part in get_args(annotation))
    return False


# Bounds that no run comes near, so that a slip of the finger is named at once instead of filling the memory.
Count = Annotated[int, Field(gt=0, le=10**12)]
"""How many: tokens, problems, steps."""
Size = Annotated[int, Field(gt=0, le=2**24)]
"""Length of an axis of a tensor, or rows in a batch."""
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""Seeds a random stream."""


def distinct(values: Sequence[Any]) -> Any:
    """`values`, unchanged. Raises `ReqatError` if they contain duplicates."""
    twice = [value for i, value in enumerate(values) if value in values[:i]]
    if twice:
        raise ReqatError(f"{list(values)}: {twice[0]!r} stands twice; give each once.")
    return values


Seeds = Annotated[list[Seed], AfterValidator(distinct)]
"""Seeds, each once."""


def plain(value: Any) -> Any:
    """`value`, unchanged, if JSON can represent it. Raises `ReqatError` naming a date, an infinite number, or
    a key that is no text."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ReqatError(f"the key {key!r} must be a text; put it in quotes.")
            try:
                plain(inner)
            except ReqatError as error:
                raise ReqatError(f"{key}: {error}") from None
    elif isinstance(value, list | tuple):
        for inner in value:
            plain(inner)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ReqatError(f"{value} is not a finite number.")
    elif value is not None and not isinstance(value, str | int | float):
        raise ReqatError(f"{value} is a {type(value).__name__}; write a number or a text (in quotes).")
    return value


Families = Annotated[dict[str, dict[str, Any]], AfterValidator(plain)]
"""Task family -> options of its generator."""


M = TypeVar("M", bound=BaseModel)
_short = reprlib.Repr()  # what was given may be a whole file
_short.maxstring = _short.maxother = 120


MOST_FAULTS = 6


def parse(model: type[M], data: Any, where: str) -> M:
    """`data` as a `model`; every fault in one `ReqatError` that opens with `where` (a file) and the path of the key."""
    try:
        return model.model_validate(data)
    except RecursionError:
        raise ReqatError(f"{where}: nested too deeply; correct the file.") from None
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            path = ".".join(str(part) for part in fault["loc"])
            message = fault["msg"].removeprefix("Value error, ")
            given = "" if fault["type"] in ("value_error", "missing") else f" (given: {_short.repr(fault['input'])})"
            lines.append(f"{where}: {path + ': ' if path else ''}{message}{given}")
        if len(lines) > MOST_FAULTS:  # one value that many keys share by an anchor is a fault of each
            lines[MOST_FAULTS - 1 :] = [f"{where}: and {len(lines) - MOST_FAULTS + 1} faults more."]
        raise ReqatError("\n".join(lines)) from None


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` laid on top, mapping by mapping; anything that is not a mapping is replaced whole."""
    out = dict(base)
    for key, value in over.items():
        below = out.get(key)
        out[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return out


def canonical(value: Any) -> str:
    """Canonical JSON of a model, mapping, list or scalar: sorted keys, no spaces, no NaN.

    Of a model, what equals its default is left out, so that a new option, at the default that keeps the old
    behaviour, renames nothing: a run pinned last year still answers this year's plan. The price: **changing a default
    changes the meaning of old names.** A test holds the defaults; give a new behaviour a new option instead.
    """
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_defaults=True)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any, length: int = 64) -> str:
    """The first `length` hex digits of the sha256 of `canonical(value)`."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:length]
