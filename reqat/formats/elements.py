"""Elements: the few numbers a code of 2, 3, 4 or 8 bits can stand for, and how a real number is rounded to one of them.

An element type is its list of magnitudes. A code of a float element is ``sign << (bits - 1) | index`` into it; codes of
signed integers are two's complement. Rounding never searches the list. Within a binade the magnitudes are evenly
spaced, so
adding and subtracting a large float32 whose unit in the last place *is* the spacing makes the adder do the rounding (to
nearest, ties to even)::

    E2M1: spacing 0.5 below 2, 1 below 4, 2 up to 6     ->  M = 1.5 * 2^22 * 2^floor(log2 |y|), exponent held in 0..2
    E4M3: an eighth of the binade, 2^-9 below 2^-6      ->  M = 1.5 * 2^20 * 2^floor(log2 |y|), exponent held in -6..8
    E1M2: spacing 0.5 everywhere up to 3.5              ->  M = 1.5 * 2^22
    integers, TERNARY: spacing 1                        ->  M = 1.5 * 2^23

(The factor 1.5 keeps y + M in M's own binade for both signs of y.) "Even code" and "even multiple of the spacing" are
the same thing in all of them. Half-away rounding, which AMXFP4 uses, is ``floor(|y| / spacing + 1/2)``.

Signed integers are symmetric: quantization never produces the lowest one (-8 of INT4). Unsigned ones (UINT4, 0 to 15)
belong to affine formats, which add a block's zero point to what was rounded (quantize.py). TERNARY is -1, 0, 1, as
INT2; where its threshold lies is a matter of the scale rule (``twn`` in quantize.py). MID2 is -1.5, -0.5, 0.5, 1.5, an
integer plus one half: with few bits a code spent on zero is missed elsewhere. Nothing in it stands for zero.

Zeros: a negative number that rounds to zero keeps its sign in the code of a float element (8 of four bits, as in every
FP4 library), but both zero codes decode to +0.0, so that the codes and the arithmetic shortcut agree bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from reqat.config.formats import ELEMENT_BITS

# 1.5 * 2^23 has a unit in the last place of 1: adding it to y leaves y rounded to a whole number.
_MAGIC = 1.5 * 2.0**23
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
    """A number type of few bits, by the magnitudes that it has, in order.

    ``clip_above``: up to this ``|y|``, rounding alone stays within the magnitudes; above, the result must be clipped.
    ``integer``: codes are two's complement, or without ``signed`` the numbers themselves; the value of a code is its
    number plus ``offset``.
    ``binades``: exponents of the lowest and the highest binade with a spacing
    of its own; alike where the spacing is the same everywhere.
    """

    name: str
    magnitudes: tuple[float, ...]
    mantissa_bits: int
    clip_above: float
    integer: bool = False
    signed: bool = True
    offset: float = 0.0
    binades: tuple[int, int] = (0, 0)

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return ELEMENT_BITS[self.name]

    @property
    def emax(self) -> float:
        """The largest magnitude (6 of E2M1)."""
        return self.magnitudes[-1]

    @property
    def max_exponent(self) -> int:
        """``floor(log2(emax))``: what OCP's MX specification calls the emax of the element."""
        return math.frexp(self.emax)[1] - 1

    def round_(self, y: Tensor, scratch: Tensor, *, rounding: str = "even", clip: bool = True) -> Tensor:
        """Round float32 ``y`` in place to values of the element, saturating, and return it.

        ``scratch`` is float32 of the same shape and is overwritten. ``clip=False`` is for callers who know that no
        ``|y|`` exceeds ``clip_above``. Zeros come out as +0.0.
        """
        if self.offset:
            return self._round_between_(y, scratch, rounding)
        if rounding == "away":
            return self._round_away_(y, scratch, clip)
        low, high = self.binades
        if low < high:
            power_of_two(y, scratch).clamp_(2.0**low, 2.0**high)
            magic = _MAGIC * 2.0**-self.mantissa_bits
            y.add_(scratch, alpha=magic).sub_(scratch, alpha=magic)
        else:
            magic = _MAGIC * self._spacing
            y.add_(magic).sub_(magic)
        return y.clamp_(-self.emax, self.emax) if clip else y

    @property
    def _spacing(self) -> float:
        """Between neighbouring magnitudes, at the lower end."""
        return self.magnitudes[1] - self.magnitudes[0]

    def _round_away_(self, y: Tensor, scratch: Tensor, clip: bool) -> Tensor:
        if clip:
            y.clamp_(-self.emax, self.emax)
        low, high = self.binades
        if low < high:
            power_of_two(y, scratch).clamp_(2.0**low, 2.0**high).mul_(2.0**-self.mantissa_bits)
        else:
            scratch.fill_(self._spacing)
        magnitude = y.abs().div_(scratch).add_(BELOW_HALF).floor_().mul_(scratch)
        # "+ 0.0" turns the -0.0 that copysign makes of a small negative number into +0.0.
        return torch.copysign(magnitude, y, out=y).add_(0.0)

    def _round_between_(self, y: Tensor, scratch: Tensor, rounding: str) -> Tensor:
        """To half-integers: the middle of the integers that y lies between. Whole numbers are the ties."""
        y.clamp_(-self.emax, self.emax)
        if rounding == "away":
            return torch.copysign(torch.abs(y, out=scratch).floor_().add_(self.offset), y, out=y)
        torch.floor(y, out=scratch)
        odd = scratch.remainder(2).mul_(y == scratch)  # an odd whole number goes down, to the even code
        return y.copy_(scratch).sub_(odd).add_(self.offset)

    def encode(self, values: Tensor, negative: Tensor) -> Tensor:
        """Codes (uint8) of float32 ``values`` that are element values already; ``negative``: the sign of the input."""
        if self.integer:
            return (values - self.offset).to(torch.int8).view(torch.uint8) & (2**self.bits - 1)
        if self.name == "E4M3":
            index = values.abs().to(torch.float8_e4m3fn).view(torch.uint8)
        else:
            index = values.abs().mul_(2).to(torch.uint8)
        if self.name == "E2M1":  # 2|v| is 0 1 2 3 4 6 8 12
            index -= (index > 4).to(torch.uint8)  # 0 1 2 3 4 5 7 11
            index -= (index > 5).to(torch.uint8)  # 0 1 2 3 4 5 6 10
            index.clamp_(max=7)
        return index | (negative.to(torch.uint8) << (self.bits - 1))

    def decode(self, codes: Tensor) -> Tensor:
        """Float32 values of ``codes`` (uint8, 0 to ``2**bits - 1``)."""
        return torch.tensor(self.code_values(), dtype=torch.float32, device=codes.device)[codes.long()]

    def code_values(self) -> tuple[float, ...]:
        """What each code stands for. Both zeros of the float elements are +0.0; E4M3's codes 127 and 255 are NaN."""
        half = 2 ** (self.bits - 1)
        if not self.signed:
            return tuple(float(code) for code in range(2 * half))
        if self.integer:  # the lowest decodes, but symmetric quantization never produces it, unless there is an offset
            return tuple(self.offset + (code if code < half else code - 2 * half) for code in range(2 * half))
        upper = (math.nan,) * (half - len(self.magnitudes))
        return self.magnitudes + upper + (0.0,) + tuple(-m for m in self.magnitudes[1:]) + upper


