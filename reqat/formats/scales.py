"""Block scales: the rules that turn a block's largest magnitude into a scale that the hardware can store.

Two kinds. A *power of two* (E8M0, one byte that holds exponent + 127) adds no rounding error of its own but fits the
block only to a factor of two. A small float (E4M3, E5M2, FP16) fits better, may overflow or underflow, and so wants a
float32 scale for the whole tensor above it: NVFP4's global scale g.

Functions here work on float32 tensors of block maxima, one number a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reqat.formats.elements import BELOW_HALF, Element, power_of_two

_MANTISSA = 0x7FFFFF
FLOAT32_MAX = torch.finfo(torch.float32).max
E4M3_MAX = 448.0


@dataclass(frozen=True)
class ScaleType:
    """How a scale is stored. Of the float types also the mantissa bits, the smallest normal's exponent, the maximum."""

    name: str
    dtype: torch.dtype
    mantissa_bits: int = 0
    min_exponent: int = 0
    max: float = 0.0


#: The scale types by name.
SCALE_TYPES: dict[str, ScaleType] = {
    kind.name: kind
    for kind in (
        ScaleType("E8M0", torch.uint8),
        ScaleType("E4M3", torch.float8_e4m3fn, 3, -6, E4M3_MAX),
        ScaleType("E5M2", torch.float8_e5m2, 2, -14, 57344.0),
        ScaleType("FP16", torch.float16, 10, -14, 65504.0),
        ScaleType("FP32", torch.float32, 23, -126, FLOAT32_MAX),
    )
}


def divide(t: Tensor, number: float) -> Tensor:
    """``t / number``, correctly rounded everywhere. (On a GPU torch would multiply by the number's reciprocal.)"""
    return t / number if t.device.type == "cpu" else t / torch.full((), number, dtype=t.dtype, device=t.device)


def round_to_float(t: Tensor, kind: ScaleType, rounding: str = "even") -> Tensor:
    """Round non-negative float32 ``t`` to ``kind``, to nearest with ties to even or away, saturating; as float32.

    With ties to even, the numbers of ``t.clamp(max=kind.max).to(kind.dtype)``. Done by addition, as in elements.py,
    because casts to 8-bit floats are slow on a CPU and what they do on overflow has changed between torch releases.
    """
    if kind.name == "FP32":
        return t
    t = t.clamp(max=kind.max)
    binade = power_of_two(t, torch.empty_like(t)).clamp_(min=2.0**kind.min_exponent)
    if rounding == "away":
        spacing = binade.mul_(2.0**-kind.mantissa_bits)
        return t.div_(spacing).add_(BELOW_HALF).floor_().mul_(spacing)
    # M is 2^23 times the spacing; t is not negative, so it needs no factor of 1.5.
    magic = 2.0 ** (23 - kind.mantissa_bits)
    return t.add_(binade, alpha=magic).sub_(binade, alpha=magic)


def replace_zero_(s: Tensor, value: float) -> Tensor:
    """Put ``value`` in place of the zeros of non-negative ``s``, in one pass."""
    return torch.threshold_(s, 0.0, value)


def e8m0_from_amax(amax: Tensor, element: Element, rule: str) -> Tensor:
    """Biased exponents (int32 in 0..254, meaning ``2**(e - 127)``) for float32 block maxima, by the named rule.

    - ``floor`` (OCP MX v1.0): ``floor(log2 amax) - floor(log2 emax)``. The top of the block may saturate.
    - ``rceil`` (NVIDIA, ReQAT): ``ceil(log2(amax / emax))``, amax / emax rounded to float32. Never saturates.
    - ``even`` (compressed-tensors, torchao EVEN): ``floor``, of amax after rounding its mantissa up where the element's
      own rounding would carry it into the next binade (mantissa of at least 1.75 for E2M1, 1.875 for E1M2).
    - ``four_thirds`` (MR-GPTQ): ``floor``; the effective scale is 4/3 of the power of two. Never saturates.

    Exact, on bits (no ``log2``). Zero and anything below the range gets 0 (2^-127).
    """
    if rule == "four_thirds":
        rule = "floor"
    if rule == "rceil":
        # Below 2^-126 bits are no exponents. Up to 2^-127 the answer is 0; from there on the carry does the rest.
        quotient = torch.threshold_(divide(amax, element.emax), 2.0**-127, 0.0)
        return (quotient.view(torch.int32) + _MANTISSA) >> 23
    bits = amax.view(torch.int32)
    if rule == "even":
        bits = bits + (1 << (23 - element.mantissa_bits - 1))
    return ((bits >> 23) - element.max_exponent).clamp_(min=0)


