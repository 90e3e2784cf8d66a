"""Strict, frozen configuration models, and the canonical form that identities are made of.

Two small ideas. First, a configuration key that nobody reads is a mistake that runs for a night before it is seen, so
unknown keys are refused, with the closest key that exists. Second, a stage is *named by what it computes*: the sha256
of its settings in canonical JSON (sorted keys, no spaces, shortest float repr), so that the same work has the same
name wherever it is asked for, and another name as soon as one setting differs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from reqat.config.errors import ReqatError, unknown


class Strict(BaseModel):
    """A frozen model that refuses unknown keys and names the closest one it knows."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            fields = {field.alias or name for name, field in cls.model_fields.items()}
            for key in data:
                if key not in fields:
                    raise unknown("key", key, fields)
        return data


M = TypeVar("M", bound=BaseModel)


def parse(model: type[M], data: Any, where: str) -> M:
    """`data` as a `model`; every fault in one `ReqatError` that opens with `where` (a file) and the path of the key."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            path = ".".join(str(part) for part in fault["loc"])
            message = fault["msg"].removeprefix("Value error, ")
            given = "" if fault["type"] in ("value_error", "missing") else f" (given: {fault['input']!r})"
            lines.append(f"{where}: {path + ': ' if path else ''}{message}{given}")
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
