"""A key/value cache that is really four bits wide: how it lies in memory, and storing new tokens in it.

:class:`PackedStates` keeps keys or values in tiles of 16 tokens arranged for the attention kernel (attention.h).
:meth:`PackedStates.append` stores the codes and scales of ``reqat.quantize`` bit for bit.

Without the native library the same functions compute from the same bytes in PyTorch.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from reqat.formats import Format, QuantizedTensor, pack_codes, quantize, unpack_codes
from reqat.formats.elements import ELEMENTS
from reqat.formats.scales import e8m0_to_float
from reqat.formats.subnormals import keeps_subnormals, subnormals_kept
from reqat_kernels.native import check
from reqat_kernels.native.library import NOT_FINITE, OPERATORS, library, threads
from reqat_kernels.native.quantize import Spec, format_from_key, format_key, spec_of

TILE = 16
MAX_HEAD_DIM = 1024
ELEMENT_NAMES = ("E2M1", "E1M2")
STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # by reqat::Dtype
# Codes that make a second thread worth starting: those that one turns into numbers in some 20 microseconds.
CODES_PER_THREAD = 1 << 17

_i64, _pointer = ctypes.c_int64, ctypes.c_void_p
Kind = Literal["key", "value"]


class StatesStruct(ctypes.Structure):
    """``reqat::PackedStates`` of attention.h."""

    _fields_ = [
        *((name, _pointer) for name in ("codes", "scales", "global_scale")),
        *((name, _i64) for name in ("global_b", "global_g", "global_t", "block", "scale", "element")),
    ]


class AppendArgs(ctypes.Structure):
    """``reqat::AppendArgs``."""

    _fields_ = [
        ("x", _pointer),
        *((name, _i64) for name in ("dtype", "x_b", "x_g", "x_t")),
        ("shift", _pointer),
        ("states", StatesStruct),
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
    None. Raises ValueError (TypeError) for parts that do not fit together.
    """

    codes: Tensor
    scales: Tensor
    global_scale: Tensor | None
    format: Format
    kind: Kind

    def __post_init__(self) -> None:
        if self.kind not in ("key", "value"):
            raise ValueError(f"kind is {self.kind!r}: 'key' or 'value' is needed")
        if not isinstance(self.format, Format):
            raise TypeError(f"format is a {type(self.format).__name__}, not a Format; get_format(name) makes one")
        side = (self.codes, self.scales, self.global_scale, self.format.element)
        check_side(f"{self.kind}", *side, check_codes(self.kind, self.codes))
        _check_format(self.kind, self.format, self.scales, self.global_scale)

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
        for what, number in (("batch", batch), ("heads", heads), ("capacity", capacity), ("head_dim", head_dim)):
            check.size(what, number)
        reason = unsupported(fmt, head_dim)
        if reason:
            raise ValueError(f"{kind}s cannot be packed: {reason}")
        if global_scale is not None and fmt.has_global_scale:
            fmt = fmt.replace(global_scale="static")
            check.global_scale("global_scale", global_scale)
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
            global_scale = torch.ones(*rows, tiles * TILE, dtype=torch.float32, device=device)
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
        check.floats(f"{self.kind}s", states)
        check.size("start", start)
        if states.ndim != 4 or (*states.shape[:2], states.shape[3]) != (B, G, D):
            raise ValueError(f"{self.kind}s of shape {tuple(states.shape)} for a cache of [{B}, {G}, tokens, {D}]")
        if not 0 <= start <= room - states.shape[2]:
            raise ValueError(
                f"the cache holds {room} tokens and {start + states.shape[2]} are needed: allocate more, or resize()"
            )
        if shift is not None and tuple(check.floats("shift", shift).shape) != (G, D):
            raise ValueError(f"shift of shape {tuple(shift.shape)} for {G} heads of {D} channels")
        if not states.numel():
            return
        if states.dtype == torch.float64:  # rounded once, after the subtraction, as the reference does
            with subnormals_kept(states):
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
        B, G, room, D = self.shape
        check.size("length", length, most=room)
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
        """A copy with these batch rows (integers [rows], perhaps none), in this order, of the first ``length`` tokens.

        Raises ValueError for a row that is not there.
        """
        check_batch_rows(rows, self.shape[0])
        return self._copied(self.shape[2], length, len(rows), lambda part: part.index_select(0, rows.long()))

    def _copied(self, capacity: int, length: int, batch: int, chosen) -> PackedStates:  # type: ignore[no-untyped-def]
        _, G, room, D = self.shape
        check.size("capacity", capacity)
        check.size("length", length, most=min(room, -(-capacity // TILE) * TILE))
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


# --- the operator -----------------------------------------------------------------------------------------------------

OPERATORS.define(
    "kv_append(Tensor states, Tensor? shift, Tensor(a!) codes, Tensor(b!) scales, Tensor(c!)? global_scale, int start, "
    "bool is_value, str format) -> bool"
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
    if check.tensor("states", states).dtype not in STATE_DTYPES or lib is None:
        return _append_torch(states, shift, codes, scales, global_scale, start, is_value, format)
    fmt = _check_append(states, shift, codes, scales, global_scale, start, format)
    if not states.numel():
        return True
    if states.stride(-1) != 1:
        states = states.contiguous()
    if shift is not None:
        shift = shift.float().contiguous()
    B, G, T, D = states.shape
    args = AppendArgs(
        check.address(states),
        STATE_DTYPES.index(states.dtype),
        *states.stride()[:3],
        check.address(shift),
        states_struct(codes, scales, global_scale, fmt.element),
        is_value,
        B,
        G,
        T,
        D,
        codes.shape[2],
        start,
        threads(states.numel(), CODES_PER_THREAD),
        spec_of(fmt),
    )
    return lib.reqat_kv_append(ctypes.byref(args)) != NOT_FINITE


@torch.no_grad()  # writes into the cache, whoever follows gradients through it
@keeps_subnormals
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
    fmt = _check_append(states, shift, codes, scales, global_scale, start, format)
    if not states.numel():
        return True
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
    token = torch.arange(start, end, dtype=torch.int64, device=x.device)
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


def _append_meta(
    states: Tensor,
    shift: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    global_scale: Tensor | None,
    start: int,
    is_value: bool,
    format: str,
) -> bool:
    _check_append(states, shift, codes, scales, global_scale, start, format)
    return True


OPERATORS.impl("kv_append", _append_torch, "CompositeExplicitAutograd")
OPERATORS.impl("kv_append", _append, "CPU")
torch.library.register_fake("reqat::kv_append", _append_meta)


# --- helpers ----------------------------------------------------------------------------------------------------------


def states_struct(codes: Tensor, scales: Tensor, global_scale: Tensor | None, element: str) -> StatesStruct:
    """Keys or values as C reads them; the tensors must outlive it."""
    strides = (0, 0, 0)
    if global_scale is not None and global_scale.ndim:
        strides = (*(0,) * (3 - global_scale.ndim), *global_scale.stride())  # type: ignore[assignment]
    return StatesStruct(
        codes.data_ptr(),
        scales.data_ptr(),
        None if global_scale is None else global_scale.data_ptr(),
        *strides,
        codes.shape[3] * 8 // scales.shape[3],
        scales.dtype == torch.float8_e4m3fn,
        ELEMENT_NAMES.index(element),
    )


def dequantized(
    codes: Tensor, scales: Tensor, global_scale: Tensor | None, element: str, is_value: bool, length: int
) -> Tensor:
    """Dequantized float32 [B, G, length, D]."""
    rows, stored = _rows(codes, scales, is_value, length)
    s = stored.float() if stored.dtype == torch.float8_e4m3fn else e8m0_to_float(stored)
    if global_scale is not None:
        s = s / (global_scale[..., :length, None] if global_scale.ndim else global_scale)
    return ELEMENTS[element].decode(rows) * s.repeat_interleave(rows.shape[-1] // s.shape[-1], -1)


Side = tuple[Tensor, Tensor, Tensor | None, str]


def check_codes(what: str, codes: Tensor) -> tuple[int, int, int, int]:
    """[B, G, tiles, D] of a cache's codes; raises ValueError for what are none."""
    check.tensor(f"{what} codes", codes)
    if codes.ndim != 6 or codes.dtype != torch.uint8 or codes.shape[4:] != (TILE, 4) or codes.shape[3] % 2:
        raise ValueError(f"{what} codes must be uint8 [B, G, tiles, D / 8, 16, 4], got {list(codes.shape)}")
    B, G, tiles, words = codes.shape[:4]
    if not 0 < words * 8 <= MAX_HEAD_DIM:
        raise ValueError(f"{what} codes {list(codes.shape)} are of a head dimension that is not 1 to {MAX_HEAD_DIM}")
    return B, G, tiles, words * 8


def check_side(
    what: str, codes: Tensor, scales: Tensor, g: Tensor | None, element: str, shape: tuple[int, int, int, int]
) -> None:
    """Raise ValueError unless the parts of a cache whose codes are of this ``shape`` lie as C will read them."""
    B, G, tiles, D = shape
    check.tensor(f"{what} scales", scales)
    block = 16 if scales.dtype == torch.float8_e4m3fn else 32
    one_byte = scales.dtype in (torch.float8_e4m3fn, torch.uint8)
    if tuple(scales.shape) != (B, G, tiles, D // block, TILE) or D % block or not one_byte:
        raise ValueError(f"{what} scales {list(scales.shape)} of {scales.dtype} do not fit codes {list(codes.shape)}")
    if g is not None:
        shapes = ((), (tiles * TILE,), (B, G, tiles * TILE))
        if check.tensor(f"{what} global scale", g).dtype != torch.float32 or tuple(g.shape) not in shapes:
            raise ValueError(f"{what} global scale {list(g.shape)} must be a float32 scalar, one a token or one a row")
    if not codes.is_contiguous() or not scales.is_contiguous():
        raise ValueError(f"{what} codes and scales must be contiguous; call .contiguous() once, not in each step")
    if element not in ELEMENT_NAMES:
        raise ValueError(f"{what} element {element!r}: choose {' or '.join(ELEMENT_NAMES)}")
    if any(part is not None and part.device != codes.device for part in (scales, g)):
        raise ValueError(f"{what} codes are on {codes.device}, scales on {scales.device}: move one of them")


def _check_format(what: str, fmt: Format, scales: Tensor, g: Tensor | None) -> None:
    """Raise ValueError unless a cache of these parts can hold ``fmt``: its scales' type, as many global scales."""
    if (fmt.scale == "E4M3") != (scales.dtype == torch.float8_e4m3fn):
        raise ValueError(f"{what} scales are {scales.dtype}; {fmt.name} has scales of {fmt.scale}")
    axes = {"none": None, "static": 0, "dynamic": 1, "row": 3}[fmt.global_scale]
    if (None if g is None else g.ndim) != axes:
        have = "none" if g is None else f"one of shape {list(g.shape)}"
        raise ValueError(f"{what} global scale of {fmt.name} with global_scale={fmt.global_scale!r}: {have} is given")
    if g is not None and (0 in g.stride() and g.numel() > 1):
        raise ValueError(f"{what} global scale of shape {list(g.shape)} shares memory among tokens: make a copy of it")


def _check_append(
    states: Tensor,
    shift: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    global_scale: Tensor | None,
    start: int,
    format: str,
) -> Format:
    """The format; raises ValueError where C could write what does not belong to the cache."""
    fmt = format_from_key(format)
    shape = B, G, tiles, D = check_codes("cache", codes)
    reason = unsupported(fmt, D)
    if reason:
        raise ValueError(f"the cache cannot be packed: {reason}")
    check_side("cache", codes, scales, global_scale, fmt.element, shape)
    _check_format("cache", fmt, scales, global_scale)
    check.floats("states", states, ndim=4, device=codes.device)
    T = states.shape[2]
    if tuple(states.shape) != (B, G, T, D):
        raise ValueError(f"states of shape {list(states.shape)} for a cache of [{B}, {G}, tokens, {D}]")
    if not 0 <= start <= tiles * TILE - T:
        raise ValueError(f"{T} tokens from {start} on do not fit a cache of {tiles * TILE} tokens")
    if shift is not None:
        check.floats("shift", shift, ndim=2, device=codes.device)
        if tuple(shift.shape) != (G, D):
            raise ValueError(f"shift of shape {list(shift.shape)} for {G} heads of {D} channels")
    if fmt.global_scale == "static" and codes.device.type == "cpu" and type(global_scale) is Tensor:
        check.global_scale("global scale of the cache", global_scale)
    return fmt


def check_batch_rows(rows: Tensor, batch: int) -> None:
    """Raise ValueError unless ``rows`` are indices [n] of ``batch`` rows; an empty selection may be of any type."""
    check.tensor("rows", rows)
    whole = rows.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    if rows.ndim != 1 or not (whole or not rows.numel()):
        raise ValueError(f"rows must be integers of one axis, got {rows.dtype} of shape {list(rows.shape)}")
    if rows.numel() and not (int(rows.min()) >= 0 and int(rows.max()) < batch):
        raise ValueError(f"rows {rows.tolist()[:8]} are not all among the {batch} rows of the cache")


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
