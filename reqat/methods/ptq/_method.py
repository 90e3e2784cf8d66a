"""What a post-training quantization method is: transforms of the full-precision model, then a solver of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from reqat.methods.transform import Transform


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
        return any(transform.needs_data for transform in self.transforms) or self.solver_needs_data
