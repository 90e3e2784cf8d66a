"""Modules that compute a model's nonlinear operations from functions of one number, which tables can take the place of.

- activation: the function itself;
- norm: ``(x - mean) rsqrt(var + eps)`` or ``x rsqrt(mean(x^2) + eps)``, with weight and bias as before. The table of
  1/sqrt is read at ``2^(10 k) x`` and its value multiplied by ``2^(5 k)``, which is exact. NN-LUT's input scaling takes
  k = 1 below 1 and 0 elsewhere (``below``; inferred from a reader's notes); a decoder's residual stream grows far
  beyond the range of the table, so by default k is whatever brings x between 1 and 1024 (``full``; ours);
- softmax: ``e = exp(x - max)``, ``e reciprocal(sum e)`` (exact division where only exp has a table). What a mask hides
  is 0, whatever the table would say.

Everything else is computed in float32 (sums, means), which the paper leaves to units that an accelerator has anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reqat.config.errors import unknown
from reqat.methods.nonlinear._function import FUNCTIONS, Evaluate
from reqat.models.adapters import UnsupportedModelError

#: Scores up to here are masks: some are the smallest float32, not minus infinity.
_HIDDEN = -1e30
SCALINGS = ("full", "below")
_ALIKE = 1e-3  # GELU by tanh differs from GELU by up to 5e-4, less than any table of 16 entries


class Lookup(nn.Module):
    """A function of one number at one place of a model: ``evaluate`` is exact, or a version of a table."""

    def __init__(self, function: str, evaluate: Evaluate) -> None:
        super().__init__()
        self.function = function
        self.evaluate = evaluate

    def forward(self, x: Tensor) -> Tensor:
        """Values, in the dtype of ``x``."""
        return self.evaluate(x)


class TableNorm(nn.Module):
    """A norm of the last axis whose reciprocal square root is a :class:`Lookup`; same parameters by the same names."""

    def __init__(self, norm: Any, rsqrt: Lookup, scaling: str = "full") -> None:
        super().__init__()
        if scaling not in SCALINGS:
            raise unknown("scaling", scaling, SCALINGS)
        self.scaling = scaling
        self.weight = norm.weight
        self.register_parameter("bias", getattr(norm, "bias", None))
        self.rsqrt = rsqrt
        self.centred, self.added, self.eps = _form(norm)

    def forward(self, x: Tensor) -> Tensor:
        """Normalized ``x``, in its dtype."""
        wide = x.float()
        y = _normalized(wide, self.centred, self.eps, lambda square: _scaled(self.rsqrt, square, self.scaling))
        y = y * (self.weight.float() + self.added)
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)


class TableSoftmax(nn.Module):
    """Softmax over the last axis of scores whose exp, and where given reciprocal, are :class:`Lookup`."""

    def __init__(self, exp: Lookup, reciprocal: Lookup | None) -> None:
        super().__init__()
        self.exp = exp
        self.reciprocal = reciprocal

    def forward(self, scores: Tensor) -> Tensor:
        """Probabilities; 0 where hidden, and in a row that is hidden altogether."""
        hidden = scores <= _HIDDEN
        top = scores.amax(-1, keepdim=True)
        empty = top <= _HIDDEN
        # NaN is what no table has a value for, and what observers of inputs leave out.
        x = (scores - top.masked_fill(empty, 0.0)).masked_fill(hidden, torch.nan)
        e = self.exp(x).masked_fill(hidden, 0.0)
        total = e.sum(-1, keepdim=True).masked_fill(empty, 1.0)
        return e / total if self.reciprocal is None else e * self.reciprocal(total)


def function_of(activation: nn.Module) -> str | None:
    """Which of :data:`FUNCTIONS` an activation computes, by its values; None for another one."""
    x = torch.linspace(-8, 8, 257)
    with torch.no_grad():
        y = activation(x)
    for name, function in FUNCTIONS.items():
        if function.start == "normal" and float((y - function(x)).abs().max()) < _ALIKE:
            return name
    return None


def _scaled(rsqrt: Lookup, x: Tensor, scaling: str) -> Tensor:
    k = (x < 1).int() if scaling == "below" else -((torch.frexp(x).exponent - 1) // 10)
    return torch.ldexp(rsqrt(torch.ldexp(x, 10 * k)), 5 * k)


def _normalized(x: Tensor, centred: bool, eps: float, rsqrt: Evaluate) -> Tensor:
    if centred:
        x = x - x.mean(-1, keepdim=True)
    return x * rsqrt(x.square().mean(-1, keepdim=True) + eps)


@torch.no_grad()
def _form(norm: Any) -> tuple[bool, float, float]:
    """Whether a norm subtracts the mean, what it adds to its weight, and its epsilon; found by comparing what it
    computes with each possibility. Raises UnsupportedModelError if it is none of them."""
    eps = next((e for name in ("eps", "variance_epsilon") if (e := getattr(norm, name, None)) is not None), None)
    weight, bias = norm.weight, getattr(norm, "bias", None)
    if eps is not None and weight.ndim == 1:
        g = torch.Generator().manual_seed(0)
        x = (torch.randn(3, len(weight), generator=g) + 0.5).to(weight)
        expected = norm(x).float()
        for centred in (True, False):
            for added in (0.0, 1.0):
                y = _normalized(x.float(), centred, eps, torch.rsqrt) * (weight.float() + added)
                y = y if bias is None else y + bias.float()
                if float((y - expected).abs().max()) <= 8 * torch.finfo(weight.dtype).eps * float(y.abs().max()):
                    return centred, added, eps
    raise UnsupportedModelError(
        f"{type(norm).__name__} with a weight of shape {list(weight.shape)} is neither a LayerNorm nor an RMSNorm of "
        "the last axis, so no table of 1/sqrt can take its place"
    )
