"""A change of basis before quantizing: ``x P`` with P invertible, and ``w P^-T`` for the weight that reads x.

``(x P)(w P^-T)^T = x w^T``, so the product stays what it was, and P can be chosen so that both factors are easy to
quantize: QuaRot's Hadamard matrices (arXiv 2404.00456), FlatQuant's learned matrices (arXiv 2410.09426). P has two
parts, of which either may be missing:

- *factors*, measured for one tensor of one model, so that the model's sidecar keeps them: a Kronecker product L (x) R,
  which takes few numbers and little time. With x [a b] seen as a matrix X [a, b], ``x P`` is ``L^T X R``. A factor that
  is None is the identity.
- *signs*, named by a seed, so that the precision keeps them (``kv_signs``): each channel times +1 or -1, which comes
  after the factors. Exact, and its own inverse transposed.

Block Hadamard rotations (:mod:`reqat.formats.hadamard`) come last. They belong to the quantizer, which makes one
operation of rotating and rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reqat.config.errors import ReqatError
from reqat.formats.hadamard import with_signs
from reqat.quant.state import MeasuredState

FACTORS = ("left", "right")


class Basis(MeasuredState):
    """The change of basis of one tensor of ``size`` channels: ``left`` [a, a] and ``right`` [b, b] with a b = size,
    float32; both None until :meth:`set`. ``signs`` is the seed of the signs, or None for none."""

    left: Tensor | None
    right: Tensor | None

    def __init__(self, size: int, name: str, signs: int | None = None) -> None:
        super().__init__()
        self.size, self.name, self.signs = size, name, signs
        self._duals: dict[str, tuple[Tensor, int | None, Tensor]] = {}
        for factor in FACTORS:
            self.register_measured(factor)

    @property
    def factored(self) -> bool:
        """Whether it has a factor."""
        return self.left is not None or self.right is not None

    @property
    def changes(self) -> bool:
        """Whether there is a basis other than the tensor's own."""
        return self.factored or self.signs is not None

    def set(self, left: Tensor | None, right: Tensor | None) -> None:
        """Take these factors, float32 from now on. Raises ReqatError, and leaves the basis as it is, unless they are
        square, invertible and finite, of floating point, and their sizes divide the tensor's (both given: multiply to
        it)."""
        given = {name: factor for name, factor in zip(FACTORS, (left, right), strict=True) if factor is not None}
        self.check(given)
        for name in FACTORS:
            factor = given.get(name)
            value = None if factor is None else factor.detach().to(self.device, torch.float32, copy=True)
            setattr(self, name, value)

    def check(self, factors: dict[str, Tensor]) -> None:
        """Raise ReqatError unless ``factors`` (``left``, ``right`` or both) are of a basis, as :meth:`set` says."""
        for name, factor in factors.items():
            self.checked(name, factor)
        sizes = [len(factor) for factor in factors.values()]
        if len(sizes) == 2 and sizes[0] * sizes[1] != self.size:
            raise ReqatError(
                f"{self.name}: a basis of {sizes[0]} x {sizes[1]} for {self.size} channels, where two sizes are needed "
                f"whose product is {self.size}"
            )

    def checked(self, name: str, value: Tensor) -> Tensor:
        """A factor [n, n] of the basis, by itself. Raises ReqatError as :meth:`set` does."""
        if value.ndim != 2 or value.shape[0] != value.shape[1] or value.numel() == 0 or self.size % len(value):
            raise ReqatError(
                f"{self.name}: {name} factor of shape {tuple(value.shape)} of a basis, where a square one is needed "
                f"whose size divides {self.size}"
            )
        if not value.is_floating_point():
            raise ReqatError(f"{self.name}: the {name} factor of its basis is {value.dtype}, where float32 is needed")
        if not torch.isfinite(value).all() or bool(torch.linalg.inv_ex(value.double())[1]):
            raise ReqatError(f"{self.name}: the {name} factor of its basis is not finite or has no inverse")
        return value

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # All of them before any: a factor that stays is one that the state dict does not have.
        kept = {name: factor for name in FACTORS if (factor := getattr(self, name)) is not None}
        given = {name: state_dict[f"{prefix}{name}"] for name in FACTORS if f"{prefix}{name}" in state_dict}
        self.check(kept | given)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        """``x P`` for x [..., size], in float32 (float64 for float64), then in x's dtype."""
        return with_signs(kronecker(x, self.left, self.right), self.signs)

    def of_weight(self, w: Tensor) -> Tensor:
        """``w P^-T`` for a weight w [N, size], or other numbers that meet x in a product; computed in float64."""
        if self.factored:
            left, right = (self._dual(name) for name in FACTORS)
            w = kronecker(w.double(), left, right).to(w.dtype)
        return with_signs(w, self.signs)

    def back(self, w: Tensor) -> Tensor:
        """The inverse of :meth:`of_weight`: ``w P^T``; computed in float64."""
        w = with_signs(w, self.signs)
        if not self.factored:
            return w
        left, right = (None if f is None else f.double().T for f in (self.left, self.right))
        return kronecker(w.double(), left, right).to(w.dtype)

    def _dual(self, name: str) -> Tensor | None:
        """The inverse of a factor, transposed, in float64: computed when the factor is first used, and again after it
        was replaced, moved or written to. Only a write that torch does not count as one (``left.data.add_()``) would be
        missed; a factor that is trained is inverted each time, with its gradient.
        """
        factor: Tensor | None = getattr(self, name)
        if factor is None:
            return None
        if factor.requires_grad and torch.is_grad_enabled():
            return inverse_transposed(factor)
        version = None if factor.is_inference() else factor._version
        kept = self._duals.get(name)
        if kept is None or kept[0] is not factor or kept[1] != version:
            with torch.no_grad():
                kept = self._duals[name] = (factor, version, inverse_transposed(factor.detach()))
        return kept[2]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_duals": {}}  # copies and pickles compute their own

    def extra_repr(self) -> str:
        """The factors' sizes and the signs, for ``print(model)``."""
        sizes = " x ".join("identity" if f is None else str(len(f)) for f in (self.left, self.right))
        return sizes if self.signs is None else f"{sizes}, signs={self.signs}"


def kronecker(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """``x (L (x) R)`` for x [..., a b], L [a, a], R [b, b]; None is the identity. Same shape and dtype; with gradients.

    Computed in float32 (float64 for float64 inputs) even under autocast.
    """
    if left is None and right is None:
        return x
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    b = len(right) if right is not None else x.shape[-1] // len(left)  # type: ignore[arg-type]
    with torch.autocast(x.device.type, enabled=False):
        y = x.to(dtype).unflatten(-1, (-1, b))
        if right is not None:
            y = y @ right.to(y)
        if left is not None:
            y = left.to(y).T @ y
    return y.flatten(-2).to(x.dtype)


def inverse_transposed(factor: Tensor) -> Tensor:
    """``factor^-T``, in float64."""
    return torch.linalg.inv(factor.double()).T
