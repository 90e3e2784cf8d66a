"""A key/value cache that is really four bits wide, and decode attention that reads it as it is.

Decoding one token reads the whole cache once, so its time is the cache's bytes or the work of turning codes into
floats. :class:`PackedStates` keeps keys or values in tiles of 16 tokens arranged for that work (attention.h): one shift
and one table look-up make 16 floats, all query heads of a key/value head share them, and no sum runs across a register.

:func:`kv_attention` computes, for a query q and tokens t with ``k^ = value(code) * (s / g)`` and v^ alike,

    score_t = q . k^_t * scaling (+ mask);   p = softmax(score);   out = sum_t p_t v^_t

in float32, over spans of 512 tokens whose results are then weighed by their maxima. Spans do not depend on the batch
or the number of threads, so neither does a row's result. Scales multiply sums of q times code values, not each value.
Rounding, with u = 2^-24, against exact arithmetic on the same codes:

    |score error_t| <= (block + D / block + 6) u * scaling * sum_d |q_d k^_td|
    |out error_d|   <= sum_t p_t e_t (|v^_td| + |out_d|)
                       + (min(S, 512) + S / 512 + 12) u * (sum_t p_t |v^_td| + |out_d|)
    with e_t = |score error_t| + u |score_t - max| + 4 u  (the exponential is within 2 ulps)

:meth:`PackedStates.append` stores the codes and scales of ``reqat.quantize`` bit for bit.

Without the native library the same functions compute from the same bytes in PyTorch.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from reqat.formats import Format, QuantizedTensor, pack_codes, quantize, unpack_codes
from reqat.formats.elements import ELEMENTS
from reqat.formats.scales import e8m0_to_float
from reqat_kernels.native.library import NO_MEMORY, NOT_FINITE, OPERATORS, library, threads
from reqat_kernels.native.quantize import Spec, format_from_key, format_key, spec_of

TILE = 16
MAX_HEAD_DIM = 1024
_ELEMENTS = ("E2M1", "E1M2")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # by reqat::Dtype
# Codes that make a second thread worth starting: those that one turns into numbers in some 20 microseconds.
_CODES_PER_THREAD = 1 << 17

_i64, _pointer = ctypes.c_int64, ctypes.c_void_p
Kind = Literal["key", "value"]


class _States(ctypes.Structure):
    """``reqat::PackedStates`` of attention.h."""

    _fields_ = [
        *((name, _pointer) for name in ("codes", "scales", "global_scale")),
        *((name, _i64) for name in ("global_b", "global_g", "global_t", "block", "scale", "element")),
    ]


class AttentionArgs(ctypes.Structure):
    """``reqat::AttentionArgs``."""

    _fields_ = [
        ("query", _pointer),
        ("out", _pointer),
        ("key", _States),
        ("value", _States),
        ("mask", _pointer),
        *((name, _i64) for name in ("mask_kind", "mask_b", "mask_h", "mask_t", "mask_s")),
        ("start", _pointer),
        *((name, _i64) for name in ("B", "H", "G", "T", "S", "D", "tiles", "threads")),
        ("scaling", ctypes.c_double),
        ("causal", _i64),
    ]


class AppendArgs(ctypes.Structure):
    """``reqat::AppendArgs``."""

    _fields_ = [
        ("x", _pointer),
        *((name, _i64) for name in ("dtype", "x_b", "x_g", "x_t")),
        ("shift", _pointer),
        ("states", _States),
        *((name, _i64) for name in ("is_value", "B", "G", "T", "D", "tiles", "start", "threads")),
        ("spec", Spec),
    ]


def unsupported(fmt: Format | None, head_dim: int) -> str | None:
    """Why keys or values of this format and head dimension cannot be packed, or None if they can."""
    if fmt is None:
        return "they are not quantized"
    if fmt.name not in ("NVFP4", "NVFP4-4/6", "MXFP4"):
        return f"their format is {fmt.name}; NVFP4, NVFP4-4/6 and MXFP4 can be packed"
    assert fmt.block is not None
    if head_dim < 1 or head_dim % fmt.block or head_dim > MAX_HEAD_DIM:
        return f"head_dim {head_dim} is not a multiple of {fmt.block} up to {MAX_HEAD_DIM}"
    return None


@dataclass(eq=False)
class PackedStates:
    """Room for the keys or values of one layer, four bits each; who fills it remembers how many tokens there are.

    ``codes``: uint8 [B, G, tiles, D / 8, 16, 4] and ``scales``: float8_e4m3fn or uint8 (E8M0)
    [B, G, tiles, D / block, 16], ordered as attention.h says for ``kind``. ``global_scale``: float32 divisor: a scalar
    (static), one a token [tiles * 16] (dynamic: of the tokens appended together), one a row [B, G, tiles * 16], or
    None.
    """

    codes: Tensor
    scales: Tensor
    global_scale: Tensor | None
    format: Format
    kind: Kind

    @classmethod
    def allocate(
        cls,
        kind: Kind,
        fmt: Format,
        batch: int,
        heads: int,
        capacity: int,
        head_dim: int,
        *,
        global_scale: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> PackedStates:
        """Zeros for ``capacity`` tokens, rounded up to whole tiles. A ``global_scale`` given here is used for all.

        Raises ValueError for what :func:`unsupported` names, or a static format without its global scale.
        """
        reason = unsupported(fmt, head_dim)
        if reason:
            raise ValueError(f"{kind}s cannot be packed: {reason}")
        if global_scale is not None and fmt.has_global_scale:
            fmt = fmt.replace(global_scale="static")
            global_scale = global_scale.detach().to(device=device, dtype=torch.float32).reshape(())
        elif fmt.global_scale == "static":
            raise ValueError(
                f"{kind}s with a static global scale need its calibrated value: pass global_scale=<tensor>"
            )
        else:
            global_scale = None
        assert fmt.block is not None
        tiles = -(-capacity // TILE)
        if fmt.global_scale in ("dynamic", "row"):
            rows = (batch, heads) if fmt.global_scale == "row" else ()
            global_scale = torch.ones(*rows, tiles * TILE, device=device)
        codes = torch.zeros(batch, heads, tiles, head_dim // 8, TILE, 4, dtype=torch.uint8, device=device)
        scales = torch.zeros(batch, heads, tiles, head_dim // fmt.block, TILE, dtype=torch.uint8, device=device)
        if fmt.scale == "E4M3":
            scales = scales.view(torch.float8_e4m3fn)
        return cls(codes, scales, global_scale, fmt, kind)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, G, tokens that fit, D)."""
        B, G, tiles, words = self.codes.shape[:4]
        return B, G, tiles * TILE, words * 8

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        parts = (self.codes, self.scales, self.global_scale)
        return sum(part.untyped_storage().nbytes() for part in parts if part is not None)

    @torch.no_grad()
    def append(self, states: Tensor, start: int, *, shift: Tensor | None = None, name: str | None = None) -> None:
        """Quantize ``states`` [B, G, T, D] and store them as tokens ``start``, ``start + 1``, ...

        ``shift`` [G, D] is subtracted first, in float32. Codes, scales and global scale are those of
        ``reqat.quantize(states - shift, format)``. Raises ValueError for NaN or infinity (naming ``name``), another
        shape or dtype, or tokens that do not fit.
        """
        B, G, room, D = self.shape
        if states.ndim != 4 or (*states.shape[:2], states.shape[3]) != (B, G, D):
            raise ValueError(f"{self.kind}s of shape {tuple(states.shape)} for a cache of [{B}, {G}, tokens, {D}]")
        if not 0 <= start <= room - states.shape[2]:
            raise ValueError(
                f"the cache holds {room} tokens and {start + states.shape[2]} are needed: allocate more, or resize()"
            )
        if shift is not None and tuple(shift.shape) != (G, D):
            raise ValueError(f"shift of shape {tuple(shift.shape)} for {G} heads of {D} channels")
        if not states.numel():
            return
        if states.dtype == torch.float64:  # rounded once, after the subtraction, as the reference does
            states = (states if shift is None else states - shift[:, None]).float()
            shift = None
        fmt = self.format
        ok = torch.ops.reqat.kv_append(
            states,
            shift,
            self.codes,
            self.scales,
            self.global_scale,
            start,
            self.kind == "value",
            format_key(fmt),
        )
        if not ok:
            given = self.global_scale if fmt.global_scale == "static" else None
            x = states.float() if shift is None else states.float() - shift[:, None]
            quantize(x, fmt, global_scale=given, name=name)  # raises the error that says what is wrong
            raise ValueError(f"{name or self.kind}: only finite numbers can be quantized")

    def quantized(self, length: int) -> QuantizedTensor:
        """The first ``length`` tokens as codes [B, G, length, D] and scales in the usual order."""
        B, G, _, D = self.shape
        codes, scales = _rows(self.codes, self.scales, self.kind == "value", length)
        g = self.global_scale
        if g is not None and g.ndim:
            g = g[..., :length, None]
            g = g if g.ndim == 4 else g[None, None]
        return QuantizedTensor(codes, scales, g, self.format, 3, torch.Size((B, G, length, D)), torch.float32)

    def dequantize(self, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The first ``length`` tokens as numbers, [B, G, length, D]: bit for bit what fake quantization gives."""
        return self.quantized(length).dequantize(dtype)

    def resized(self, capacity: int, length: int) -> PackedStates:
        """A copy with room for ``capacity`` tokens that holds the first ``length``."""
        B, G, _, D = self.shape
        return self._copied(capacity, length, B, lambda part: part)

    def select_rows(self, rows: Tensor, length: int) -> PackedStates:
        """A copy with these batch rows, in this order, that holds the first ``length`` tokens."""
        return self._copied(self.shape[2], length, len(rows), lambda part: part.index_select(0, rows))

    def _copied(self, capacity: int, length: int, batch: int, chosen) -> PackedStates:  # type: ignore[no-untyped-def]
        _, G, _, D = self.shape
        static = self.global_scale if self.format.global_scale == "static" else None
        new = self.allocate(
            self.kind, self.format, batch, G, capacity, D, global_scale=static, device=self.codes.device
        )
        tiles = -(-length // TILE)
        new.codes[:, :, :tiles] = chosen(self.codes[:, :, :tiles])
        new.scales.view(torch.uint8)[:, :, :tiles] = chosen(self.scales.view(torch.uint8)[:, :, :tiles])
        if static is None and self.global_scale is not None:
            assert new.global_scale is not None
            old = self.global_scale[..., :length]
            new.global_scale[..., :length] = chosen(old) if old.ndim == 3 else old
        return new


def kv_attention(
    query: Tensor,
    key: PackedStates,
    value: PackedStates,
    length: int,
    *,
    scaling: float | None = None,
    mask: Tensor | None = None,
    start: Tensor | None = None,
    is_causal: bool = True,
) -> Tensor:
    """Attention of a few new tokens over the first ``length`` tokens of a packed cache, in float32.

    Args:
        query: [B, H, T, D], any float dtype (float64 is rounded to float32); H a multiple of the cache's heads.
        key, value: the cache, the new tokens already appended.
        scaling: factor of the scores; ``D ** -0.5`` if None.
        mask: broadcastable to [B, H, T, length], boolean (True = attend) or additive.
        start: int64 [B], the first token of each row (what is before is padding), or None.
        is_causal: without ``mask``, query t sees the first ``length - T + t + 1`` tokens; all if False.

    Returns float32 [B, H, T, D]. A row that may attend to nothing gives zeros; NaN in a query gives NaN. Not
    differentiable. Raises ValueError for shapes that do not fit together.
    """
    return torch.ops.reqat.kv_attention(
        query,
        key.codes,
        key.scales,
        key.global_scale,
        key.format.element,
        value.codes,
        value.scales,
        value.global_scale,
        value.format.element,
        length,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        mask,
        start,
        is_causal and mask is None,
    )


# --- operators --------------------------------------------------------------------------------------------------------

OPERATORS.define(
    "kv_append(Tensor states, Tensor? shift, Tensor(a!) codes, Tensor(b!) scales, Tensor(c!)? global_scale, int start, "
    "bool is_value, str format) -> bool"
)
OPERATORS.define(
    "kv_attention(Tensor query, Tensor key_codes, Tensor key_scales, Tensor? key_global_scale, str key_element, "
    "Tensor value_codes, Tensor value_scales, Tensor? value_global_scale, str value_element, int length, "
    "float scaling, Tensor? mask, Tensor? start, bool is_causal) -> Tensor"
)


def _append(
    states: Tensor,
    shift: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    global_scale: Tensor | None,
    start: int,
    is_value: bool,
    format: str,
) -> bool:
    """False if a number is not finite."""
    lib = library()
    if lib is None or states.dtype not in _DTYPES:
        return _append_torch(states, shift, codes, scales, global_scale, start, is_value, format)
    fmt = format_from_key(format)
    if states.stride(-1) != 1:
        states = states.contiguous()
    if shift is not None:
        shift = shift.float().contiguous()
    B, G, T, D = states.shape
    args = AppendArgs(
        states.data_ptr(),
        _DTYPES.index(states.dtype),
        *states.stride()[:3],
        None if shift is None else shift.data_ptr(),
        states_struct(codes, scales, global_scale, fmt.element),
        is_value,
        B,
        G,
        T,
        D,
        codes.shape[2],
        start,
        threads(states.numel(), _CODES_PER_THREAD),
        spec_of(fmt),
    )
    return lib.reqat_kv_append(ctypes.byref(args)) != NOT_FINITE


def _append_torch(
    states: Tensor,
    shift: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    global_scale: Tensor | None,
    start: int,
    is_value: bool,
    format: str,
) -> bool:
    fmt = format_from_key(format)
    x = states.float() if shift is None else states.float() - shift.float()[:, None]
    if not bool(torch.isfinite(x).all()):
        return False
    end = start + x.shape[2]
    q = quantize(x, fmt, global_scale=global_scale if fmt.global_scale == "static" else None)
    if fmt.global_scale == "dynamic":
        assert global_scale is not None and q.global_scale is not None
        global_scale[start:end] = q.global_scale
    elif fmt.global_scale == "row":
        assert global_scale is not None and q.global_scale is not None
        global_scale[..., start:end] = q.global_scale[..., 0]
    token = torch.arange(start, end, device=x.device)
    tile, lane = token // TILE, token % TILE
    # An index in front of the slices it does not touch: [T, B, G, ...].
    scales.view(torch.uint8)[:, :, tile, :, lane] = q.scales.view(torch.uint8).movedim(2, 0)
    if not is_value:
        codes[:, :, tile, :, lane] = pack_codes(q.codes).unflatten(-1, (-1, 4)).movedim(2, 0)
        return True
    tiles = slice(start // TILE, -(-end // TILE))
    rows = _value_rows(codes[:, :, tiles])
    first = tiles.start * TILE
    rows[:, :, start - first : end - first] = q.codes
    codes[:, :, tiles] = _value_tiles(rows)
    return True


def _attention(
    query: Tensor,
    key_codes: Tensor,
    key_scales: Tensor,
    key_global_scale: Tensor | None,
    key_element: str,
    value_codes: Tensor,
    value_scales: Tensor,
    value_global_scale: Tensor | None,
    value_element: str,
    length: int,
    scaling: float,
    mask: Tensor | None,
    start: Tensor | None,
    is_causal: bool,
) -> Tensor:
    lib = library()
    key = (key_codes, key_scales, key_global_scale, key_element)
    value = (value_codes, value_scales, value_global_scale, value_element)
    if lib is None:
        return _attention_torch(query, *key, *value, length, scaling, mask, start, is_causal)
    B, H, T, D = _checked(query, key, value, length, start)
    out = torch.empty(B, H, T, D)
    if not length:
        return out.zero_()
    if not out.numel():
        return out
    query = query.float().contiguous()
    kind, mask_strides = 0, (0, 0, 0, 0)
    if mask is not None:
        kind, mask = (1, mask) if mask.dtype == torch.bool else (2, mask.float())
        mask = _broadcast_mask(mask, (B, H, T, length))
        mask_strides = mask.stride()  # type: ignore[assignment]
    if start is not None:
        start = start.to(torch.int64).contiguous()
    G = key_codes.shape[1]
    args = AttentionArgs(
        query.data_ptr(),
        out.data_ptr(),
        states_struct(*key),
        states_struct(*value),
        None if mask is None else mask.data_ptr(),
        kind,
        *mask_strides,
        None if start is None else start.data_ptr(),
        B,
        H,
        G,
        T,
        length,
        D,
        key_codes.shape[2],
        threads(2 * B * G * length * D, _CODES_PER_THREAD),
        scaling,
        is_causal,
    )
    if lib.reqat_kv_attention(ctypes.byref(args)) == NO_MEMORY:
        raise MemoryError(f"no memory for the partial sums of {B} x {H} x {T} query rows over {length} tokens")
    return out


def _attention_torch(
    query: Tensor,
    key_codes: Tensor,
    key_scales: Tensor,
    key_global_scale: Tensor | None,
    key_element: str,
    value_codes: Tensor,
    value_scales: Tensor,
    value_global_scale: Tensor | None,
    value_element: str,
    length: int,
    scaling: float,
    mask: Tensor | None,
    start: Tensor | None,
    is_causal: bool,
) -> Tensor:
    key = (key_codes, key_scales, key_global_scale, key_element)
    value = (value_codes, value_scales, value_global_scale, value_element)
    B, H, T, D = _checked(query, key, value, length, start)
    G = key_codes.shape[1]
    k, v = (_numbers(*side, kind, length) for side, kind in ((key, False), (value, True)))
    scores = query.float().reshape(B, G, H // G * T, D) @ k.transpose(-1, -2) * scaling
    scores = scores.view(B, H, T, length)
    position = torch.arange(length, device=query.device)
    hidden = position[None] > torch.arange(length - T, length, device=query.device)[:, None] if is_causal else None
    if mask is not None:
        mask = _broadcast_mask(mask, (B, H, T, length))
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.float()
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    if start is not None:
        scores = scores.masked_fill(position < start[:, None, None, None], -math.inf)
    blind = (scores == -math.inf).all(-1, keepdim=True)
    p = torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)
    return (p.view(B, G, H // G * T, length) @ v).view(B, H, T, D)


def _attention_meta(query: Tensor, *args: object) -> Tensor:
    return query.new_empty(query.shape, dtype=torch.float32)


OPERATORS.impl("kv_append", _append_torch, "CompositeExplicitAutograd")
OPERATORS.impl("kv_append", _append, "CPU")
OPERATORS.impl("kv_attention", _attention_torch, "CompositeExplicitAutograd")
OPERATORS.impl("kv_attention", _attention, "CPU")
torch.library.register_fake("reqat::kv_append", lambda *args: True)
torch.library.register_fake("reqat::kv_attention", _attention_meta)


# --- helpers ----------------------------------------------------------------------------------------------------------


def states_struct(codes: Tensor, scales: Tensor, global_scale: Tensor | None, element: str) -> _States:
    """Keys or values as C reads them; the tensors must outlive it."""
    strides = (0, 0, 0)
    if global_scale is not None and global_scale.ndim:
        strides = (*(0,) * (3 - global_scale.ndim), *global_scale.stride())  # type: ignore[assignment]
    return _States(
        codes.data_ptr(),
        scales.data_ptr(),
        None if global_scale is None else global_scale.data_ptr(),
        *strides,
        codes.shape[3] * 8 // scales.shape[3],
        scales.dtype == torch.float8_e4m3fn,
        _ELEMENTS.index(element),
    )


Side = tuple[Tensor, Tensor, Tensor | None, str]


def _checked(query: Tensor, key: Side, value: Side, length: int, start: Tensor | None) -> tuple[int, int, int, int]:
    """The query's shape; raises ValueError where the C++ code could read what is not there."""
    if query.ndim != 4 or not query.is_floating_point():
        raise ValueError(f"query must be [B, H, T, D] of a float dtype, got {list(query.shape)} of {query.dtype}")
    B, H, T, D = query.shape
    for what, (codes, scales, g, element) in (("key", key), ("value", value)):
        if codes.ndim != 6 or codes.dtype != torch.uint8 or codes.shape[4:] != (TILE, 4) or codes.shape[3] % 2:
            raise ValueError(f"{what} codes must be uint8 [B, G, tiles, D / 8, 16, 4], got {list(codes.shape)}")
        G, tiles = codes.shape[1:3]
        if codes.shape[0] != B or codes.shape[3] * 8 != D or G == 0 or H % G:
            raise ValueError(f"query {list(query.shape)} does not fit {what} codes {list(codes.shape)}")
        block = 16 if scales.dtype == torch.float8_e4m3fn else 32
        if tuple(scales.shape) != (B, G, tiles, D // block, TILE) or D % block or scales.element_size() != 1:
            raise ValueError(
                f"{what} scales {list(scales.shape)} of {scales.dtype} do not fit codes {list(codes.shape)}"
            )
        shapes = ((), (tiles * TILE,), (B, G, tiles * TILE))
        if g is not None and (g.dtype != torch.float32 or tuple(g.shape) not in shapes):
            raise ValueError(f"{what} global scale {list(g.shape)} must be a float32 scalar, one a token or one a row")
        if not codes.is_contiguous() or not scales.is_contiguous():
            raise ValueError(f"{what} codes and scales must be contiguous; call .contiguous() once, not in each step")
        if element not in _ELEMENTS:
            raise ValueError(f"{what} element {element!r}: choose {' or '.join(_ELEMENTS)}")
        if not 0 <= length <= tiles * TILE:
            raise ValueError(f"{length} tokens of a cache that holds {tiles * TILE}")
        if any(part is not None and part.device != query.device for part in (codes, scales, g)):
            raise ValueError(f"the query is on {query.device}, {what} codes on {codes.device}: move one of them")
    if key[0].shape != value[0].shape:
        raise ValueError(f"key codes {list(key[0].shape)} and value codes {list(value[0].shape)} differ in shape")
    if start is not None and (start.shape != (B,) or start.is_floating_point()):
        raise ValueError(f"start must be one integer a batch row, got {list(start.shape)} of {start.dtype}")
    return B, H, T, D


def _broadcast_mask(mask: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    try:
        return mask.broadcast_to(shape)
    except RuntimeError as error:
        raise ValueError(f"mask of shape {list(mask.shape)} does not broadcast to {list(shape)}") from error


def _rows(codes: Tensor, scales: Tensor, is_value: bool, length: int) -> tuple[Tensor, Tensor]:
    """Codes [B, G, length, D], one a byte, and scales [B, G, length, D / block] of a cache's first tokens."""
    tiles = -(-length // TILE)
    codes, bits = codes[:, :, :tiles], scales.view(torch.uint8)[:, :, :tiles]
    rows = _value_rows(codes) if is_value else _key_rows(codes)
    bits = bits.transpose(-1, -2).flatten(2, 3)[:, :, :length].contiguous()
    return rows[:, :, :length], bits.view(scales.dtype)


def _key_rows(codes: Tensor) -> Tensor:
    packed = codes.transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return unpack_codes(packed, packed.shape[-1] * 2)


def _value_rows(codes: Tensor) -> Tensor:
    B, G, tiles, words = codes.shape[:4]
    nibbles = torch.stack((codes & 0xF, codes >> 4), -1).flatten(-2)  # [B, G, tiles, D / 8, lane, nibble]
    return nibbles.transpose(-1, -2).reshape(B, G, tiles * TILE, words * 8)


def _value_tiles(rows: Tensor) -> Tensor:
    B, G, tokens, D = rows.shape
    nibbles = rows.reshape(B, G, tokens // TILE, D // 8, 8, TILE).transpose(-1, -2)
    return nibbles[..., ::2] | (nibbles[..., 1::2] << 4)


def _numbers(
    codes: Tensor, scales: Tensor, global_scale: Tensor | None, element: str, is_value: bool, length: int
) -> Tensor:
    """Dequantized float32 [B, G, length, D]."""
    rows, stored = _rows(codes, scales, is_value, length)
    s = stored.float() if stored.dtype == torch.float8_e4m3fn else e8m0_to_float(stored)
    if global_scale is not None:
        s = s / (global_scale[..., :length, None] if global_scale.ndim else global_scale)
    return ELEMENTS[element].decode(rows) * s.repeat_interleave(rows.shape[-1] // s.shape[-1], -1)
