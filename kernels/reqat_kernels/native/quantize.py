"""Quantizing on the CPU: reqat.formats' arithmetic in two passes over memory, bit for bit.

The reference takes some thirty passes of elementwise PyTorch over a tensor. Here one finds the largest magnitude of
every block (and with it NaN and infinity), one rounds; a format with a global scale a row, or with none, needs only one
from memory, since a row is still in the cache when it is rounded. What the native loops do not take (float64, other
devices, subclasses, lengths that want padding) goes to :mod:`reqat.formats`, and so does every error: the reference
raises it, so that its words are the same.

Trade-offs: results are equal to the reference's to the last bit, so the loops divide where a multiplication by a
reciprocal would do for a GPU; four-over-six adds its squared errors in torch.sum's order.

The torch operators ``reqat::fake_quantize`` and ``reqat::quantize`` have no gradient of their own: the
straight-through estimator is :func:`reqat.quant.fake_quantize`'s.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from reqat.formats import Format, PackedTensor, QuantizedTensor, get_format
from reqat.formats import quantize as reference_quantize
from reqat.formats import quantize_dequantize as reference_quantize_dequantize
from reqat.formats.scales import SCALE_TYPES
from reqat_kernels.native import check
from reqat_kernels.native.library import OK, OPERATORS, library, threads

_ELEMENTS = ("E2M1", "E1M2", "INT4")
_SCALES = ("E8M0", "E4M3", "E5M2", "FP16", "FP32")
_RULES = ("rceil", "floor", "even", "divide", "multiply", "reciprocal", "nearest")
_GLOBAL_SCALES = ("none", "dynamic", "row", "static")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Elements that make another thread worth starting: some 15 microseconds of work.
_PER_THREAD = 32768


def supports(fmt: Format) -> bool:
    """Whether the native loops have the arithmetic of this format; what they have not goes to :mod:`reqat.formats`."""
    return fmt.element in _ELEMENTS and fmt.scale in _SCALES and fmt.scale_rule in _RULES and not fmt.per_tensor


class Spec(ctypes.Structure):
    """``reqat::Spec`` of quantize.h, field by field."""

    _fields_ = [
        ("element", ctypes.c_int32),
        ("block", ctypes.c_int32),
        ("scale", ctypes.c_int32),
        ("rule", ctypes.c_int32),
        ("away", ctypes.c_int32),
        ("asymmetric", ctypes.c_int32),
        ("adaptive", ctypes.c_int32),
        ("global_scale", ctypes.c_int32),
        ("emax", ctypes.c_float),
        ("cap", ctypes.c_float),
    ]


@lru_cache(maxsize=256)
def spec_of(fmt: Format) -> Spec:
    """The format as the native code reads it. Shared: do not write to it."""
    return Spec(
        _ELEMENTS.index(fmt.element),
        fmt.block or 0,
        _SCALES.index(fmt.scale),
        _RULES.index(fmt.scale_rule),
        int(fmt.rounding == "away"),
        int(fmt.asymmetric),
        int(fmt.adaptive),
        _GLOBAL_SCALES.index(fmt.global_scale),
        fmt.element_type.emax,
        fmt.scale_cap,
    )


@lru_cache(maxsize=256)
def format_key(fmt: Format) -> str:
    """A format as the string that operators take: its name and options."""
    return "|".join((fmt.name, fmt.element, fmt.scale, fmt.scale_rule, fmt.rounding, fmt.global_scale))


@lru_cache(maxsize=256)
def format_from_key(key: str) -> Format:
    """The inverse of :func:`format_key`; a name alone stands for that format's defaults. Errors are get_format's."""
    name, *options = key.split("|")
    fields = ("element", "scale", "scale_rule", "rounding", "global_scale")
    if len(options) > len(fields):
        raise ValueError(f"{key!r} is no format: a name and up to {len(fields)} options, separated by |")
    return get_format(name, **dict(zip(fields, options, strict=False)))


# --- calling the library ----------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _call_of(fmt: Format) -> tuple[Any, Spec | None, int, bool, bool, bool]:
    """What a call needs to know of a format: the function and Spec (None: not native), block, and how it scales."""
    lib = library() if supports(fmt) else None
    function = None if lib is None else lib.reqat_quantize
    spec = None if lib is None else spec_of(fmt)
    if function is not None:
        pointer = ctypes.c_void_p
        function.argtypes = [
            ctypes.POINTER(Spec),
            ctypes.c_int32,
            pointer,
            ctypes.c_int64,
            ctypes.c_int64,
            pointer,
            ctypes.c_int64,
            ctypes.c_int32,
            *[pointer] * 5,
        ]
        function.restype = ctypes.c_int32
    return function, spec, fmt.block or 0, fmt.has_global_scale, fmt.global_scale == "static", fmt.asymmetric


def _takes(x: Tensor, block: int) -> bool:
    """Whether the native loops take ``x`` along its last axis."""
    if x.dtype not in _DTYPES or x.ndim == 0 or x.device.type != "cpu":
        return False
    length = x.shape[-1]
    return x.numel() > 0 and not (block and length % block) and not x.is_neg() and not x.is_conj()


def _given(global_scale: Any, ordered: Tensor, order: tuple[int, ...] | None) -> Tensor | None:
    """g as contiguous float32, a scalar or one a row of ``ordered`` (axes in ``order``); None if it does not fit."""
    g = global_scale
    if not isinstance(g, Tensor | int | float) or isinstance(g, bool):
        return None
    if not isinstance(g, Tensor):
        g = torch.tensor(g, dtype=torch.float32, device="cpu")
    if g.device.type != "cpu" or g.is_complex():
        return None
    g = g.detach().to(torch.float32)
    if g.numel() == 1:
        return g
    wanted = [*ordered.shape[:-1], 1]
    shape = wanted if order is None else [wanted[order.index(axis)] for axis in range(len(order))]
    try:
        g = g.broadcast_to(shape)
    except RuntimeError:
        return None
    return (g if order is None else g.permute(order)).contiguous()


def _memory_order(x: Tensor) -> tuple[int, ...] | None:
    """The order of axes that makes ``x`` contiguous without moving the last one; None if it is already."""
    if x.is_contiguous():
        return None
    return (*sorted(range(x.ndim - 1), key=x.stride, reverse=True), x.ndim - 1)


def _back(t: Tensor, order: tuple[int, ...] | None) -> Tensor:
    if order is None:
        return t
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return t.permute(*inverse, *range(len(order), t.ndim))


def _plain(x: Tensor) -> bool:
    """Whether ``x`` is a tensor with memory of its own that nothing traces."""
    return type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def _fake(x: Tensor, fmt: Format, global_scale: Tensor | float | None, name: str | None) -> Tensor:
    function, spec, block, has_global, static, _ = _call_of(fmt)
    if function is not None and _takes(x, block) and (has_global or global_scale is None):
        order = _memory_order(x)
        y = x if order is None else x.permute(order).contiguous()
        g = None if global_scale is None else _given(global_scale, y, order)
        if (g is not None) == (global_scale is not None) and not (static and g is None):
            out = torch.empty(y.shape, dtype=y.dtype, device="cpu")
            length, numel = y.shape[-1], y.numel()
            status = function(
                spec,
                _DTYPES[y.dtype],
                check.address(y),
                numel // length,
                length,
                check.address(g),
                0 if g is None else g.numel(),
                threads(numel, _PER_THREAD),
                out.data_ptr(),
                None,
                None,
                None,
                None,
            )
            if status == OK:
                return _back(out, order)
    return reference_quantize_dequantize(x, fmt, global_scale=global_scale, name=name)


def _codes(
    x: Tensor, fmt: Format, global_scale: Tensor | float | None, packed: bool, name: str | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes (packed or not), scales and g of ``x`` along its last axis."""
    function, spec, block, has_global, static, asymmetric = _call_of(fmt)
    if function is not None and _takes(x, block) and (has_global or global_scale is None):
        order = _memory_order(x)
        y = x if order is None else x.permute(order).contiguous()
        given = None if global_scale is None else _given(global_scale, y, order)
        if (given is not None) == (global_scale is not None) and not (static and given is None):
            leading, length, numel = y.shape[:-1], y.shape[-1], y.numel()
            blocks = length // (block or length)
            width = (length + 1) // 2 if packed else length
            codes = torch.empty(*leading, width, dtype=torch.uint8, device="cpu")
            signs, scale_type = [2] if asymmetric else [], SCALE_TYPES[fmt.scale].dtype
            scales = torch.empty(*leading, blocks, *signs, dtype=scale_type, device="cpu")
            g = None
            if has_global:
                per_row = given.numel() > 1 if given is not None else fmt.global_scale == "row"
                g = torch.empty((*leading, 1) if per_row else (), dtype=torch.float32, device="cpu")
            status = function(
                spec,
                _DTYPES[y.dtype],
                check.address(y),
                numel // length,
                length,
                check.address(given),
                0 if given is None else given.numel(),
                threads(numel, _PER_THREAD),
                None,
                None if packed else codes.data_ptr(),
                codes.data_ptr() if packed else None,
                scales.data_ptr(),
                None if g is None else g.data_ptr(),
            )
            if status == OK:
                codes = _back(codes, order) if not packed else _back(codes, order).contiguous()
                scales = _back(scales, order).contiguous()
                return codes, scales, g if g is None or g.ndim == 0 else _back(g, order).contiguous()
    q = reference_quantize(x, fmt, global_scale=global_scale, name=name)
    return (q.pack().packed if packed else q.codes), q.scales, q.global_scale


