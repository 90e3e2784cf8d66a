"""A change of basis before quantizing: ``x P`` with P invertible, and ``w P^-T`` for the weight that reads x.

``(x P)(w P^-T)^T = x w^T``, so the product stays what it was, and P can be chosen so that both factors are easy to
quantize: QuaRot's Hadamard matrices (arXiv 2404.00456), FlatQuant's learned matrices (arXiv 2410.09426). P is a
Kronecker product L (x) R of a left and a right factor, which takes few numbers and little time: with x [a b] seen as a
matrix X [a, b], ``x P`` is ``L^T X R``. A factor that is None is the identity.

Block Hadamard rotations (:mod:`reqat.quant.hadamard`) are an option of the precision; a basis belongs to one layer of
one model, so the model's sidecar keeps it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reqat.config.errors import ReqatError
from reqat.quant.state import MeasuredState


class Basis(MeasuredState):
    """The change of basis of one tensor of ``size`` channels: ``left`` [a, a] and ``right`` [b, b] with a b = size,
    float32; both None (nothing changes) until :meth:`set`."""

    left: Tensor | None
    right: Tensor | None

    def __init__(self, size: int, name: str) -> None:
        super().__init__()
        self.size, self.name = size, name
        self.register_measured("left")
        self.register_measured("right")

    @property
    def changes(self) -> bool:
        """Whether there is a basis other than the tensor's own."""
        return self.left is not None or self.right is not None

    def set(self, left: Tensor | None, right: Tensor | None) -> None:
        """Take these factors, float32 from now on. Raises ReqatError unless they are square, invertible and finite, and
        their sizes divide the tensor's (both given: multiply to it)."""
        for name, factor in (("left", left), ("right", right)):
            value = None if factor is None else self.checked(name, factor).detach().to(torch.float32)
            setattr(self, name, None if value is None else value.to(self.device, copy=True))
        if left is not None and right is not None and len(left) * len(right) != self.size:
            raise ReqatError(f"{self.name}: a basis of {len(left)} x {len(right)} for {self.size} channels")

    def checked(self, name: str, value: Tensor) -> Tensor:
        """A factor [n, n] of the basis. Raises ReqatError as :meth:`set` does."""
        if value.ndim != 2 or value.shape[0] != value.shape[1] or value.numel() == 0 or self.size % len(value):
            raise ReqatError(
                f"{self.name}: {name} factor of shape {tuple(value.shape)} of a basis, where a square one is needed "
                f"whose size divides {self.size}"
            )
        if not torch.isfinite(value).all() or bool(torch.linalg.inv_ex(value.double())[1]):
            raise ReqatError(f"{self.name}: the {name} factor of its basis is not finite or has no inverse")
        return value

    def forward(self, x: Tensor) -> Tensor:
        """``x P`` for x [..., size], in float32 (float64 for float64), then in x's dtype."""
        return kronecker(x, self.left, self.right)

    def of_weight(self, w: Tensor) -> Tensor:
        """``w P^-T`` for a weight w [N, size], or other numbers that meet x in a product; computed in float64."""
        if not self.changes:
            return w
        left, right = (None if f is None else _inverse(f).T for f in (self.left, self.right))
        return kronecker(w.double(), left, right).to(w.dtype)

    def back(self, w: Tensor) -> Tensor:
        """The inverse of :meth:`of_weight`: ``w P^T``; computed in float64."""
        if not self.changes:
            return w
        left, right = (None if f is None else f.double().T for f in (self.left, self.right))
        return kronecker(w.double(), left, right).to(w.dtype)

    def extra_repr(self) -> str:
        """The factors' sizes, for ``print(model)``."""
        return " x ".join("identity" if f is None else str(len(f)) for f in (self.left, self.right))


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


def _inverse(factor: Tensor) -> Tensor:
    return torch.linalg.inv(factor.double())
