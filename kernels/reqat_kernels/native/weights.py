"""Packed FP4 weights in the order in which the matrix kernels stream them, and what C is told of them.

:func:`pack_weight` rearranges the codes of a quantized weight once (4.5 bits a weight for NVFP4, 4.25 for MXFP4, see
gemm.h). A packed weight is checked when it is made, and its bytes again, once, when their address first goes to C.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from reqat.formats import Format, QuantizedTensor
from reqat.formats.elements import ELEMENTS
from reqat.formats.scales import FLOAT32_MAX, e8m0_to_float, effective_scale
from reqat.formats.subnormals import subnormals_kept
from reqat_kernels.native import check
from reqat_kernels.native.library import OPERATORS, library

_TILE, _STEP = 16, 16  # gemm.h
_SCALES = ("E4M3", "E8M0")
_HUGE, _HUGE_FROM = 1 << 21, 1 << 20  # a huge page, and how much is worth one
_ELEMENTS = tuple(ELEMENTS)


class Weight(ctypes.Structure):
    """``reqat::Weight`` of gemm.h."""

    _fields_ = [
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("steps", ctypes.c_int64),
        ("block", ctypes.c_int32),
        ("scale_kind", ctypes.c_int32),
        ("values", ctypes.c_int8 * 16),
        ("alpha", ctypes.c_double),  # as float32 the caller's float mode could flush it to zero
    ]


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight [``rows``, ``columns``] in the kernel's order.

    ``data``: uint8, codes then scales, padded to whole tiles of 16 rows and whole blocks of columns. ``global_scale``:
    float32 scalar divisor (1 where the format has none). Raises ValueError (TypeError) for parts that do not fit.
    """

    data: Tensor
    rows: int
    columns: int
    format: Format
    global_scale: float

    def __post_init__(self) -> None:
        if not isinstance(self.format, Format) or not supports(self.format):
            raise ValueError(f"a packed weight is in NVFP4, NVFP4-4/6 or MXFP4, not {self.format!r}")
        check_layout(*self.layout)
        check_data(self.data, *self.layout[:4])
        check.on_cpu("data", self.data)
        if not self.format.has_global_scale and self.global_scale != 1:
            raise ValueError(f"{self.format.name} has no global scale: it must be 1, got {self.global_scale}")

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales, padded to whole tiles and blocks."""
        return self.data.nbytes

    @property
    def layout(self) -> tuple[int, int, int, int, float]:
        """What an operator must know besides ``data``: rows, columns, element, scale type, global scale."""
        element, scale = _ELEMENTS.index(self.format.element), _SCALES.index(self.format.scale)
        return self.rows, self.columns, element, scale, self.global_scale

    def unpack(self) -> QuantizedTensor:
        """The tensor that was packed."""
        codes, scales = _unpack(self.data, *self.layout[:4])
        scales = scales.view(torch.float8_e4m3fn) if self.format.scale == "E4M3" else scales
        g = None
        if self.format.has_global_scale:
            g = torch.tensor(self.global_scale, dtype=torch.float32, device="cpu")
        shape = torch.Size((self.rows, self.columns))
        return QuantizedTensor(codes, scales, g, self.format, 1, shape, torch.float32)

    def dequantize(self) -> Tensor:
        """The dense weight, float32 [rows, columns]."""
        return self.unpack().dequantize()

    def rows_at(self, ids: Tensor) -> Tensor:
        """The weight's rows ``ids`` (integers, any shape [...]) as numbers, float32 [..., columns].

        Reads those rows alone; the numbers are those of :meth:`dequantize`, bit for bit. Raises IndexError for a row
        that is not there.
        """
        rows: Tensor = torch.ops.reqat.fp4_rows(
            check.tensor("ids", ids).reshape(-1), self.data, *self.layout, self.format.scale_rule == "reciprocal"
        )
        return rows.view(*ids.shape, self.columns)


def supports(fmt: Format) -> bool:
    """Whether weights of this format can be packed: FP4 in blocks, scaled by E4M3 or E8M0 and nothing besides."""
    fp4 = fmt.element in ("E2M1", "E1M2") and not fmt.asymmetric
    return fp4 and fmt.scale in _SCALES and fmt.scale_rule != "four_thirds"


def packed_bytes(rows: int, columns: int, fmt: Format) -> int:
    """Bytes of a packed weight, in whole cache lines."""
    if not supports(fmt):
        raise ValueError(f"weights in {fmt.name} have no kernel; NVFP4, NVFP4-4/6 and MXFP4 do")
    check.size("rows", rows)
    check.size("columns", columns)
    return -(-_data_bytes(rows, columns, _SCALES.index(fmt.scale)) // 64) * 64


def allocate(n: int) -> Tensor:
    """``n`` bytes, uint8, that start on a cache line; a megabyte or more in huge pages, where the system has them.

    A weight is read once a step from end to end, and looking up small pages costs a third of the time. A model's
    weights best share one such piece: each alone has an end that fills no huge page. The piece is mapped apart from
    the heap, whose memory may have been touched before: pages are made huge when they are first written or never.
    """
    check.size("n", n)
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if n < _HUGE_FROM or advice is None:
        raw, line = torch.empty(n + 64, dtype=torch.uint8, device="cpu"), 64
    else:
        memory, line = mmap.mmap(-1, n + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), _HUGE
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(advice)
        raw = torch.frombuffer(memory, dtype=torch.uint8)
    offset = -raw.data_ptr() % line
    return raw[offset : offset + n]


def pack_weight(q: QuantizedTensor, out: Tensor | None = None) -> PackedWeight:
    """Rearrange a weight [N, K], quantized along K, for :func:`linear`. Not differentiable; CPU.

    ``out``: :func:`packed_bytes` bytes to put it in, from :func:`allocate`. Raises ValueError for a format that
    :func:`supports` refuses, another axis or rank, a global scale a row, parts that do not belong together or hold
    invalid numbers, or an ``out`` of another size.
    """
    if not isinstance(q, QuantizedTensor):
        raise TypeError(f"a weight is a QuantizedTensor, as reqat.quantize makes it, not a {type(q).__name__}")
    q.check("weight")
    fmt = q.format
    reason = None
    if not supports(fmt):
        reason = f"weights in {fmt.name} have no kernel; NVFP4, NVFP4-4/6 and MXFP4 do"
    elif len(q.shape) != 2 or q.axis != 1:
        reason = f"a weight is [N, K], quantized along K; got shape {tuple(q.shape)}, axis {q.axis}"
    elif q.global_scale is not None and q.global_scale.numel() != 1:
        reason = "a weight takes one global scale; quantize it with global_scale='dynamic' or 'static'"
    elif q.codes.device.type != "cpu":
        reason = f"codes are on {q.codes.device}; move them to the CPU first"
    if reason:
        raise ValueError(f"cannot pack: {reason}")
    rows, columns = q.shape
    tiles, width = -(-rows // _TILE), q.codes.shape[1]
    blocks = q.scales.shape[1]
    codes_NK = F.pad(q.codes, (0, 0, 0, tiles * _TILE - rows)).view(tiles, _TILE, width // _STEP, 2, 2, 4)
    bytes_ = (codes_NK[:, :, :, :, 0] | (codes_NK[:, :, :, :, 1] << 4)).permute(0, 2, 3, 1, 4).reshape(-1)
    scales_NB = F.pad(q.scales.view(torch.uint8), (0, 0, 0, tiles * _TILE - rows)).view(tiles, _TILE, blocks)
    size = bytes_.numel() + scales_NB.numel()
    if out is None:
        out = allocate(size)
    elif check.tensor("out", out).dtype != torch.uint8 or out.numel() < size or not out.is_contiguous():
        raise ValueError(f"out must be {size} contiguous bytes, got {out.numel()} of {out.dtype}")
    elif out.ndim != 1 or out.device.type != "cpu":
        raise ValueError(f"out must have one axis, on the CPU; got shape {list(out.shape)} on {out.device}")
    data = out[:size]
    data[: bytes_.numel()] = bytes_
    data[bytes_.numel() :] = scales_NB.transpose(1, 2).reshape(-1)
    g = 1.0 if q.global_scale is None else float(q.global_scale)
    return PackedWeight(data, rows, columns, fmt, g)


def weight_of(w: PackedWeight) -> Weight:
    """A packed weight as C reads it; its memory must outlive the structure."""
    return struct_of(w.data, *w.layout)


def struct_of(data: Tensor, rows: int, columns: int, element: int, scale: int, g: float) -> Weight:
    """The same of a weight's parts; refused unless the bytes are those of such a weight."""
    if (
        check.tensor("weight data", data).dtype != torch.uint8
        or data.ndim != 1
        or not data.is_cpu
        or not data.is_contiguous()
    ):
        check_layout(rows, columns, element, scale, g)
        check_data(check.on_cpu("weight data", data), rows, columns, element, scale)
    return _checked_struct(data.data_ptr(), data.shape[0], rows, columns, element, scale, g)