def e8m0_to_float(exponent: Tensor) -> Tensor:
    """``2**(e - 127)`` as float32 of an integer tensor; 0 is the subnormal 2^-127. (255, NaN, is never stored.)"""
    return (exponent.to(torch.int32) << 23).clamp_(min=0x400000).view(torch.float32)


def global_scale_from_amax(amax: Tensor, cap: float, emax: float, rule: str = "divide") -> Tensor:
    """``g = cap * emax / amax`` in float32; 1 where amax is 0, at most the largest float32 where amax is tiny.

    Computed as ``(1 / amax) * (cap * emax)``, in two roundings, because that is what torch makes of ``number / tensor``
    and therefore what compressed-tensors stores; under ``reciprocal`` as ``1 / (amax / (cap * emax))``, like torchao.
    """
    g = 1.0 / divide(amax, cap * emax) if rule == "reciprocal" else amax.reciprocal().mul_(cap * emax)
    return g.clamp_(max=FLOAT32_MAX).masked_fill_(amax == 0, 1.0)


def nvfp4_scales(amax: Tensor, g: Tensor, emax: float, rule: str, expand: float = 1.0) -> Tensor:
    """E4M3 block scales (as float32) for float32 block maxima and the global scale ``g``.

    The order of the float32 operations matters, since ``amax * (g / 6)`` and ``(amax / 6) * g`` round differently:

    - ``divide``: ``E4M3((amax / emax) * g)``, as compressed-tensors;
    - ``multiply``: ``E4M3(amax * (g / emax))``;
    - ``reciprocal``: ``E4M3((amax / emax) / (1 / g))``, at least 2^-6, as torchao, which keeps 1/g and also multiplies
      by reciprocals afterwards: ``v = round(x * (g / s))`` and ``x^ = v * (s * (1 / g))``.

    ``expand`` multiplies what is about to be rounded: four-over-six puts the maximum at 4 by ``expand=1.5``.

    A scale that comes out as zero (block all zero, or 2^19 below the tensor's maximum) is stored as 0.125, as in
    compressed-tensors: its codes are all zero, and nobody ever divides by zero.
    """
    e4m3 = SCALE_TYPES["E4M3"]
    if rule == "reciprocal":
        return round_to_float((divide(amax, emax) / (1.0 / g)).clamp_(min=2.0**-6), e4m3)
    t = amax * divide(g, emax) if rule == "multiply" else divide(amax, emax).mul_(g)
    if expand != 1.0:
        t.mul_(expand)
    return replace_zero_(round_to_float(t, e4m3), 0.125)


def effective_scale(s: Tensor, g: Tensor | None, rule: str) -> Tensor:
    """What a code is multiplied by: ``s / g`` (``s * (1 / g)`` under ``reciprocal``), or ``s`` without global scale
    (``s * (4/3)`` under ``four_thirds``)."""
    if rule == "four_thirds":
        return s * (4.0 / 3.0)
    if g is None:
        return s
    return s * (1.0 / g) if rule == "reciprocal" else s / g


def inverse_scale(s: Tensor, g: Tensor) -> Tensor:
    """What ``x`` is multiplied by under ``reciprocal``: ``g / s``, with g taken as the reciprocal of the kept 1/g."""
    kept = (1.0 / (1.0 / g)).clamp_(max=FLOAT32_MAX)  # at the end of the range 1/g is subnormal, and coarse
    return (kept / s).clamp_(max=FLOAT32_MAX)