def _format(fmt: Format | str) -> Format:
    if not isinstance(fmt, str | Format):
        raise TypeError(f"format is a {type(fmt).__name__}, not a Format nor the name of one")
    return get_format(fmt) if isinstance(fmt, str) else fmt


# --- for Python -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fake_quantize(
    x: Tensor, fmt: Format | str, global_scale: Tensor | float | None = None, name: str | None = None
) -> Tensor:
    """``reqat.quantize_dequantize(x, fmt, global_scale=global_scale, name=name)`` along the last axis, bit for bit.

    Same shape, dtype and strides; no gradient. Native for float32, bfloat16 and float16 on the CPU, else the reference.
    Raises its errors: ValueError for NaN or infinity (naming ``name``), a length that the block does not divide, a
    global scale that is missing, out of range or of another shape.
    """
    fmt = _format(fmt)
    if _plain(x):
        return _fake(x, fmt, global_scale, name)
    if isinstance(x, Tensor) and (global_scale is None or isinstance(global_scale, Tensor)):
        return torch.ops.reqat.fake_quantize(x, format_key(fmt), global_scale)
    return reference_quantize_dequantize(x, fmt, global_scale=global_scale, name=name)


@torch.no_grad()
def quantize(
    x: Tensor, fmt: Format | str, global_scale: Tensor | float | None = None, name: str | None = None
) -> QuantizedTensor:
    """``reqat.quantize(x, fmt, global_scale=global_scale, name=name)`` along the last axis, bit for bit; its errors."""
    fmt = _format(fmt)
    if not isinstance(x, Tensor) or x.ndim == 0:
        return reference_quantize(x, fmt, global_scale=global_scale, name=name)
    codes, scales, g = _codes(x, fmt, global_scale, False, name)
    return QuantizedTensor(codes, scales, g, fmt, x.ndim - 1, x.shape, x.dtype)


