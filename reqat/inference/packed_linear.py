"""Linear layers of a packed model: four-bit codes and scales and no dense weight, inputs rounded to codes.

Layers that read the same tensor share one :class:`PackedInput`, as their fake-quantized twins share one
:class:`~reqat.models.linear.InputQuantizer`. The :class:`~reqat.inference.backend.Backend` that the model was packed
for computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from reqat.config.errors import ReqatError
from reqat.inference.backend import Backend, InputQuantSpec
from reqat.models.linear import InputQuantizer, QuantLinear
from reqat.quant import Precision


class PackedInput(InputQuantizer):
    """Rounds the input of packed layers, once for all that read it."""

    def __init__(self, source: InputQuantizer, precision: Precision, block: int, backend: Backend) -> None:
        super().__init__(precision, source.consumers, source.basis.size, source.name or "input")
        self.device, self.global_scale = source.device, source.global_scale
        self.block = block
        self.backend = backend

    def compute(self, x: Tensor) -> Any:
        """Rotated and rounded to codes, or only rotated where the precision leaves inputs alone."""
        how = InputQuantSpec(self.format, self.block, self.rotation, self.global_scale, self.name or "input")
        return self.backend.quantize_input(x, how)


class PackedModule(nn.Module):
    """A module whose numbers lie where kernels read them: it is not moved, converted, copied, saved or loaded."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.train(False)

    def keep(self, tensors: dict[str, Tensor]) -> None:
        """Register what a kernel reads as buffers, so that memory is counted and a conversion noticed."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def check_conversion(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Raise ReqatError if ``fn`` would move or convert the codes; nothing is changed."""
        # The order of codes is that of one device's kernels, and what the kernel holds would not move along.
        for name, tensor in self.named_buffers(recurse=False):
            new = fn(tensor)
            if (new.device, new.dtype) != (tensor.device, tensor.dtype):
                raise ReqatError(
                    f"{self.name}: a packed model stays on {tensor.device} with its codes as they are, and {name} was "
                    f"to become {new.dtype} on {new.device}: load the frozen model, move or convert it, then pack it"
                )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        self.check_conversion(fn)
        return super()._apply(fn, recurse)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ReqatError(
            f"{self.name}: a packed model cannot be copied or pickled, its codes lie where kernels read them: save or "
            "copy the frozen model, then pack"
        )

    def _save_to_state_dict(self, *args: Any) -> None:
        raise ReqatError(
            f"{self.name}: a packed model has no dense weights for a state dict or a checkpoint: take or save those of "
            "the frozen model before pack(), and pack it again after loading"
        )

    def _load_from_state_dict(self, *args: Any) -> None:
        raise ReqatError(
            f"{self.name}: a packed model takes no state dict: load it into the prepared model, then pack that"
        )


class PackedLinear(PackedModule):
    """``y = Q(x) W^T + b`` with W [N, K] packed; x [..., K]. Inference only."""

    def __init__(self, linear: QuantLinear, inputs: PackedInput, buffer: Tensor | None = None) -> None:
        super().__init__(linear.name)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.backend = inputs.backend
        self.packed = self.backend.pack_weight(linear.quantize_weight(), buffer)
        self.keep(self.backend.tensors(self.packed))
        self.bias = linear.bias
        self.input_quantizer = inputs

    def forward(self, x: Tensor) -> Tensor:
        """The product, in x's dtype."""
        return self.backend.linear(self.input_quantizer(x, self), self.packed, self.bias)

    def extra_repr(self) -> str:
        """Shape and size, for ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.packed.nbytes:,} bytes"
