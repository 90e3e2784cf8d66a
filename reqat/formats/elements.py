"""Four-bit elements: the few numbers a code can stand for, and how a real number is rounded to one of them.

An element type is its list of eight magnitudes; a code is ``sign << 3 | index``. Rounding never searches that list.
Inside a binade the magnitudes are evenly spaced, so adding and subtracting a large float32 whose unit in the last place
*is* the spacing lets the adder do the rounding (to nearest, ties to even):

    E2M1: spacing 0.5 below 2, 1 below 4, 2 up to 6   ->  M = 1.5 * 2^22 * 2^floor(log2 |y|), exponent held in 0..2
    E1M2: spacing 0.5 everywhere up to 3.5            ->  M = 1.5 * 2^22
    INT4: spacing 1 everywhere up to 7                ->  M = 1.5 * 2^23

(The factor 1.5 keeps y + M in M's own binade for both signs of y.) Even *code* and even multiple of the spacing are the
same thing in all three. Half-away rounding, which AMXFP4 uses, is ``floor(|y| / spacing + 1/2)``.

Zeros: a negative number that rounds to zero keeps its sign in the code (8, as in every FP4 library), but both zero codes
decode to +0.0, so that the codes and the arithmetic shortcut agree bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# 1.5 * 2^22 has ulp 0.5: adding it to y leaves y rounded to a multiple of 0.5.
_MAGIC_HALF = 1.5 * 2.0**22
# A tensor, because a Python number would be turned into one at every call.
_EXPONENT_MASK = torch.tensor(0x7F800000, dtype=torch.int32)
# The largest float32 below 0.5: floor(z + this) is round-half-away for every z >= 0 (0.5 itself fails at 0.5 - 2^-25).
BELOW_HALF = 0.5 - 2.0**-25


def power_of_two(y: Tensor, out: Tensor) -> Tensor:
    """``2 ** floor(log2 |y|)`` of normal float32 ``y`` (0 of subnormals), by keeping nothing but the exponent bits."""
    mask = _EXPONENT_MASK if y.device.type == "cpu" else _EXPONENT_MASK.to(y.device)
    torch.bitwise_and(y.view(torch.int32), mask, out=out.view(torch.int32))
    return out


@dataclass(frozen=True)
class Element:
    """A 4-bit number format. ``magnitudes[i]`` is what the code's low bits ``i`` stand for."""

    name: str
    magnitudes: tuple[float, ...]
    # Above this |y|, rounding by M alone may step past the largest magnitude, so the result has to be clipped.
    clip_above: float
    mantissa_bits: int
    bits: int = 4

    @property
    def emax(self) -> float:
        """The largest magnitude (6, 3.5 or 7)."""
        return self.magnitudes[-1]

    @property
    def max_exponent(self) -> int:
        """``floor(log2(emax))``: what OCP's MX specification calls emax of the element."""
        return 2 if self.emax >= 4 else 1

    def round_(self, y: Tensor, scratch: Tensor, *, rounding: str = "even", clip: bool = True) -> Tensor:
        """Round float32 ``y`` in place to the element's values (saturating if ``clip``), and return it.

        ``scratch`` is float32 of the same shape and is overwritten. ``clip=False`` is for callers who know that no
        ``|y|`` exceeds ``clip_above``. Zeros come out as +0.0.
        """
        if rounding == "away":
            return self._round_away_(y, scratch, clip)
        if self.name == "E2M1":
            power_of_two(y, scratch)
            scratch.clamp_(1.0, 4.0)  # spacing / 0.5, as a power of two
            y.add_(scratch, alpha=_MAGIC_HALF).sub_(scratch, alpha=_MAGIC_HALF)
        else:
            magic = _MAGIC_HALF if self.name == "E1M2" else 2 * _MAGIC_HALF
            y.add_(magic).sub_(magic)
        return y.clamp_(-self.emax, self.emax) if clip else y

    def _round_away_(self, y: Tensor, scratch: Tensor, clip: bool) -> Tensor:
        # Not on the training path of MXFP4 and NVFP4, so plain steps: z = |y| / spacing, floor(z + 1/2), sign back.
        if clip:
            y.clamp_(-self.emax, self.emax)
        if self.name == "E2M1":
            power_of_two(y, scratch).clamp_(1.0, 4.0).mul_(0.5)
        else:
            scratch.fill_(0.5 if self.name == "E1M2" else 1.0)
        magnitude = (y.abs() / scratch).add_(BELOW_HALF).floor_().mul_(scratch)
        # "+ 0.0" turns the -0.0 that copysign makes of small negatives into +0.0.
        return y.copy_(torch.copysign(magnitude, y)).add_(0.0)

    def encode(self, values: Tensor, negative: Tensor) -> Tensor:
        """Codes (uint8) of float32 ``values`` that already are element values; ``negative`` is the sign of the input."""
        if self.name == "INT4":
            return values.to(torch.int8).view(torch.uint8) & 0xF
        index = values.abs().mul_(2).to(torch.uint8)
        if self.name == "E2M1":  # 2|v| is 0 1 2 3 4 6 8 12
            index -= (index > 4).to(torch.uint8)  # 0 1 2 3 4 5 7 11
            index -= (index > 5).to(torch.uint8)  # 0 1 2 3 4 5 6 10
            index.clamp_(max=7)
        return index | (negative.to(torch.uint8) << 3)

    def decode(self, codes: Tensor) -> Tensor:
        """Float32 values of uint8 ``codes`` (low four bits; anything above is an error of the caller's)."""
        return torch.tensor(self.code_values(), dtype=torch.float32, device=codes.device)[codes.long()]

    def code_values(self) -> tuple[float, ...]:
        """What each of the 16 codes stands for; both zeros of the float elements are +0.0."""
        if self.name == "INT4":  # two's complement; -8 decodes, but symmetric quantization never produces it
            return tuple(float(c if c < 8 else c - 16) for c in range(16))
        return self.magnitudes + (0.0,) + tuple(-m for m in self.magnitudes[1:])


E2M1 = Element("E2M1", (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), clip_above=6.99, mantissa_bits=1)
E1M2 = Element("E1M2", (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5), clip_above=3.74, mantissa_bits=2)
INT4 = Element("INT4", tuple(float(i) for i in range(8)), clip_above=7.49, mantissa_bits=2)

ELEMENTS: dict[str, Element] = {e.name: e for e in (E2M1, E1M2, INT4)}
