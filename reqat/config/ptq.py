"""Settings of post-training methods, by method: what each takes, its defaults and ranges, and what it implies.

Readable without torch, so that a recipe is checked when it is read, hours before its last stage runs, and an option at
its default names the same stage as none. A method that is not named in `OPTIONS` states its settings in its own file
alone (`reqat.methods.ptq`); they are checked when it runs. What a value does is said by the method.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from reqat.config.base import Count, Seed, Size, Strict, parse, plain
from reqat.config.errors import unknown

Damp = Annotated[float, Field(gt=0)]
"""Share of the mean diagonal of the second moments that is added to it."""
Share = Annotated[float, Field(ge=0, le=1)]
Clip = Annotated[float, Field(gt=0, le=1)]
"""Share of the extremes at which a tensor is cut off."""


class AWQOptions(Strict):
    """Of `awq`."""

    grid: Size = 20
    """Powers of the activations' size that are tried."""
    clip: bool | None = None
    """Clip weights after scaling; null: where they are integers."""


class FlatQuantOptions(Strict):
    """Of `flatquant`."""

    epochs: Count = 15
    batch: Size = 4
    """Sequences of a step."""
    seed: Seed = 0


class GPTQOptions(Strict):
    """Of `gptq`."""

    act_order: bool = True
    """Columns by falling second moment of their input."""
    damp: Damp = 0.01


class GPTAQOptions(GPTQOptions):
    """Of `gptaq`."""

    alpha: Share = 0.25
    """How much of the drift of a layer's inputs is made up for."""


class MRGPTQOptions(Strict):
    """Of `mr_gptq`."""

    damp: Damp = 0.01
    grid: Size = 100
    """Shares of a block's largest magnitude that are tried."""
    norm: Annotated[float, Field(gt=0)] = 2.4
    """Of the error that the search makes least."""


class QuaRotOptions(Strict):
    """Of `quarot`."""

    seed: Seed = 0
    """Of the signs of the residual stream's rotation."""
    damp: Damp = 0.01
    input_clip: Clip | None = None
    """Null: 0.9 of integers, 1 of others."""
    cache_clip: Clip | None = None
    """Null: 0.95 of integers, 1 of others."""


class SmoothQuantOptions(Strict):
    """Of `smoothquant`."""

    alpha: Share = 0.6
    """How much of the range goes from activations to weights."""


class RTNOptions(Strict):
    """Of `rtn`, which has none."""


OPTIONS: dict[str, type[Strict]] = {
    "awq": AWQOptions,
    "flatquant": FlatQuantOptions,
    "gptaq": GPTAQOptions,
    "gptq": GPTQOptions,
    "mr_gptq": MRGPTQOptions,
    "quarot": QuaRotOptions,
    "rtn": RTNOptions,
    "smoothquant": SmoothQuantOptions,
}

_ROTATING = ("mr_gptq",)
_UNBLOCKED = 32


def has_option(method: str, option: str) -> bool:
    """Whether the settings of a method in `OPTIONS` have this one."""
    return method in OPTIONS and option in OPTIONS[method].model_fields


def checked(method: str, given: Mapping[str, Any], settings: type[Strict] | None = None) -> dict[str, Any]:
    """What of ``given`` chooses a value, defaults included, in the types of ``settings`` (those of the method in
    `OPTIONS`); null chooses none.

    Raises `ReqatError` for an option that the method does not have, naming those that it has, and for a value out of
    range; of a method that states its settings elsewhere only for what JSON cannot represent.
    """
    return _parsed(method, given, settings, defaults=True)


def settled(method: str, given: Mapping[str, Any], settings: type[Strict] | None = None) -> dict[str, Any]:
    """What of ``given`` differs from the defaults of ``settings`` (those of the method in `OPTIONS`); null stands for
    the default.

    Raises `ReqatError` as `checked` does.
    """
    return _parsed(method, given, settings, defaults=False)


def _parsed(method: str, given: Mapping[str, Any], settings: type[Strict] | None, *, defaults: bool) -> dict[str, Any]:
    model = settings or OPTIONS.get(method)
    chosen = {key: value for key, value in given.items() if value is not None}
    if model is None:
        return dict(plain(chosen))
    for option in given:
        if option not in model.model_fields:
            raise unknown(f"option of {method}", option, model.model_fields)
    return parse(model, chosen, f"options of {method}").model_dump(
        mode="json", exclude_unset=defaults, exclude_defaults=not defaults
    )


def with_options(rest: Mapping[str, Any], beside: Mapping[str, Any]) -> dict[str, Any]:
    """``rest`` with the options that stand ``beside`` its own ``options``. These are left as they are where they are no
    mapping, for the validation of their type to say so."""
    own = rest.get("options", {})
    return {**rest, "options": {**beside, **own} if isinstance(own, Mapping) else own}


def rotation_of(method: str, block: int | None) -> int | None:
    """Size of the block Hadamard rotation of inputs and weights that a method adds to a precision without one, for
    weights in blocks of ``block`` (None: whole rows); None for none."""
    return (block or _UNBLOCKED) if method in _ROTATING else None
