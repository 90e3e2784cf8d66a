"""Two 4-bit codes a byte: the low nibble holds the even index along the axis, the high nibble the odd one."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from reqat.formats.checks import check_codes, check_construction
from reqat.formats.format import Format
from reqat.formats.quantize import QuantizedTensor


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """A :class:`QuantizedTensor` with ``packed`` uint8, half as long along ``axis`` (rounded up) as its codes.

    Checked like it when it is made.
    """

    packed: Tensor
    scales: Tensor
    global_scale: Tensor | None
    format: Format
    axis: int
    shape: torch.Size
    dtype: torch.dtype

    def __post_init__(self) -> None:
        check_construction(
            self.packed, self.scales, self.global_scale, self.format, self.axis, self.shape, self.dtype, packed=True
        )

    @classmethod
    def unchecked(cls, *parts: Any) -> PackedTensor:
        """Of the fields in order, as a kernel has just written them, whose numbers the caller wants not looked at."""
        made = object.__new__(cls)
        for field, part in zip(fields(cls), parts, strict=True):
            object.__setattr__(made, field.name, part)
        return made

    @classmethod
    def from_quantized(cls, q: QuantizedTensor) -> PackedTensor:
        """Pack the codes of ``q``; the scales are shared, not copied. Raises ValueError for codes above 15."""
        check_codes(q.codes)
        packed = pack_codes(q.codes, q.axis)
        return cls(packed, q.scales, q.global_scale, q.format, q.axis, q.shape, q.dtype)

    def unpack(self) -> QuantizedTensor:
        """The tensor that was packed."""
        length = self.shape[self.axis]
        if self.format.block:
            length = -(-length // self.format.block) * self.format.block
        codes = unpack_codes(self.packed, length, self.axis)
        return QuantizedTensor(codes, self.scales, self.global_scale, self.format, self.axis, self.shape, self.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """``unpack().dequantize(dtype)``."""
        return self.unpack().dequantize(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        g = self.global_scale
        return self.packed.nbytes + self.scales.nbytes + (0 if g is None else g.nbytes)


def pack_codes(codes: Tensor, axis: int = -1) -> Tensor:
    """Pack 4-bit ``codes`` (uint8) in pairs along ``axis``: low nibble even index. An odd length gets a zero code.

    Codes above 15 would run into their neighbours; :func:`reqat.formats.checks.check_codes` looks for them.
    """
    codes = codes.movedim(axis, -1)
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return (codes[..., ::2] | (codes[..., 1::2] << 4)).movedim(-1, axis).contiguous()


def unpack_codes(packed: Tensor, length: int, axis: int = -1) -> Tensor:
    """The inverse of :func:`pack_codes`; ``length`` is the number of codes along ``axis``."""
    packed = packed.movedim(axis, -1)
    if packed.dtype != torch.uint8 or packed.shape[-1] != (length + 1) // 2:
        raise ValueError(
            f"packed codes of {length} elements must be uint8 with {(length + 1) // 2} bytes along axis {axis}, got "
            f"{packed.dtype} with {packed.shape[-1]}"
        )
    codes = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)[..., :length]
    return codes.movedim(-1, axis).contiguous()