@torch.no_grad()
def quantize_packed(
    x: Tensor, fmt: Format | str, global_scale: Tensor | float | None = None, name: str | None = None
) -> PackedTensor:
    """``quantize(...).pack()``, written packed at once. Same errors."""
    fmt = _format(fmt)
    if not isinstance(x, Tensor) or x.ndim == 0:
        return reference_quantize(x, fmt, global_scale=global_scale, name=name).pack()
    packed, scales, g = _codes(x, fmt, global_scale, True, name)
    return PackedTensor(packed, scales, g, fmt, x.ndim - 1, x.shape, x.dtype)


# --- torch operators --------------------------------------------------------------------------------------------------

OPERATORS.define("fake_quantize(Tensor x, str format, Tensor? global_scale=None) -> Tensor")
# g is a scalar, one a row, or, for formats without a global scale, empty.
OPERATORS.define("quantize(Tensor x, str format, Tensor? global_scale=None) -> (Tensor, Tensor, Tensor)")


def _fake_operator(x: Tensor, key: str, global_scale: Tensor | None = None) -> Tensor:
    check.tensor("tensor", x)
    return _fake(x, format_from_key(key), global_scale, None)


def _quantize_operator(x: Tensor, key: str, global_scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    check.tensor("tensor", x)
    packed, scales, g = _codes(x, format_from_key(key), global_scale, True, None)
    return packed, scales, x.new_empty((0,), dtype=torch.float32) if g is None else g


def _check(x: Tensor, key: str, global_scale: Tensor | None) -> Format:
    """The format; ValueError for what the reference would refuse, as far as it can be told without the numbers."""
    fmt = format_from_key(key)
    check.floats("tensor", x, device=None if global_scale is None or global_scale.numel() == 1 else global_scale.device)
    if x.ndim == 0 or (fmt.block and x.shape[-1] % fmt.block):
        raise ValueError(f"tensor of shape {tuple(x.shape)}: its last axis must be a multiple of {fmt.block}")
    if global_scale is None and fmt.global_scale == "static":
        raise ValueError(f"{fmt.name} with global_scale='static' needs the calibrated value: pass global_scale=")
    if global_scale is not None and not fmt.has_global_scale:
        raise ValueError(f"{fmt.name} has no global scale: pass None")
    return fmt


def _fake_shape(x: Tensor, key: str, global_scale: Tensor | None = None) -> Tensor:
    _check(x, key, global_scale)
    order = _memory_order(x)
    return _back(torch.empty_like(x if order is None else x.permute(order).contiguous()), order)


def _quantize_shape(x: Tensor, key: str, global_scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    fmt = _check(x, key, global_scale)
    *leading, length = x.shape
    signs = [2] if fmt.scale_parts > 1 else []
    packed = x.new_empty((*leading, -(-length // fmt.codes_per_byte)), dtype=torch.uint8)
    blocks = length // (fmt.block or max(1, length))
    scales = x.new_empty((*leading, blocks, *signs), dtype=SCALE_TYPES[fmt.scale].dtype)
    if not fmt.has_global_scale:
        return packed, scales, x.new_empty((0,), dtype=torch.float32)
    per_row = fmt.global_scale == "row" if global_scale is None else global_scale.numel() > 1
    return packed, scales, x.new_empty((*leading, 1) if per_row else (), dtype=torch.float32)


OPERATORS.impl("fake_quantize", _fake_operator, "CompositeExplicitAutograd")
OPERATORS.impl("quantize", _quantize_operator, "CompositeExplicitAutograd")
torch.library.register_fake("reqat::fake_quantize", _fake_shape, lib=OPERATORS)
torch.library.register_fake("reqat::quantize", _quantize_shape, lib=OPERATORS)
