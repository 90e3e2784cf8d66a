"""Four-bit elements: the few numbers a code can stand for, and how a real number is rounded to one of them.

An element type is its list of eight magnitudes; a code is ``sign << 3 | index``. Rounding never searches that list.
Within a binade the magnitudes are evenly spaced, so adding and subtracting a large float32 whose unit in the last
place *is* the spacing makes the adder do the rounding (to nearest, ties to even):

    E2M1: spacing 0.5 below 2, 1 below 4, 2 up to 6   ->  M = 1.5 * 2^22 * 2^floor(log2 |y|), exponent held in 0..2
    E1M2: spacing 0.5 everywhere up to 3.5            ->  M = 1.5 * 2^22
    INT4: spacing 1 everywhere up to 7                ->  M = 1.5 * 2^23

(The factor 1.5 keeps y + M in M's own binade for both signs of y.) "Even code" and "even multiple of the spacing" are
the same thing in all three. Half-away rounding, which AMXFP4 uses, is ``floor(|y| / spacing + 1/2)``.

Zeros: a negative number that rounds to zero keeps its sign in the code (8, as in every FP4 library), but both zero
codes decode to +0.0, so that the codes and the arithmetic shortcut agree bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

# 1.5 * 2^22 has a unit in the last place of 0.5: adding it to y leaves y rounded to a multiple of 0.5.
_MAGIC_HALF = 1.5 * 2.0**22
# The largest float32 below 0.5. floor(z + this) rounds half away from zero for every z >= 0 up to 2^22, where 0.5
# itself would carry the number just below 0.5 up to 1.
BELOW_HALF = 0.5 - 2.0**-25


@cache
def _exponent_mask(device: torch.device) -> Tensor:
    # Kept as a tensor: a Python number would be made into one at every call. For callers of every mode.
    with torch.inference_mode(False):
        return torch.tensor(0x7F800000, dtype=torch.int32, device=device)


def power_of_two(y: Tensor, out: Tensor) -> Tensor:
    """``2 ** floor(log2 |y|)`` of normal float32 ``y`` (0 of subnormals), by keeping nothing but the exponent bits."""
    torch.bitwise_and(y.view(torch.int32), _exponent_mask(y.device), out=out.view(torch.int32))
    return out


@dataclass(frozen=True)
class Element:
    """A 4-bit number type. ``magnitudes[i]`` is what the low three bits ``i`` of a code stand for.

    ``clip_above``: up to this ``|y|``, rounding alone stays within the magnitudes; above, the result must be clipped.
    """

    name: str
    magnitudes: tuple[float, ...]
    mantissa_bits: int
    clip_above: float
    bits: int = 4

    @property
    def emax(self) -> float:
        """The largest magnitude (6, 3.5 or 7)."""
        return self.magnitudes[-1]

    @property
    def max_exponent(self) -> int:
        """``floor(log2(emax))``: what OCP's MX specification calls the emax of the element."""
        return 2 if self.emax >= 4 else 1

    def round_(self, y: Tensor, scratch: Tensor, *, rounding: str = "even", clip: bool = True) -> Tensor:
        """Round float32 ``y`` in place to values of the element, saturating, and return it.

        ``scratch`` is float32 of the same shape and is overwritten. ``clip=False`` is for callers who know that no
        ``|y|`` exceeds ``clip_above``. Zeros come out as +0.0.
        """
        if rounding == "away":
            return self._round_away_(y, scratch, clip)
        if self.name == "E2M1":
            power_of_two(y, scratch).clamp_(1.0, 4.0)  # twice the spacing
            y.add_(scratch, alpha=_MAGIC_HALF).sub_(scratch, alpha=_MAGIC_HALF)
        else:
            magic = _MAGIC_HALF if self.name == "E1M2" else 2 * _MAGIC_HALF
            y.add_(magic).sub_(magic)
        return y.clamp_(-self.emax, self.emax) if clip else y

    def _round_away_(self, y: Tensor, scratch: Tensor, clip: bool) -> Tensor:
        if clip:
            y.clamp_(-self.emax, self.emax)
        if self.name == "E2M1":
            power_of_two(y, scratch).clamp_(1.0, 4.0).mul_(0.5)
        else:
            scratch.fill_(0.5 if self.name == "E1M2" else 1.0)
        magnitude = y.abs().div_(scratch).add_(BELOW_HALF).floor_().mul_(scratch)
        # "+ 0.0" turns the -0.0 that copysign makes of a small negative number into +0.0.
        return torch.copysign(magnitude, y, out=y).add_(0.0)

    def encode(self, values: Tensor, negative: Tensor) -> Tensor:
        """Codes (uint8) of float32 ``values`` that are element values already; ``negative``: the sign of the input."""
        if self.name == "INT4":
            return values.to(torch.int8).view(torch.uint8) & 0xF
        index = values.abs().mul_(2).to(torch.uint8)
        if self.name == "E2M1":  # 2|v| is 0 1 2 3 4 6 8 12
            index -= (index > 4).to(torch.uint8)  # 0 1 2 3 4 5 7 11
            index -= (index > 5).to(torch.uint8)  # 0 1 2 3 4 5 6 10
            index.clamp_(max=7)
        return index | (negative.to(torch.uint8) << 3)

    def decode(self, codes: Tensor) -> Tensor:
        """Float32 values of ``codes`` (uint8, 0..15)."""
        return torch.tensor(self.code_values(), dtype=torch.float32, device=codes.device)[codes.long()]

    def code_values(self) -> tuple[float, ...]:
        """What each of the 16 codes stands for. Both zeros of the float elements are +0.0."""
        if self.name == "INT4":  # two's complement; -8 decodes, but symmetric quantization never produces it
            return tuple(float(code if code < 8 else code - 16) for code in range(16))
        return self.magnitudes + (0.0,) + tuple(-m for m in self.magnitudes[1:])


E2M1 = Element("E2M1", (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), mantissa_bits=1, clip_above=6.99)
E1M2 = Element("E1M2", (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5), mantissa_bits=2, clip_above=3.74)
INT4 = Element("INT4", tuple(float(i) for i in range(8)), mantissa_bits=2, clip_above=7.49)

#: The elements by name.
ELEMENTS: dict[str, Element] = {element.name: element for element in (E2M1, E1M2, INT4)}