@lru_cache(maxsize=4096)
def _checked_struct(data: int, nbytes: int, rows: int, columns: int, element: int, scale: int, g: float) -> Weight:
    """Of ``nbytes`` bytes at the address ``data``. Checks once what stays the same from call to call."""
    check_layout(rows, columns, element, scale, g)
    if nbytes != _data_bytes(rows, columns, scale) or (nbytes and not data):
        raise ValueError(
            f"a packed weight of shape [{rows}, {columns}] ({_SCALES[scale]} scales) takes "
            f"{_data_bytes(rows, columns, scale)} bytes, got {nbytes if data else 'no memory'}"
        )
    return weight_struct(data, rows, columns, element, scale, 0.5 / g)


@lru_cache(maxsize=4096)
def weight_struct(data: int, rows: int, columns: int, element: int, scale: int, alpha: float) -> Weight:
    """A packed weight at address ``data`` as C reads it, products times ``alpha``; the memory must outlive it.

    Checks nothing: :func:`weight_of` is for those who have a :class:`PackedWeight`.
    """
    padded = padded_columns(columns, scale)
    code_bytes = -(-rows // _TILE) * _TILE * padded // 2
    values = (ctypes.c_int8 * 16)(*_values(element))
    return Weight(data, data + code_bytes, rows, padded // _STEP, block_of(scale), scale, values, alpha)


def _data_bytes(rows: int, columns: int, scale: int) -> int:
    """Bytes of codes and scales, in whole tiles and blocks."""
    cells = -(-rows // _TILE) * _TILE * padded_columns(columns, scale)
    return cells // 2 + cells // block_of(scale)


def _values(element: int) -> list[int]:
    return [int(2 * v) for v in ELEMENTS[_ELEMENTS[element]].code_values()]


def block_of(scale: int) -> int:
    """Columns that share a scale of this kind."""
    return 32 if _SCALES[scale] == "E8M0" else 16


def padded_columns(columns: int, scale: int) -> int:
    """``columns`` rounded up to whole blocks."""
    return -(-columns // block_of(scale)) * block_of(scale)


def _fp4_rows(
    ids: Tensor, weight: Tensor, rows: int, columns: int, element: int, scale: int, g: float, reciprocal: bool
) -> Tensor:
    w = struct_of(weight, rows, columns, element, scale, g)
    at = check.rows("ids", check.on_cpu("ids", ids), rows).long().contiguous()
    lib = _library()
    if lib is None:
        return _gathered(at, weight, rows, columns, element, scale, g, reciprocal)
    out = torch.empty(len(at), columns, dtype=torch.float32, device="cpu")
    if out.numel():
        lib.reqat_fp4_rows(w, check.address(at), len(at), columns, g, reciprocal, out.data_ptr())
    return out


def _gathered(
    at: Tensor, weight: Tensor, rows: int, columns: int, element: int, scale: int, g: float, reciprocal: bool
) -> Tensor:
    """The same in PyTorch."""
    tile, lane = at // _TILE, at % _TILE
    width, tiles = padded_columns(columns, scale), -(-rows // _TILE)
    blocks, split = width // block_of(scale), tiles * _TILE * width // 2
    packed = weight[:split].view(tiles, width // _STEP, 2, _TILE, 4)[tile, :, :, lane]  # [n, step, load, i]
    codes = torch.stack((packed & 15, packed >> 4), dim=3).reshape(len(at), width)
    scales = weight[split:].view(tiles, blocks, _TILE)[tile, :, lane]
    values = torch.tensor(ELEMENTS[_ELEMENTS[element]].code_values(), dtype=torch.float32, device="cpu")[codes.long()]
    with subnormals_kept(weight):
        if _SCALES[scale] == "E8M0":
            S = e8m0_to_float(scales)
        else:
            rule = "reciprocal" if reciprocal else "divide"
            divisor = torch.tensor(g, dtype=torch.float32, device="cpu")
            S = effective_scale(scales.view(torch.float8_e4m3fn).float(), divisor, rule)
        values *= S.repeat_interleave(block_of(scale), dim=1)
    return values[:, :columns].clamp(-FLOAT32_MAX, FLOAT32_MAX)


def _fp4_rows_meta(
    ids: Tensor, weight: Tensor, rows: int, columns: int, element: int, scale: int, g: float, reciprocal: bool
) -> Tensor:
    check_layout(rows, columns, element, scale, g)
    check_data(weight, rows, columns, element, scale)
    return weight.new_empty((ids.shape[0], columns), dtype=torch.float32)


OPERATORS.define(
    "fp4_rows(Tensor ids, Tensor weight, int rows, int columns, int element, int scale, float g, bool reciprocal) -> "
    "Tensor"
)
OPERATORS.impl("fp4_rows", _fp4_rows, "CPU")
torch.library.register_fake("reqat::fp4_rows", _fp4_rows_meta)


@cache
def _library() -> ctypes.CDLL | None:
    lib = library()
    if lib is not None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        lib.reqat_fp4_rows.argtypes = [
            ctypes.POINTER(Weight), pointer, number, number, ctypes.c_float, ctypes.c_int, pointer,
        ]  # fmt: skip
    return lib


def _unpack(data: Tensor, rows: int, columns: int, element: int, scale: int) -> tuple[Tensor, Tensor]:
    """Codes [rows, padded columns] and scale bytes [rows, blocks]."""
    tiles, width = -(-rows // _TILE), padded_columns(columns, scale)
    code_bytes = tiles * _TILE * width // 2
    packed = data[:code_bytes].view(tiles, width // _STEP, 2, _TILE, 4)
    codes = torch.stack((packed & 15, packed >> 4), dim=3).permute(0, 4, 1, 2, 3, 5)  # tile, row, step, load, half, i
    blocks = width // block_of(scale)
    scales = data[code_bytes:].view(tiles, blocks, _TILE).transpose(1, 2).reshape(tiles * _TILE, blocks)
    return codes.reshape(tiles * _TILE, width)[:rows].contiguous(), scales[:rows].contiguous()


def dense(data: Tensor, rows: int, columns: int, element: int, scale: int) -> Tensor:
    """Doubled values times block scales, float32 [rows, columns]."""
    codes, scales = _unpack(data, rows, columns, element, scale)
    values = torch.tensor(_values(element), dtype=torch.float32, device="cpu")[codes.int()]
    if scale == _SCALES.index("E4M3"):
        S = scales.view(torch.float8_e4m3fn).float()
    else:
        S = (scales.int() << 23).clamp_(min=0x400000).view(torch.float32)
    return (values.view(*scales.shape, block_of(scale)) * S.unsqueeze(-1)).view(values.shape)[:, :columns]


def check_layout(rows: int, columns: int, element: int, scale: int, g: float) -> None:
    """Refuse numbers that describe no packed weight."""
    check.size("rows", rows)
    check.size("columns", columns)
    check.size("element", element, most=_ELEMENTS.index("E1M2"))
    check.size("scale", scale, most=len(_SCALES) - 1)
    check.global_scale("global_scale of the weight", g)


def check_data(data: Tensor, rows: int, columns: int, element: int, scale: int) -> None:
    """Refuse bytes that are not those of a packed weight of this layout."""
    device = check.tensor("weight data", data).device
    check.exactly("weight data", data, torch.uint8, (_data_bytes(rows, columns, scale),), device)
