"""Quantize a tensor to codes and scales, and back.

Two ways to the same numbers. ``quantize`` writes codes; its ``dequantize`` multiplies each code's value by its scale.
``quantize_dequantize`` is what training calls, millions of times: it never forms codes, works in float32 in pieces that
stay in the cache, and a property test holds it bit-equal to ``dequantize(quantize(x))``. Both share every function that
rounds: ``_scales`` chooses the scales, ``_round_blocks_`` rounds ``x / S`` to element values.

Arithmetic, for block scale ``S`` (float32; for NVFP4 ``S = s / g``, see scales.py):

    S = rule(max |x| over the block);   v = round_element(x / S);   x^ = v * S

All of it in float32, whatever the input's type: float16 and bfloat16 are exact in float32, float64 is rounded to it
first (and must be in its range). The result is rounded once more to the output's type, saturating.

Shapes: a tensor is seen as [N, B], N blocks of B elements; the blocks of one row (same index on the other axes) follow
each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reqat.formats.format import Format, get_format
from reqat.formats.scales import (
    SCALE_TYPES,
    divide,
    e8m0_from_amax,
    e8m0_to_float,
    effective_scale,
    global_scale_from_amax,
    nvfp4_scales,
    replace_zero_,
    round_to_float,
)

if TYPE_CHECKING:
    from reqat.formats.packing import PackedTensor

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INFINITY_BITS = 0x7F800000
# Elements handled at a time on a CPU: three float32 buffers of this size (768 KiB) stay in a core's cache.
_CHUNK = 65536


@dataclass(frozen=True)
class QuantizedTensor:
    """Codes and scales of one tensor.

    ``codes``: uint8, one 4-bit code an element, shape of the input (longer along ``axis`` if it was padded).
    ``scales``: one a block: the input's shape with the length of ``axis`` replaced by the number of blocks, in the stored
    type (E8M0: uint8 exponents; E4M3, E5M2: float8; FP16; FP32); AMXFP4 adds a last axis of 2, [positive, negative].
    ``global_scale``: float32 divisor g, a scalar, or the input's shape with ``axis`` replaced by 1 (``row``); or None.
    ``shape``, ``dtype``: of the input. ``axis`` counts from 0.
    """

    codes: Tensor
    scales: Tensor
    global_scale: Tensor | None
    format: Format
    axis: int
    shape: torch.Size
    dtype: torch.dtype

    def block_scales(self) -> Tensor:
        """What codes are multiplied by, float32, in the shape of ``scales``: ``s / g``, or ``s``."""
        s = e8m0_to_float(self.scales) if self.format.scale == "E8M0" else self.scales.float()
        g = self.global_scale
        return effective_scale(s, g, self.format.scale_rule)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The numbers that codes and scales stand for, in the input's shape and type (or ``dtype``).

        ``value(code) * S`` in float32, then rounded to ``dtype``, saturating at its largest number. Zeros are +0.0.
        """
        dtype = dtype or self.dtype
        element = self.format.element_type
        codes = self.codes.movedim(self.axis, -1)
        values = element.decode(codes)
        last = 1 if self.format.asymmetric else 0
        S = self.block_scales().movedim(self.axis, -1 - last)
        if self.format.asymmetric:
            S = S.repeat_interleave(codes.shape[-1] // max(1, S.shape[-2]), dim=-2)
            values *= torch.where(values < 0, S[..., 1], S[..., 0])
        else:
            values *= S.repeat_interleave(codes.shape[-1] // max(1, S.shape[-1]), dim=-1)
        limit = torch.finfo(dtype).max if dtype.is_floating_point and dtype != torch.float64 else math.inf
        values = values.clamp_(-limit, limit).to(dtype)[..., : self.shape[self.axis]]
        return values.movedim(-1, self.axis).contiguous()

    def pack(self) -> PackedTensor:
        """Two codes a byte; see :class:`reqat.formats.packing.PackedTensor`."""
        from reqat.formats.packing import PackedTensor

        return PackedTensor.from_quantized(self)

    @property
    def nbytes(self) -> int:
        """Bytes that the packed tensor takes: half a byte an element, the scales, the global scale."""
        g = self.global_scale
        return (self.codes.numel() + 1) // 2 + self.scales.nbytes + (0 if g is None else g.nbytes)

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """A copy on that device."""
        g = None if self.global_scale is None else self.global_scale.to(device)
        return QuantizedTensor(
            self.codes.to(device), self.scales.to(device), g, self.format, self.axis, self.shape, self.dtype
        )


@torch.no_grad()
def quantize(
    x: Tensor,
    fmt: str | Format,
    *,
    axis: int = -1,
    pad: bool = False,
    global_scale: Tensor | float | str | None = None,
    name: str | None = None,
    **options: str,
) -> QuantizedTensor:
    """Quantize ``x`` in blocks along ``axis``.

    Args:
        x: float16, bfloat16, float32 or float64, at least one axis, any strides.
        fmt: a Format or the name of one, see :func:`reqat.formats.get_format` for names and ``options``.
        axis: the axis that blocks run along.
        pad: append zeros where ``x``'s length along ``axis`` is not a multiple of the block, instead of an error.
        global_scale: ``"dynamic"``, ``"row"`` or ``"static"`` (an option of the format), or the value itself: a scalar,
            or one for each row (``x``'s shape with ``axis`` replaced by 1). A value replaces what the format would compute.
        name: what to call ``x`` in an error.

    Raises:
        ValueError: NaN or infinity in ``x`` (float64: beyond the float32 range); a length that the block does not divide;
            an unknown format or option; a static format without a value; a value that is not positive and finite.
    """
    fmt, given = _resolve(fmt, global_scale, options)
    blocks = _to_blocks(x, axis, fmt, pad, name)
    scaled = _scales(blocks, fmt, given, name)
    codes = torch.empty(blocks.x.shape, dtype=torch.uint8, device=x.device)
    element = fmt.element_type
    for piece, S, out in _pieces(blocks.x, scaled.effective, codes):
        y = _divide(piece, S, torch.empty(piece.shape, device=x.device))
        values = element.round_(y, torch.empty_like(y), rounding=fmt.rounding, clip=scaled.clip)
        out.copy_(element.encode(values, torch.signbit(piece)))
    return QuantizedTensor(
        codes=blocks.restore(codes),
        scales=blocks.restore_scales(scaled.stored()),
        global_scale=blocks.restore_global_scale(scaled.global_scale),
        format=fmt,
        axis=axis % x.ndim,
        shape=x.shape,
        dtype=x.dtype,
    )


@torch.no_grad()
def quantize_dequantize(
    x: Tensor,
    fmt: str | Format,
    *,
    axis: int = -1,
    pad: bool = False,
    global_scale: Tensor | float | str | None = None,
    name: str | None = None,
    **options: str,
) -> Tensor:
    """``quantize(x, ...).dequantize()``, bit for bit, without forming codes. Same arguments and errors; no gradient."""
    fmt, given = _resolve(fmt, global_scale, options)
    blocks = _to_blocks(x, axis, fmt, pad, name)
    scaled = _scales(blocks, fmt, given, name)
    out = torch.empty(blocks.x.shape, dtype=x.dtype, device=x.device)
    element, rounding, clip = fmt.element_type, fmt.rounding, scaled.clip
    limit = torch.finfo(x.dtype).max
    saturate = scaled.top > limit / 2  # rounding up may step over the largest number of the type
    scratch = buffer = None
    for piece, S, target in _pieces(blocks.x, scaled.effective, out):
        if scratch is None:
            scratch = torch.empty(piece.shape, dtype=torch.float32, device=x.device)
            buffer = None if x.dtype == torch.float32 else torch.empty_like(scratch)
        y = _divide(piece, S, target if buffer is None else buffer[: len(piece)])
        _multiply_(element.round_(y, scratch[: len(piece)], rounding=rounding, clip=clip), S)
        if saturate:
            y.clamp_(-limit, limit)
        if buffer is not None:
            target.copy_(y)
    return blocks.restore(out, crop=True)


def global_scale_for(x: Tensor, fmt: str | Format, *, axis: int = -1, name: str | None = None) -> Tensor:
    """The global scale that NVFP4 computes for ``x``: ``g = 448 * emax / amax`` in float32 (256 for four-over-six).

    ``dynamic`` and ``static``: a scalar. ``row``: ``x``'s shape with ``axis`` replaced by 1, amax over ``axis`` only.
    ``x`` need not divide into blocks. An all-zero tensor or row gets 1. Raises ValueError for NaN or infinity.
    """
    fmt = get_format(fmt) if isinstance(fmt, str) else fmt
    if not fmt.has_global_scale:
        raise ValueError(f"{fmt.name} has no global scale; formats that have one: NVFP4, NVFP4-4/6")
    magnitude = x.detach().abs().to(torch.float32)
    amax = magnitude.amax(axis, keepdim=True) if fmt.global_scale == "row" else magnitude.amax()
    if not bool(torch.isfinite(amax).all()):
        raise _not_finite(x, name)
    return global_scale_from_amax(amax, fmt.scale_cap, fmt.element_type.emax)


# --- inside -----------------------------------------------------------------------------------------------------------


def _resolve(
    fmt: str | Format, global_scale: Tensor | float | str | None, options: dict[str, str]
) -> tuple[Format, Tensor | float | None]:
    if isinstance(global_scale, str):
        options = {**options, "global_scale": global_scale}
        global_scale = None
    if options or not isinstance(fmt, Format):
        fmt = get_format(fmt, **options)
    if global_scale is not None and not fmt.has_global_scale:
        raise ValueError(f"{fmt.name} has no global scale, but one was given; formats that have one: NVFP4, NVFP4-4/6")
    return fmt, global_scale


@dataclass
class _Blocks:
    """``x`` as [N, B], and the way back: ``order`` permuted the input's axes so that the quantized axis came last."""

    x: Tensor
    ordered: tuple[int, ...]  # the permuted shape, before padding
    padded: int  # length of the quantized axis after padding
    order: tuple[int, ...]

    @property
    def rows(self) -> int:
        return math.prod(self.ordered[:-1])

    def _back(self, t: Tensor, extra: int = 0) -> Tensor:
        if self.order[:-1] == tuple(range(len(self.order) - 1)):
            return t
        inverse = [0] * len(self.order)
        for new, old in enumerate(self.order):
            inverse[old] = new
        return t.permute(*inverse, *range(len(inverse), len(inverse) + extra))

    def restore(self, t: Tensor, crop: bool = False) -> Tensor:
        t = t.view(*self.ordered[:-1], self.padded)
        return self._back(t[..., : self.ordered[-1]] if crop and self.padded != self.ordered[-1] else t)

    def restore_scales(self, s: Tensor) -> Tensor:
        blocks = self.padded // self.x.shape[1] if self.padded else 0
        trailing = s.shape[1:] if s.ndim == 2 and s.shape[1] == 2 else ()
        return self._back(s.reshape(*self.ordered[:-1], blocks, *trailing), len(trailing)).contiguous()

    def restore_global_scale(self, g: Tensor | None) -> Tensor | None:
        if g is None or g.ndim == 0:
            return g
        return self._back(g.view(*self.ordered[:-1], 1)).contiguous()


@dataclass
class _Scales:
    """Chosen scales of [N, B] blocks."""

    s: Tensor  # the numbers to store: float32, or exponents of E8M0 as int32; [N] or [N, 2]
    effective: Tensor  # float32 S, [N, 1] or [N, 2]
    global_scale: Tensor | None
    clip: bool  # whether some |x| / S lies so far above the largest magnitude that rounding alone does not saturate
    top: float  # max |x|
    dtype: torch.dtype

    def stored(self) -> Tensor:
        return self.s.to(self.dtype)


def _divide(x: Tensor, S: Tensor, out: Tensor) -> Tensor:
    """``x / S`` into float32 ``out``; of two scales, negative numbers take the second."""
    if S.shape[1] == 1:
        return torch.div(x, S, out=out) if x.dtype == torch.float32 else out.copy_(x).div_(S)
    # A sum of which one term is zero: exact, and faster than selecting a scale for each element.
    negative = x.clamp(max=0).to(torch.float32)
    return out.copy_(x).clamp_(min=0).div_(S[:, :1]).addcdiv_(negative, S[:, 1:])


def _multiply_(v: Tensor, S: Tensor) -> Tensor:
    """``v * S`` in place; the inverse of :func:`_divide`."""
    if S.shape[1] == 1:
        return v.mul_(S)
    negative = v.clamp(max=0)
    return v.clamp_(min=0).mul_(S[:, :1]).addcmul_(negative, S[:, 1:])


def _to_blocks(x: Tensor, axis: int, fmt: Format, pad: bool, name: str | None) -> _Blocks:
    label = name or "tensor"
    if x.dtype not in _DTYPES:
        raise ValueError(f"{label} has dtype {x.dtype}; quantization takes {', '.join(str(d) for d in _DTYPES)}")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"{label} of shape {tuple(x.shape)} has no axis {axis}")
    axis %= x.ndim
    length = x.shape[axis]
    block = fmt.block or max(1, length)
    padded = -(-length // block) * block
    if padded != length and not pad:
        raise ValueError(
            f"{label} of shape {tuple(x.shape)}: length {length} along axis {axis} is not a multiple of {fmt.name}'s "
            f"block of {block}; pass pad=True to append {padded - length} zeros"
        )
    # Any order of the other axes gives the same blocks, so take the one that x has in memory: a transposed view such as
    # keys [B, H, T, D] of [B, T, H, D] then needs no copy, and the result keeps x's strides.
    others = sorted((a for a in range(x.ndim) if a != axis), key=lambda a: -x.stride(a))
    order = (*others, axis)
    ordered = x.permute(order)
    if padded != length:
        flat = torch.nn.functional.pad(ordered, (0, padded - length))
    else:
        flat = ordered.contiguous()
    return _Blocks(flat.view(-1, block), tuple(ordered.shape), padded, order)


def _pieces(x: Tensor, *others: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Go through [N, B] and tensors of the same N together, a cache-sized piece at a time (whole on a GPU)."""
    if x.numel() <= _CHUNK or x.device.type != "cpu":
        return ((x, *others),)
    step = max(1, _CHUNK // x.shape[1])
    return zip(x.split(step), *(t.split(step) for t in others), strict=True)


def _block_amax(x: Tensor) -> Tensor:
    """Largest magnitude of each block of [N, B], float32 [N]. NaN and infinity stay above every number.

    Compares the bits of |x| as integers: the same order as the numbers, and half the time of a float maximum, which has
    to look for NaN. NaN's bits lie above infinity's.
    """
    amax = torch.empty(len(x), dtype=torch.int32, device=x.device)
    buffer: Tensor | None = None
    for piece, out in _pieces(x, amax):
        if buffer is None:
            buffer = torch.empty(piece.shape, dtype=torch.float32, device=x.device)
        y = buffer[: len(piece)]
        if x.dtype == torch.float32:
            torch.abs(piece, out=y)
        else:
            y.copy_(piece).abs_()
        torch.amax(y.view(torch.int32), -1, out=out)
    return amax.view(torch.float32)


def _signed_amax(x: Tensor) -> Tensor:
    """Largest positive and largest negated negative number of each block (0 if none), float32 [N, 2].

    As above: numbers of the other sign are negative integers, and a NaN of either sign shows in one of the two.
    """
    amax = torch.empty(2, len(x), dtype=torch.int32, device=x.device)
    for piece, high, low in _pieces(x, amax[0], amax[1]):
        y = piece.to(torch.float32)
        torch.amax(y.view(torch.int32), -1, out=high)
        torch.amax(y.neg().view(torch.int32), -1, out=low)
    return amax.clamp_(min=0).view(torch.float32).t().contiguous()


def _not_finite(x: Tensor, name: str | None) -> ValueError:
    label = name or "tensor"
    nan, inf = int(torch.isnan(x).sum()), int(torch.isinf(x).sum())
    what = " and ".join(
        part for part, count in ((f"{nan} NaN", nan), (f"{inf} infinite value(s)", inf)) if count
    ) or "values beyond the float32 range"
    return ValueError(f"{label} of shape {tuple(x.shape)} holds {what}; quantization needs finite numbers")


def _scales(blocks: _Blocks, fmt: Format, given: Tensor | float | None, name: str | None) -> _Scales:
    """Choose scales by the format's rule; raises ValueError if ``x`` is not finite."""
    x, element = blocks.x, fmt.element_type
    amax = _signed_amax(x) if fmt.asymmetric else _block_amax(x)
    top = amax.amax() if amax.numel() else amax.new_zeros(())
    top_value = float(top)
    if not math.isfinite(top_value):
        raise _not_finite(x, name)
    g: Tensor | None = None
    if fmt.has_global_scale:
        g = _global_scale(blocks, fmt, given, amax, top)
        s = _over_rows(nvfp4_scales, amax, g, element.emax, fmt.scale_rule)
        S = _over_rows(effective_scale, s, g, fmt.scale_rule)
        if fmt.adaptive:
            s4 = _over_rows(nvfp4_scales, amax, g, 4.0, fmt.scale_rule)
            S4 = _over_rows(effective_scale, s4, g, fmt.scale_rule)
            four = _squared_error(x, S4, fmt) < _squared_error(x, S, fmt)
            s, S = torch.where(four, s4, s), torch.where(four, S4, S)
    elif fmt.scale == "E8M0":
        s = e8m0_from_amax(amax, element, fmt.scale_rule)
        S = e8m0_to_float(s)
    else:
        # AMXFP4 rounds its scales the way it rounds elements; the others always to even. A scale of zero (no such sign
        # in the block, or below the scale's range) becomes 1, as in AMXFP4's code: the codes are all zero.
        rounding = fmt.rounding if fmt.asymmetric else "even"
        s = S = replace_zero_(round_to_float(divide(amax, element.emax), SCALE_TYPES[fmt.scale], rounding), 1.0)
    # Never needed under "ceil"; rarely in the others (a scale rounded far down, or a static g that saturates).
    clip = fmt.scale_rule != "ceil" and amax.numel() > 0 and float((amax / S).amax()) > element.clip_above
    return _Scales(s, S.view(len(x), -1), g, clip, top_value, SCALE_TYPES[fmt.scale].dtype)


def _over_rows(function, amax: Tensor, g: Tensor, *args):  # type: ignore[no-untyped-def]
    """Call ``function(amax, g, ...)`` with [N] seen as [rows, blocks] where g is one a row."""
    if g.ndim == 0:
        return function(amax, g, *args)
    return function(amax.view(len(g), -1), g, *args).view(-1)


def _global_scale(blocks: _Blocks, fmt: Format, given: Tensor | float | None, amax: Tensor, top: Tensor) -> Tensor:
    """A float32 scalar, or [rows, 1]."""
    if given is None:
        if fmt.global_scale == "static":
            raise ValueError(
                f"{fmt.name} with global_scale='static' needs the calibrated value: pass global_scale=<tensor>, or choose "
                "'dynamic' or 'row'"
            )
        if fmt.global_scale == "row" and amax.numel():
            top = amax.view(blocks.rows, -1).amax(-1, keepdim=True)
        return global_scale_from_amax(top, fmt.scale_cap, fmt.element_type.emax)
    g = torch.as_tensor(given, dtype=torch.float32, device=amax.device).detach()
    if not bool((torch.isfinite(g) & (g > 0)).all()):
        raise ValueError(f"global_scale must be positive and finite, got {given!r}")
    if g.numel() == 1:
        return g.reshape(())
    axis = blocks.order[-1]
    wanted = [0] * len(blocks.order)
    for new, old in enumerate(blocks.order):
        wanted[old] = 1 if old == axis else blocks.ordered[new]
    try:
        return g.broadcast_to(wanted).permute(blocks.order).reshape(-1, 1)
    except RuntimeError as error:
        raise ValueError(f"global_scale of shape {tuple(g.shape)} must be a scalar or of shape {tuple(wanted)}") from error


def _squared_error(x: Tensor, S: Tensor, fmt: Format) -> Tensor:
    """Sum over each block of (x^ - x)^2, float32 [N]."""
    error = torch.empty(len(x), dtype=torch.float32, device=x.device)
    element = fmt.element_type
    for piece, scale, out in _pieces(x, S[:, None], error):
        y = piece.to(torch.float32, copy=True).div_(scale)
        element.round_(y, torch.empty_like(y), rounding=fmt.rounding).mul_(scale).sub_(piece)
        torch.sum(y.square_(), -1, out=out)
    return error