E2M1 = Element("E2M1", (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), mantissa_bits=1, clip_above=6.99, binades=(0, 2))
E1M2 = Element("E1M2", (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5), mantissa_bits=2, clip_above=3.74)


def _integer(name: str) -> Element:
    """A signed symmetric integer: 0 to ``2**(bits - 1) - 1``."""
    largest = 2 ** (ELEMENT_BITS[name] - 1) - 1
    magnitudes = tuple(float(i) for i in range(largest + 1))
    return Element(name, magnitudes, mantissa_bits=ELEMENT_BITS[name] - 2, clip_above=largest + 0.49, integer=True)


def _unsigned(name: str) -> Element:
    """0 to ``2**bits - 1``. Rounding alone may leave that range: what is rounded has no zero point yet."""
    largest = 2 ** ELEMENT_BITS[name] - 1
    return Element(
        name,
        tuple(map(float, range(largest + 1))),
        mantissa_bits=ELEMENT_BITS[name] - 1,
        clip_above=largest + 0.49,
        integer=True,
        signed=False,
    )


def _between(name: str) -> Element:
    """The numbers in the middle between integers, as many on each side of zero."""
    magnitudes = tuple(i + 0.5 for i in range(2 ** (ELEMENT_BITS[name] - 1)))
    return Element(
        name,
        magnitudes,
        mantissa_bits=ELEMENT_BITS[name] - 1,
        clip_above=magnitudes[-1] + 0.49,
        integer=True,
        offset=0.5,
    )


# OCP's 8-bit float as NVIDIA's GPUs have it: exponent bias 7, no infinity, up to 448.
E4M3 = Element(
    "E4M3",
    tuple(m * 2.0**-9 for m in range(8))
    + tuple((8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8))[:-1],
    mantissa_bits=3,
    clip_above=463.0,
    binades=(-6, 8),
)

#: The elements by name.
ELEMENTS: dict[str, Element] = {
    element.name: element
    for element in (
        E2M1,
        E1M2,
        *map(_integer, ("INT4", "INT2", "INT3", "INT8", "TERNARY")),
        *map(_unsigned, ("UINT2", "UINT3", "UINT4")),
        *map(_between, ("MID2", "MID3", "MID4")),
        E4M3,
    )
}
