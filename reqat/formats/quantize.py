"""Quantize a tensor to codes and scales, and back.

Two ways to the same numbers. ``quantize`` writes codes; its ``dequantize`` multiplies each code's value by its scale.
``quantize_dequantize`` is what every training step calls: it never forms codes, works in float32 on pieces that stay
in the cache, and a property test holds it bit-equal to ``dequantize(quantize(x))``. They share all that rounds.

Arithmetic, for a block's scale ``S`` (float32; for NVFP4 ``S = s / g``, see scales.py):

    S = rule(max |x| over the block);   v = round_to_element(x / S);   x^ = v * S

(NVFP4's scale rule ``reciprocal`` multiplies by g / s instead of dividing by S), all of it in float32, whatever the
input's type: float16 and bfloat16 are exact in float32, float64 is rounded to it first and must be in its range. The
result is rounded once more, to the output's type, saturating. Affine formats also have a zero point z, a whole number
from 0 to emax (15 of four bits): v is held in -z to emax - z, and its code is v + z.

Shapes: a tensor is seen as [N, B], N blocks of B elements; the blocks of one row (one index of the other axes) follow
each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from reqat.formats.checks import SMALLEST_GLOBAL_SCALE
from reqat.formats.elements import power_of_two
from reqat.formats.format import Format, get_format
from reqat.formats.scales import (
    E4M3_MAX,
    FLOAT32_MAX,
    SCALE_TYPES,
    divide,
    e8m0_from_amax,
    e8m0_to_float,
    effective_scale,
    global_scale_from_amax,
    inverse_scale,
    nvfp4_scales,
    replace_zero_,
    round_to_float,
)
from reqat.formats.subnormals import keeps_subnormals
from reqat.formats.tensors import QuantizedTensor, largest

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Added to a float32's bits, carries into the exponent where the mantissa is above the square root of 2 (bits 0x3504F3).
_ABOVE_ROOT_2 = 0x800000 - 0x3504F4
# Elements handled at a time on a CPU: three float32 buffers of this size (768 KiB) stay in a core's cache.
_PIECE = 65536


@torch.no_grad()
@keeps_subnormals
def quantize(
    x: Tensor,
    fmt: str | Format,
    *,
    axis: int = -1,
    pad: bool = False,
    global_scale: Tensor | float | str | None = None,
    name: str | None = None,
    **options: str | None,
) -> QuantizedTensor:
    """Quantize ``x`` in blocks along ``axis``.

    Args:
        x: float16, bfloat16, float32 or float64; one axis at least, any strides.
        fmt: a Format or the name of one; :func:`reqat.formats.get_format` lists names and ``options``.
        axis: the axis that blocks run along.
        pad: append zeros where the length along ``axis`` is not a multiple of the block, instead of an error.
        global_scale: ``"dynamic"``, ``"row"`` or ``"static"`` (an option of the format), or the value of g itself: a
            scalar, or one a row (``x``'s shape with ``axis`` of length 1). A value replaces the computed one.
        name: what to call ``x`` in an error.

    Raises:
        ValueError: NaN or infinity in ``x`` (float64: beyond the float32 range); a length that the block does not
            divide; an unknown format or option; a static format without a value; a g that is not positive and finite.
        TypeError: ``x`` is no tensor.
    """
    fmt, given = _resolve(fmt, global_scale, options)
    blocks = _to_blocks(x, axis, fmt, pad, name)
    scaled = _scales(blocks, fmt, given, name)
    codes = torch.empty(blocks.x.shape, dtype=torch.uint8, device=x.device)
    element = fmt.element_type
    for piece, D, out, *zero in _pieces(blocks.x, scaled.divisor, codes, *scaled.zero_points):
        y = _divide(piece, D, torch.empty(piece.shape, dtype=torch.float32, device=x.device), scaled.inverted)
        values = element.round_(y, torch.empty_like(y), rounding=fmt.rounding, clip=scaled.clip)
        for z in zero:
            values = clamp_affine_(values, z, element.emax).add_(z)
        out.copy_(element.encode(values, torch.signbit(piece)))
    return QuantizedTensor(
        codes=blocks.restore(codes),
        scales=blocks.restore_scales(scaled.stored.to(SCALE_TYPES[fmt.scale].dtype)),
        global_scale=blocks.restore_global_scale(scaled.global_scale),
        format=fmt,
        axis=axis % x.ndim,
        shape=x.shape,
        dtype=x.dtype,
    )


@torch.no_grad()
@keeps_subnormals
def quantize_dequantize(
    x: Tensor,
    fmt: str | Format,
    *,
    axis: int = -1,
    pad: bool = False,
    global_scale: Tensor | float | str | None = None,
    name: str | None = None,
    **options: str | None,
) -> Tensor:
    """``quantize(x, ...).dequantize()``, bit for bit, without forming codes. Same arguments and errors; no gradient."""
    fmt, given = _resolve(fmt, global_scale, options)
    blocks = _to_blocks(x, axis, fmt, pad, name)
    scaled = _scales(blocks, fmt, given, name)
    out = torch.empty(blocks.x.shape, dtype=x.dtype, device=x.device)
    element, rounding, clip = fmt.element_type, fmt.rounding, scaled.clip
    limit = largest(x.dtype)
    saturate = scaled.top > limit / 2  # rounding up may then step over the largest number of the type
    scratch = buffer = None
    for piece, D, S, target, *zero in _pieces(blocks.x, scaled.divisor, scaled.effective, out, *scaled.zero_points):
        if scratch is None:
            scratch = torch.empty(piece.shape, dtype=torch.float32, device=x.device)
            buffer = None if x.dtype == torch.float32 else torch.empty_like(scratch)
        y = _divide(piece, D, target if buffer is None else buffer[: len(piece)], scaled.inverted)
        element.round_(y, scratch[: len(piece)], rounding=rounding, clip=clip)
        for z in zero:
            clamp_affine_(y, z, element.emax)
        _multiply_(y, S)
        if saturate:
            y.clamp_(-limit, limit)
        if buffer is not None:
            target.copy_(y)
    return blocks.restore(out, crop=True)


@keeps_subnormals
def global_scale_for(x: Tensor, fmt: str | Format, *, axis: int = -1, name: str | None = None) -> Tensor:
    """The global scale that ``fmt`` computes for ``x``: ``g = 448 * emax / amax``, float32 (256 for four-over-six).

    A scalar; for ``row`` ``x``'s shape with ``axis`` of length 1, amax over ``axis`` only. ``x`` need not divide into
    blocks. An all-zero tensor or row gets 1. Raises ValueError for NaN or infinity, or a format without global scale.
    """
    fmt = get_format(fmt) if isinstance(fmt, str) else fmt
    if not fmt.has_global_scale:
        raise ValueError(_no_global_scale(fmt))
    magnitude = x.detach().abs().to(torch.float32)
    amax = magnitude.amax(axis, keepdim=True) if fmt.global_scale == "row" else magnitude.amax()
    if not bool(torch.isfinite(amax).all()):
        raise _not_finite(x, name)
    return global_scale_from_amax(amax, fmt.scale_cap, fmt.element_type.emax, fmt.scale_rule)


# --- a tensor as blocks -----------------------------------------------------------------------------------------------


@dataclass
class _Blocks:
    """A tensor as [N, B], and the way back. ``order`` permuted its axes so that the quantized one came last."""

    x: Tensor
    original: Tensor
    order: tuple[int, ...]
    ordered: torch.Size  # shape after permuting, before padding
    padded: int  # length of the quantized axis after padding

    @property
    def rows(self) -> int:
        return math.prod(self.ordered[:-1])

    def restore(self, t: Tensor, crop: bool = False) -> Tensor:
        t = t.view(*self.ordered[:-1], self.padded)
        return self._back(t[..., : self.ordered[-1]] if crop else t)

    def restore_scales(self, s: Tensor) -> Tensor:
        signs = s.shape[1:]  # nothing, or 2
        return self._back(s.reshape(*self.ordered[:-1], self.padded // self.x.shape[1], *signs)).contiguous()

    def restore_global_scale(self, g: Tensor | None) -> Tensor | None:
        return g if g is None or g.ndim == 0 else self._back(g.view(*self.ordered[:-1], 1)).contiguous()

    def _back(self, t: Tensor) -> Tensor:
        if self.order == tuple(range(len(self.order))):
            return t
        inverse = sorted(range(len(self.order)), key=lambda new: self.order[new])
        return t.permute(*inverse, *range(len(inverse), t.ndim))


def _to_blocks(x: Tensor, axis: int, fmt: Format, pad: bool, name: str | None) -> _Blocks:
    label = name or "tensor"
    if not isinstance(x, Tensor):
        raise TypeError(f"{label} is a {type(x).__name__}, not a torch tensor; pass torch.as_tensor(...) of it")
    if x.dtype not in _DTYPES:
        raise ValueError(f"{label} has dtype {x.dtype}; formats take {', '.join(str(dtype) for dtype in _DTYPES)}")
    if x.device.type == "meta":
        raise ValueError(f"{label} is on the device meta and has no numbers to quantize")
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
    # Any order of the other axes gives the same blocks, so take the one that x has in memory: keys seen as [B, H, T, D]
    # but stored as [B, T, H, D] then need no copy, and the result has x's strides.
    others = sorted((a for a in range(x.ndim) if a != axis), key=x.stride, reverse=True)
    order = (*others, axis)
    y = x.permute(order)
    flat = y.contiguous() if padded == length else torch.nn.functional.pad(y, (0, padded - length))
    return _Blocks(flat.view(math.prod(y.shape[:-1]) * (padded // block), block), x, order, y.shape, padded)


def _pieces(x: Tensor, *others: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Go through [N, B] and tensors of the same N together, a cache-sized piece at a time (a GPU takes all at once)."""
    if x.numel() <= _PIECE or x.device.type != "cpu":
        return ((x, *others),)
    step = max(1, _PIECE // x.shape[1])
    return zip(x.split(step), *(t.split(step) for t in others), strict=True)


def _divide(x: Tensor, S: Tensor, out: Tensor, inverted: bool) -> Tensor:
    """``x / S`` into float32 ``out`` (``x * S`` if S is ``inverted``); of S [N, 2] negative numbers take the second."""
    if inverted:
        return torch.mul(x, S, out=out) if x.dtype == torch.float32 else out.copy_(x).mul_(S)
    if S.shape[1] == 1:
        return torch.div(x, S, out=out) if x.dtype == torch.float32 else out.copy_(x).div_(S)
    # A sum in which one term is always zero: exact, and faster than to select a scale for each element.
    negative = x.clamp(max=0).to(torch.float32)
    return out.copy_(x).clamp_(min=0).div_(S[:, :1]).addcdiv_(negative, S[:, 1:])


def _multiply_(v: Tensor, S: Tensor) -> Tensor:
    """``v * S`` in place, the way back of :func:`_divide`."""
    if S.shape[1] == 1:
        return v.mul_(S)
    negative = v.clamp(max=0)
    return v.clamp_(min=0).mul_(S[:, :1]).addcmul_(negative, S[:, 1:])


def clamp_affine_(v: Tensor, z: Tensor, emax: float) -> Tensor:
    """Hold rounded numbers ``v``, in place, in -z to emax - z: then ``v + z`` is a code. Zeros are +0.0."""
    return torch.maximum(torch.minimum(v, emax - z, out=v), -z, out=v).add_(0.0)


# --- choosing scales --------------------------------------------------------------------------------------------------


@dataclass
class _Scales:
    """The scales chosen for [N, B] blocks."""

    stored: Tensor  # the numbers to store: float32, or E8M0's exponents as int32; [N] or [N, 2]
    effective: Tensor  # float32 S, [N, 1] or [N, 2]
    divisor: Tensor  # what x is divided by, S; or, if inverted, multiplied by
    inverted: bool
    global_scale: Tensor | None  # scalar or [rows, 1]
    clip: bool  # whether some |x| / S lies beyond what rounding alone keeps within the element's range
    top: float  # max |x|
    zero_points: tuple[Tensor, ...] = ()  # one [N, 1] of affine formats


def _scales(blocks: _Blocks, fmt: Format, given: Tensor | float | None, name: str | None) -> _Scales:
    """Choose scales by the format's rule; raises ValueError if ``x`` is not finite."""
    x, element = blocks.x, fmt.element_type
    amax = _signed_amax(x) if fmt.asymmetric else _block_amax(x)
    top = amax.amax() if amax.numel() else amax.new_zeros(())
    top_value = float(top)
    if not math.isfinite(top_value):
        raise _not_finite(blocks.original, name)
    if fmt.scale_rule == "twn":
        return _ternary_scales(x, fmt, top_value)
    if fmt.scale_rule == "sawb":
        return _sawb_scales(x, fmt, top_value)
    if fmt.zero_point:
        return _affine_scales(x, fmt, top_value)
    if fmt.per_tensor:
        amax = top.expand(len(amax)).contiguous()
    g: Tensor | None = None
    if fmt.has_global_scale:
        g = _global_scale(blocks, fmt, given, amax, top)
        s = _by_row(nvfp4_scales, amax, g, element.emax, fmt.scale_rule)
        S = _by_row(effective_scale, s, g, fmt.scale_rule)
        if fmt.adaptive:
            s4 = _by_row(nvfp4_scales, amax, g, element.emax, fmt.scale_rule, 1.5)
            S4 = _by_row(effective_scale, s4, g, fmt.scale_rule)
            four = _squared_error(x, S4, amax, fmt) < _squared_error(x, S, amax, fmt)
            s, S = torch.where(four, s4, s), torch.where(four, S4, S)
    elif fmt.scale == "E8M0":
        s = e8m0_from_amax(amax, element, fmt.scale_rule)
        S = effective_scale(e8m0_to_float(s), None, fmt.scale_rule)
    else:
        # AMXFP4 rounds its scales the way it rounds elements, the others always to even. A scale of zero (the block has
        # no number of that sign, or only some below the scale's range) becomes 1: the codes are all zero.
        rounding = fmt.rounding if fmt.asymmetric else "even"
        s = S = replace_zero_(round_to_float(divide(amax, element.emax), SCALE_TYPES[fmt.scale], rounding), 1.0)
    inverted = fmt.scale_rule == "reciprocal"
    D = _by_row(inverse_scale, s, g) if inverted and g is not None else S
    clip = False
    if fmt.scale_rule != "rceil" and amax.numel():  # "rceil" never needs it; the others where a scale is far too small
        clip = float((amax * D if inverted else amax / D).amax()) > element.clip_above
    if not fmt.asymmetric:
        S, D = S[:, None], D[:, None]
    return _Scales(s, S, D, inverted, g, clip, top_value)


def _ternary_scales(x: Tensor, fmt: Format, top: float) -> _Scales:
    """Ternary weight networks (arXiv 1605.04711), for each row of [N, B] or all of it: with delta = 0.7 mean |x|, codes
    are the signs of the numbers with |x| > delta, and the scale is the mean |x| of those.

    Means are taken in float64 and rounded once. Dividing by 2 delta puts the threshold at 1/2, where a tie goes to 0:
    the comparison with delta is exact. A row of zeros gets the scale 1, as elsewhere.
    """
    magnitude = x.to(torch.float32).abs().double()
    if fmt.per_tensor:
        magnitude = magnitude.reshape(min(1, len(x)), x.numel())
    delta = (0.7 * magnitude.mean(-1, keepdim=True)).float()
    above = magnitude > delta
    alpha = torch.where(above, magnitude, 0).sum(-1, keepdim=True) / above.sum(-1, keepdim=True).clamp(min=1)
    s = round_to_float(alpha.float().flatten(), SCALE_TYPES[fmt.scale])
    s, delta = (t.expand(len(x)).contiguous() for t in (replace_zero_(s, 1.0), replace_zero_(delta.flatten(), 1.0)))
    divisor = (2 * delta[:, None]).clamp_(max=FLOAT32_MAX)
    return _Scales(s, s[:, None], divisor, False, None, True, top)


#: Of each bit width c1 and c2 of SAWB: regressed by its authors on the ranges of least squared error of six
#: distributions.
SAWB = {2: (3.12, 2.064), 3: (7.509, 6.892), 4: (12.68, 12.80)}


def _sawb_scales(x: Tensor, fmt: Format, top: float) -> _Scales:
    """Statistics-aware weight binning (arXiv 1807.06964): the range of a whole tensor is
    ``a = c1 sqrt(mean x^2) - c2 mean |x|``, what is beyond is cut off, and a is the largest magnitude of the element.

    Sums in float64, rounded once. Where magnitudes hardly differ, three and four bits make a too small or even
    negative; it is then mean |x| (inferred: the paper says nothing of it). Zeros get the scale 2^-24, because MID
    elements have none.
    """
    magnitude = x.to(torch.float32).abs().double()
    count = max(1, magnitude.numel())
    mean, square = magnitude.sum() / count, magnitude.square().sum() / count
    c1, c2 = SAWB[fmt.bits]
    a = torch.maximum(c1 * square.sqrt() - c2 * mean, mean) / fmt.element_type.emax
    s = round_to_float(a.clamp_(max=FLOAT32_MAX).float().reshape(1), SCALE_TYPES[fmt.scale])
    s = replace_zero_(s, 2.0**-24).expand(len(x)).contiguous()
    return _Scales(s, s[:, None], s[:, None], False, None, True, top)


def _affine_scales(x: Tensor, fmt: Format, top: float) -> _Scales:
    """Scales and zero points of affine formats, for each block of [N, B] or all of it: with lo and hi its least and
    largest number, zero included, ``s = (hi - lo) / emax`` and ``z = round(-lo / s)``; stored side by side. Zero keeps
    a code of its own. A block of zeros gets the scale 1.

    Of E8M0 the scale is a power of two: the one below s (``floor``), whose top saturates, or the nearest to s on a
    logarithmic scale (``even``).
    """
    extremes = _signed_amax(x)  # hi and -lo
    if fmt.per_tensor and len(x):
        extremes = extremes.amax(0).expand(len(x), 2).contiguous()
    hi, minus_lo = extremes[:, 0], extremes[:, 1]
    emax = fmt.element_type.emax
    # Halves first: the sum of two large float32 is none.
    exact = divide(hi / 2 + minus_lo / 2, emax / 2)
    if fmt.scale == "E8M0":
        kept = (exact.view(torch.int32) + (_ABOVE_ROOT_2 if fmt.scale_rule == "even" else 0)) >> 23
        s = e8m0_to_float(kept)
    else:
        kept = s = replace_zero_(round_to_float(exact, SCALE_TYPES[fmt.scale]), 1.0)
    z = torch.round(minus_lo / s).clamp_(max=emax)
    stored = torch.stack([kept, z.to(kept.dtype)], -1)
    return _Scales(stored, s[:, None], s[:, None], False, None, False, top, (z[:, None].contiguous(),))


def _block_amax(x: Tensor) -> Tensor:
    """Largest magnitude of each block of [N, B], float32 [N]; infinity and NaN stay above all numbers.

    Compares the bits of |x| as integers: the same order, infinity and NaN at the upper end, and half the time of a
    maximum of floats, which has to look out for NaN.
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
    """Largest positive number and largest magnitude of a negative number of each block (0 if none), float32 [N, 2].

    As above: numbers of the other sign are negative as integers; a NaN of either sign shows in one of the two.
    """
    amax = torch.empty(2, len(x), dtype=torch.int32, device=x.device)
    for piece, positive, negative in _pieces(x, amax[0], amax[1]):
        y = piece.to(torch.float32)
        torch.amax(y.view(torch.int32), -1, out=positive)
        torch.amax(y.neg().view(torch.int32), -1, out=negative)
    return amax.clamp_(min=0).view(torch.float32).t().contiguous()


def _squared_error(x: Tensor, S: Tensor, amax: Tensor, fmt: Format) -> Tensor:
    """Sum over each block of (x^ - x)^2, in units of the block's binade so that no square leaves float32; [N]."""
    unit = power_of_two(amax, torch.empty_like(amax)).clamp_(min=2.0**-126).reciprocal_()
    error = torch.empty(len(x), dtype=torch.float32, device=x.device)
    for piece, scale, inverse_unit, out in _pieces(x, S[:, None], unit[:, None], error):
        y = piece.to(torch.float32, copy=True).div_(scale)
        fmt.element_type.round_(y, torch.empty_like(y), rounding=fmt.rounding).mul_(scale).sub_(piece)
        torch.sum(y.mul_(inverse_unit).square_(), -1, out=out)
    return error


def _by_row(function: Callable[..., Tensor], amax: Tensor, g: Tensor, *rest: object) -> Tensor:
    """``function(amax, g, ...)`` of [N] numbers, seen as [rows, blocks] where there is one g a row."""
    if g.ndim == 0:
        return function(amax, g, *rest)
    return function(amax.view(len(g), amax.numel() // max(1, len(g))), g, *rest).view(-1)


def _global_scale(blocks: _Blocks, fmt: Format, given: Tensor | float | None, amax: Tensor, top: Tensor) -> Tensor:
    """g as a float32 scalar, or [rows, 1]."""
    if given is None:
        if fmt.global_scale == "static":
            raise ValueError(
                f"{fmt.name} with global_scale='static' needs the calibrated value: pass global_scale=<number or "
                "tensor>, or choose 'dynamic' or 'row'"
            )
        if fmt.global_scale == "row" and amax.numel():
            top = amax.view(blocks.rows, -1).amax(-1, keepdim=True)
        return global_scale_from_amax(top, fmt.scale_cap, fmt.element_type.emax, fmt.scale_rule)
    if not isinstance(given, Tensor | int | float) or isinstance(given, bool):
        raise TypeError(f"global_scale is a {type(given).__name__}, not a number nor a tensor")
    if isinstance(given, Tensor) and (given.device.type == "meta" or given.is_complex()):
        raise ValueError(f"global_scale holds no real numbers: {given.dtype} on {given.device}")
    g = torch.as_tensor(given, dtype=torch.float32, device=amax.device)
    # The smallest g lets the largest block scale, 448 / g, still be a float32.
    if not bool((torch.isfinite(g) & (g > SMALLEST_GLOBAL_SCALE)).all()):
        raise ValueError(f"global_scale must be finite and above {E4M3_MAX / FLOAT32_MAX:.2g}, got {given}")
    if g.numel() == 1:
        return g.reshape(())
    wanted = list(blocks.ordered[:-1]) + [1]
    shape = [wanted[blocks.order.index(axis)] for axis in range(len(wanted))]
    try:
        return g.broadcast_to(shape).permute(blocks.order).reshape(-1, 1)
    except RuntimeError as error:
        raise ValueError(
            f"global_scale of shape {tuple(g.shape)} must be a scalar or of shape {tuple(shape)}"
        ) from error


def _resolve(
    fmt: str | Format, global_scale: Tensor | float | str | None, options: dict[str, str | None]
) -> tuple[Format, Tensor | float | None]:
    """The format with its options, and the global scale if it was given by value."""
    if isinstance(global_scale, str):
        options = {**options, "global_scale": global_scale}
        global_scale = None
    if not isinstance(fmt, str | Format):
        raise TypeError(f"format is a {type(fmt).__name__}, not a Format nor the name of one")
    if options or not isinstance(fmt, Format):
        fmt = get_format(fmt, **options)
    if global_scale is not None and not fmt.has_global_scale:
        raise ValueError(_no_global_scale(fmt))
    return fmt, global_scale


def _no_global_scale(fmt: Format) -> str:
    return f"{fmt.name} has no global scale; formats that have one: NVFP4, NVFP4-4/6"


def _not_finite(x: Tensor, name: str | None) -> ValueError:
    counts = ((int(torch.isnan(x).sum()), "NaN"), (int(torch.isinf(x).sum()), "infinite values"))
    found = " and ".join(f"{count} {what}" for count, what in counts if count) or "numbers beyond the float32 range"
    label = name or "tensor"
    return ValueError(f"{label} of shape {tuple(x.shape)} holds {found}; only finite numbers can be quantized")
