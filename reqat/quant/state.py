"""Buffers that a model measured: float32 whatever the model's type is, part of its state dict, perhaps not set yet.

Calibrated scales and the Q-FIT shift are of this kind. ``.half()`` and ``.to(dtype)`` are about weights and
activations; a scale of 80,000 has no float16, and one rounded to bfloat16 moves every rounding threshold behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from reqat.config.errors import ReqatError


class MeasuredState(nn.Module):
    """A module with buffers that are float32, or None until they are set.

    Conversions of the model's dtype leave them as they are; moves to another device take them along. ``state_dict``
    contains those that are set. ``load_state_dict`` takes a stored one whether or not one is set here; one that is set
    here and not stored is a missing key, as for any buffer.
    """

    name: str | None

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cpu")  # where a buffer goes that is set later

    def register_measured(self, name: str) -> None:
        """Declare the buffer ``name``, not set."""
        self.register_buffer(name, None)

    def measured(self) -> dict[str, Tensor]:
        """The buffers that are set, by name."""
        return dict(self.named_buffers(recurse=False))

    def checked(self, name: str, value: Tensor) -> Tensor:
        """``value`` as the buffer ``name`` takes it. Raises ReqatError if this module has no use for it."""
        return value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.measured()
        super()._apply(fn, recurse)
        self.device = fn(torch.empty(0, dtype=torch.float32, device=self.device)).device
        for name, value in before.items():
            if not value.is_meta:
                setattr(self, name, value.to(self.device))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in [name for name in self._buffers if name not in self._non_persistent_buffers_set]:
            key = f"{prefix}{name}"
            if key in state_dict:
                value = state_dict[key]
                if value.dtype != torch.float32:
                    raise ReqatError(
                        f"{key} is {value.dtype} in the state dict, and was measured as float32: convert the weights "
                        "alone"
                    )
                state_dict[key] = self.checked(name, value)
                if self._buffers[name] is None:
                    setattr(self, name, state_dict[key].detach().to(self.device, copy=True))
        super()._load_from_state_dict(state_dict, prefix, *args)
