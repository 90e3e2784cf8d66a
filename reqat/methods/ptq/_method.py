"""What a post-training quantization method is: transforms of the full-precision model, then a solver of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Transform = Callable[..., dict[str, Any]]
"""``transform(model, precision, input_ids, *, progress, **options)`` rewrites a full-precision model in place so that
it quantizes better, without changing what it computes, and returns JSON-ready metrics. One test holds all transforms to
that: the unquantized model gives the same logits before and after."""


@dataclass(frozen=True)
class Method:
    """A method: its transforms in their order, and the solver, which takes the prepared model and leaves it frozen.

    ``solver(model, [input_ids,] **options)`` returns JSON-ready metrics; it is given ``input_ids`` if
    ``solver_needs_data``. ``options`` are those that the method has, transforms' and solver's together, with their
    defaults.
    """

    solver: Callable[..., dict[str, Any]]
    transforms: tuple[Transform, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    solver_needs_data: bool = False
    solver_options: tuple[str, ...] = ()

    @property
    def needs_calibration(self) -> bool:
        """Whether the method looks at what flows through the model."""
        return bool(self.transforms) or self.solver_needs_data
