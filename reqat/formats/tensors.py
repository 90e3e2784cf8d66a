"""Quantized tensors: codes and scales, one code a byte (:class:`QuantizedTensor`) or packed (:class:`PackedTensor`).

Packed, a byte holds four codes of 2 bits, two of 3 or 4, or one of 8, neighbours along the axis from the low bits up:
of four bits the low nibble holds the even index, the high nibble the odd one.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from reqat.formats.checks import check_codes, check_construction, check_parts
from reqat.formats.format import Format
from reqat.formats.scales import FLOAT32_MAX, e8m0_to_float, effective_scale
from reqat.formats.subnormals import subnormals_kept


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """Codes and scales of one tensor.

    ``codes``: uint8, a code of ``format.bits`` bits an element, in the input's shape (longer along ``axis`` if padded).
    ``scales``: one a block, in the input's shape with ``axis`` as long as there are blocks, in the stored type (E8M0:
    uint8 exponents; E4M3, E5M2: torch's float8; FP16; FP32). A last axis of 2 holds [positive, negative] of AMXFP4,
    [scale, zero point] of affine formats.
    ``global_scale``: float32 divisor g, a scalar, or (``row``) the input's shape with ``axis`` of length 1; or None.
    ``shape`` and ``dtype`` are the input's; ``axis`` counts from 0.

    Parts that do not belong together, and scales that are NaN, infinite or negative, raise ValueError
    (:mod:`reqat.formats.checks`).
    """

    codes: Tensor
    scales: Tensor
    global_scale: Tensor | None
    format: Format
    axis: int
    shape: torch.Size
    dtype: torch.dtype

    def __post_init__(self) -> None:
        check_construction(
            self.codes, self.scales, self.global_scale, self.format, self.axis, self.shape, self.dtype, packed=False
        )

    def check(self, name: str | None = None) -> None:
        """Raise ValueError unless every number is valid too: :func:`reqat.formats.checks.check_parts`."""
        check_parts(
            self.codes, self.scales, self.global_scale, self.format, self.axis, self.shape, dtype=self.dtype, name=name
        )

    def block_scales(self) -> Tensor:
        """What codes (affine formats: less their zero points) are multiplied by, float32: ``s / g``, or ``s``. In the
        shape of ``scales``, of affine formats without its last axis."""
        s = self.scales[..., 0] if self.format.zero_point else self.scales
        s = e8m0_to_float(s) if self.format.scale == "E8M0" else s.float()
        if self.format.zero_point:
            return s
        with subnormals_kept(s):
            return effective_scale(s, self.global_scale, self.format.scale_rule)

    def zero_points(self) -> Tensor:
        """The zero points of an affine format, whole numbers in float32, in the shape of :meth:`block_scales`."""
        assert self.format.zero_point
        return self.scales[..., 1].float()

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The numbers that codes and scales stand for, in the input's shape and type (or ``dtype``).

        ``value(code) * S`` (affine: ``(code - z) * S``) in float32, then rounded to ``dtype``, saturating at its
        largest number. Zeros are +0.0.
        """
        check_codes(self.codes, self.format.bits)
        with subnormals_kept(self.codes):
            return self._dequantized(dtype or self.dtype)

    def _dequantized(self, dtype: torch.dtype) -> Tensor:
        codes = self.codes.movedim(self.axis, -1)
        values = self.format.element_type.decode(codes)
        if self.format.zero_point:
            values -= self._each(self.zero_points(), values)
        values *= self._element_scales(values)
        limit = largest(dtype)
        values = values.clamp_(-limit, limit).to(dtype)[..., : self.shape[self.axis]]
        return values.movedim(-1, self.axis).contiguous()

    def element_scales(self, x: Tensor | None = None) -> Tensor:
        """What each code is multiplied by, float32, in the input's shape.

        AMXFP4 has one scale a sign, and a code of zero has none: the positive one is given for it, or, with the input
        ``x``, that of the sign of its number.
        """
        codes = self.codes.movedim(self.axis, -1)
        values = self.format.element_type.decode(codes)
        if x is not None:
            values[..., : self.shape[self.axis]] = x.movedim(self.axis, -1)
        with subnormals_kept(self.codes):
            S = self._element_scales(values)
        return S[..., : self.shape[self.axis]].movedim(-1, self.axis).contiguous()

    def _element_scales(self, values: Tensor) -> Tensor:
        """The same for ``values``, decoded or of the input, the quantized axis last, padding included."""
        S = self.block_scales()
        if not self.format.asymmetric:
            return self._each(S, values)
        positive, negative = (self._each(S[..., sign], values) for sign in (0, 1))
        return torch.where(values < 0, negative, positive)

    def _each(self, S: Tensor, codes: Tensor) -> Tensor:
        """One scale an element, from one a block."""
        S = S.movedim(self.axis, -1)
        return S.repeat_interleave(codes.shape[-1] // max(1, S.shape[-1]), dim=-1)

    def pack(self) -> PackedTensor:
        """Several codes a byte; see :class:`reqat.formats.PackedTensor`."""
        return PackedTensor.from_quantized(self)

    @property
    def nbytes(self) -> int:
        """Bytes that the packed tensor takes: packed codes, the scales, the global scale."""
        rows = self.codes.numel() // max(1, self.codes.shape[self.axis])
        packed = rows * -(-self.codes.shape[self.axis] // self.format.codes_per_byte)
        return packed + self.scales.nbytes + (0 if self.global_scale is None else self.global_scale.nbytes)

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same on another device."""
        g = None if self.global_scale is None else self.global_scale.to(device)
        codes, scales = self.codes.to(device), self.scales.to(device)
        return QuantizedTensor(codes, scales, g, self.format, self.axis, self.shape, self.dtype)


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """A :class:`QuantizedTensor` with ``packed`` uint8, ``format.codes_per_byte`` times shorter along ``axis`` (rounded
    up) than its codes.

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
        """Pack the codes of ``q``; the scales are shared, not copied. Raises ValueError for codes of too many bits."""
        check_codes(q.codes, q.format.bits)
        packed = pack_codes(q.codes, q.axis, per_byte=q.format.codes_per_byte)
        return cls(packed, q.scales, q.global_scale, q.format, q.axis, q.shape, q.dtype)

    def unpack(self) -> QuantizedTensor:
        """The tensor that was packed."""
        length = self.shape[self.axis]
        if self.format.block:
            length = -(-length // self.format.block) * self.format.block
        codes = unpack_codes(self.packed, length, self.axis, per_byte=self.format.codes_per_byte)
        return QuantizedTensor(codes, self.scales, self.global_scale, self.format, self.axis, self.shape, self.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """``unpack().dequantize(dtype)``."""
        return self.unpack().dequantize(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        g = self.global_scale
        return self.packed.nbytes + self.scales.nbytes + (0 if g is None else g.nbytes)


def pack_codes(codes: Tensor, axis: int = -1, *, per_byte: int = 2) -> Tensor:
    """Pack ``codes`` (uint8) along ``axis``, ``per_byte`` (4, 2 or 1) neighbours a byte, the first in the low bits.

    An odd length gets zero codes. Codes of more than ``8 / per_byte`` bits would run into their neighbours;
    :func:`reqat.formats.checks.check_codes` looks for them.
    """
    codes = codes.movedim(axis, -1)
    if missing := -codes.shape[-1] % per_byte:
        codes = torch.nn.functional.pad(codes, (0, missing))
    packed = codes[..., ::per_byte]
    for i in range(1, per_byte):
        packed = packed | (codes[..., i::per_byte] << (i * 8 // per_byte))
    return packed.movedim(-1, axis).contiguous()


def unpack_codes(packed: Tensor, length: int, axis: int = -1, *, per_byte: int = 2) -> Tensor:
    """The inverse of :func:`pack_codes`; ``length`` is the number of codes along ``axis``."""
    packed = packed.movedim(axis, -1)
    nbytes, width = -(-length // per_byte), 8 // per_byte
    if packed.dtype != torch.uint8 or packed.shape[-1] != nbytes:
        raise ValueError(
            f"packed codes of {length} elements must be uint8 with {nbytes} bytes along axis {axis}, got "
            f"{packed.dtype} with {packed.shape[-1]}"
        )
    parts = [(packed >> (i * width)) & (2**width - 1) for i in range(per_byte)]
    codes = torch.stack(parts, dim=-1).flatten(-2)[..., :length]
    return codes.movedim(-1, axis).contiguous()


def largest(dtype: torch.dtype) -> float:
    """The largest number that an output of this type may hold (values are float32 before)."""
    return min(torch.finfo(dtype).max, FLOAT32_MAX)
