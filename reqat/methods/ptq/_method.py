"""What a post-training quantization method is: transforms of the full-precision model, then a solver of its weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from reqat.config.base import Strict
from reqat.config.ptq import RTNOptions
from reqat.methods.transform import Transform


@dataclass(frozen=True)
class Method:
    """A method: its transforms in their order, and the solver, which takes the prepared model and leaves it frozen.

    ``solver(model, [input_ids,] **options)`` returns JSON-ready metrics; it is given ``input_ids`` if
    ``solver_needs_data``. ``settings`` are the options that the method has, with defaults and ranges; each is an
    argument of the solver or of a transform, which is given those that it names.
    """

    solver: Callable[..., dict[str, Any]]
    transforms: tuple[Transform, ...] = ()
    settings: type[Strict] = RTNOptions
    solver_needs_data: bool = False

    @property
    def needs_calibration(self) -> bool:
        """Whether the method looks at what flows through the model."""
        return any(transform.needs_data for transform in self.transforms) or self.solver_needs_data


def taken(function: Callable[..., Any] | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are arguments of ``function``."""
    names = () if function is None else inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in names}
