"""Linear layers with packed FP4 weights on a CPU: W4A16, W4A8 and W4A4, for as few rows as decoding has.

:func:`pack_weight` rearranges the codes of a quantized weight once into the order in which the kernel streams them
(4.5 bits a weight for NVFP4, 4.25 for MXFP4, see gemm.h); :func:`linear` multiplies. Inputs are float32 or bfloat16
(W4A16), rounded to integers a token at a time (``"A8"``: symmetric, amax / 127), or FP4 (W4A4), whose blocks must be
those of the weight. :func:`quantize_input` rounds once for several layers that read the same tensor.

W4A4 and W4A8 multiply integers exactly; sums over blocks are float32, in one order whatever the instruction set, the
number of threads and the batch. Against ``dequantize(x) @ dequantize(w).T`` the result differs by that order alone:
at most ``(blocks + 3) * 2^-24`` of the sum of the products' magnitudes.

Without the native library the same functions compute from the same packed bytes in PyTorch.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from reqat.formats import Format, QuantizedTensor, quantize
from reqat.formats.elements import ELEMENTS
from reqat_kernels.native.library import NO_MEMORY, NOT_FINITE, OPERATORS, library, threads
from reqat_kernels.native.quantize import Spec, spec_of

_TILE, _STEP, _OFFSET = 16, 16, 16  # gemm.h
_SCALES = ("E4M3", "E8M0")
_HUGE, _HUGE_FROM = 1 << 21, 1 << 20  # a huge page, and how much is worth one
_ELEMENTS = tuple(ELEMENTS)
# Multiply-adds that make a second thread worth starting.
_WORK_PER_THREAD = 1 << 18
Inputs = Format | Literal["A8"] | None


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
        ("alpha", ctypes.c_float),
    ]


class Product(ctypes.Structure):
    """``Product`` of gemm.cpp."""

    _fields_ = [
        ("weight", ctypes.POINTER(Weight)),
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("format", ctypes.POINTER(Spec)),
        ("M", ctypes.c_int64),
        ("bf16", ctypes.c_int32),
        ("int8", ctypes.c_int32),
        ("g", ctypes.c_float),
    ]


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight [``rows``, ``columns``] in the kernel's order.

    ``data``: uint8, codes then scales, padded to whole tiles of 16 rows and whole blocks of columns. ``global_scale``:
    float32 scalar divisor (1 where the format has none).
    """

    data: Tensor
    rows: int
    columns: int
    format: Format
    global_scale: float

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
        g = torch.tensor(self.global_scale) if self.format.has_global_scale else None
        shape = torch.Size((self.rows, self.columns))
        return QuantizedTensor(codes, scales, g, self.format, 1, shape, torch.float32)

    def dequantize(self) -> Tensor:
        """The dense weight, float32 [rows, columns]."""
        return self.unpack().dequantize()


@dataclass(frozen=True, eq=False)
class QuantizedInput:
    """Rounded inputs of linear layers: integers and what they are multiplied by.

    ``x``: int8 [M, K padded], FP4 values doubled; ``start``: int32 [M, blocks], what the kernel's accumulators start
    from; ``block_scale``: float32 [M, blocks], half of what a doubled value is multiplied by, or None (A8);
    ``row_scale``: float32 [M], or None. ``shape`` and ``dtype`` are the input's.
    """

    x: Tensor
    start: Tensor
    block_scale: Tensor | None
    row_scale: Tensor | None
    block: int
    shape: torch.Size
    dtype: torch.dtype


def supports(fmt: Format) -> bool:
    """Whether weights of this format can be packed: FP4 in blocks, scaled by E4M3 or E8M0."""
    return fmt.name in ("NVFP4", "NVFP4-4/6", "MXFP4")


def packed_bytes(rows: int, columns: int, fmt: Format) -> int:
    """Bytes of a packed weight, in whole cache lines."""
    scale = _SCALES.index(fmt.scale)
    width, tall = _padded(columns, scale), -(-rows // _TILE) * _TILE
    return -(-(tall * width // 2 + tall * width // _block(scale)) // 64) * 64


def allocate(n: int) -> Tensor:
    """``n`` bytes, uint8, that start on a cache line; a megabyte or more in huge pages, where the system has them.

    A weight is read once a step from end to end, and looking up small pages costs a third of the time. A model's
    weights best share one such piece: each alone has an end that fills no huge page. The piece is mapped apart from
    the heap, whose memory may have been touched before: pages are made huge when they are first written or never.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if n < _HUGE_FROM or advice is None:
        raw, line = torch.empty(n + 64, dtype=torch.uint8), 64
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
    :func:`supports` refuses, another axis or rank, a global scale a row, or an ``out`` of another size.
    """
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
    codes_NK = F.pad(q.codes, (0, 0, 0, tiles * _TILE - rows)).view(tiles, _TILE, width // _STEP, 2, 2, 4)
    bytes_ = (codes_NK[:, :, :, :, 0] | (codes_NK[:, :, :, :, 1] << 4)).permute(0, 2, 3, 1, 4).reshape(-1)
    scales_NB = F.pad(q.scales.view(torch.uint8), (0, 0, 0, tiles * _TILE - rows)).view(tiles, _TILE, -1)
    size = bytes_.numel() + scales_NB.numel()
    if out is None:
        out = allocate(size)
    elif out.dtype != torch.uint8 or out.numel() < size or not out.is_contiguous():
        raise ValueError(f"out must be {size} contiguous bytes, got {out.numel()} of {out.dtype}")
    data = out[:size]
    data[: bytes_.numel()] = bytes_
    data[bytes_.numel() :] = scales_NB.transpose(1, 2).reshape(-1)
    g = 1.0 if q.global_scale is None else float(q.global_scale)
    return PackedWeight(data, rows, columns, fmt, g)


def quantize_input(
    x: Tensor,
    inputs: Format | Literal["A8"],
    *,
    block: int,
    global_scale: Tensor | None = None,
    name: str | None = None,
) -> QuantizedInput:
    """Round ``x`` [..., K] for :func:`linear` with weights in blocks of ``block``.

    ``inputs``: ``"A8"``, or an FP4 format of the same block. ``global_scale`` is the format's, where it is static.
    Raises ValueError for NaN or infinity (naming ``name``), and for a format whose block is not the weight's.
    """
    x_MK = x.reshape(-1, x.shape[-1])
    if inputs == "A8":
        return _int8_input(x_MK, block, x.shape, x.dtype, name)
    if inputs.block != block or inputs.element == "INT4" or inputs.asymmetric:
        raise ValueError(f"inputs in {inputs.name} (block {inputs.block}) do not fit weights in blocks of {block}")
    lib = _library()
    if lib is not None and (global_scale is None or global_scale.numel() == 1):
        return _fp4_input(lib, x_MK, inputs, global_scale, x, name)
    q = quantize(x_MK, inputs, global_scale=global_scale, pad=True, name=name)
    values = (inputs.element_type.decode(q.codes) * 2).to(torch.int8)
    start = _start(values, block)
    return QuantizedInput(values, start, q.block_scales().mul(0.5), None, block, x.shape, x.dtype)


def linear(
    x: Tensor | QuantizedInput,
    w: PackedWeight,
    bias: Tensor | None = None,
    *,
    inputs: Inputs = None,
    global_scale: Tensor | None = None,
) -> Tensor:
    """``x @ w.T + bias``: x [..., K] float32 or bfloat16, or rounded already; the result [..., N] in x's dtype.

    ``inputs`` says how x is rounded first: not at all (None), ``"A8"`` or an FP4 format (see :func:`quantize_input`).
    Raises ValueError for shapes that do not fit and for an input rounded for another block than the weight's,
    MemoryError, and what :func:`quantize_input` raises.
    """
    if isinstance(x, Tensor) and inputs is not None:
        x = quantize_input(x, inputs, block=w.format.block or 1, global_scale=global_scale)
    if x.shape[-1] != w.columns:
        raise ValueError(f"input of shape {tuple(x.shape)} does not fit a weight of shape [{w.rows}, {w.columns}]")
    if isinstance(x, QuantizedInput) and x.block != (w.format.block or 1):
        raise ValueError(
            f"input rounded for blocks of {x.block} does not fit {w.format.name}, whose blocks are of "
            f"{w.format.block}; round it with block={w.format.block}"
        )
    if isinstance(x, Tensor):
        y = torch.ops.reqat.fp4_linear(x.reshape(-1, w.columns), w.data, bias, *w.layout)
    else:
        y = torch.ops.reqat.fp4_linear_int(x.x, x.start, x.block_scale, x.row_scale, w.data, bias, *w.layout)
    return y.to(x.dtype).reshape(*x.shape[:-1], w.rows)


class Products:
    """``linear(x, w, inputs=...)`` for several weights ``w`` after each other, in one native call.

    A decoder step is such a sequence. Through :func:`linear` each product costs some tens of microseconds in Python,
    as much as the product of one row itself; here they are spent once. Everything but the numbers in ``x`` is fixed
    when it is made.
    """

    def __init__(self, x_MK: Tensor, weights: Sequence[PackedWeight], *, inputs: Inputs = None) -> None:
        """``x_MK``: [M, K] contiguous, float32 or bfloat16, K whole blocks. Raises ValueError where the native library
        is missing, or x or ``inputs`` does not fit the weights."""
        lib = _library()
        if lib is None:
            raise ValueError("no native library: use linear(), which computes in PyTorch")
        if isinstance(inputs, Format) and inputs.global_scale == "static":
            raise ValueError("a static global scale has no place here; use linear()")
        M, K = x_MK.shape
        for w in weights:
            block = w.format.block or 1
            fits = not isinstance(inputs, Format) or inputs.block == block
            if w.columns != K or K % block or not fits or not x_MK.is_contiguous():
                raise ValueError(f"contiguous [M, {w.columns}] in blocks of {block} is needed, got {tuple(x_MK.shape)}")
        if x_MK.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"x is {x_MK.dtype}; float32 and bfloat16 are taken")
        self.outputs = [torch.empty(M, w.rows) for w in weights]
        structs = [weight_struct(w.data.data_ptr(), *w.layout[:4], 0.5 / w.global_scale) for w in weights]
        spec = ctypes.pointer(spec_of(inputs)) if isinstance(inputs, Format) else None
        self._array = (Product * len(weights))(
            *(
                Product(
                    ctypes.pointer(struct),
                    x_MK.data_ptr(),
                    y.data_ptr(),
                    spec,
                    M,
                    x_MK.dtype == torch.bfloat16,
                    inputs == "A8",
                    0.0,
                )
                for struct, y in zip(structs, self.outputs, strict=True)
            )
        )
        self._alive = (x_MK, list(weights), structs, spec)
        self._call = lib.reqat_products
        self._threads = threads(x_MK.numel() * max((w.rows for w in weights), default=0), _WORK_PER_THREAD)

    def __call__(self) -> list[Tensor]:
        """Compute; the outputs (float32 [M, N], overwritten by the next call).

        Raises ValueError for NaN and infinity, MemoryError.
        """
        status = self._call(self._array, len(self._array), self._threads)
        if status == NOT_FINITE:
            raise ValueError("x holds NaN or infinity; only finite numbers can be quantized")
        if status == NO_MEMORY:
            raise MemoryError("no memory for the rounded inputs of these products")
        return self.outputs


# --- operators --------------------------------------------------------------------------------------------------------

_LAYOUT = "int rows, int columns, int element, int scale, float global_scale"
OPERATORS.define(f"fp4_linear(Tensor x, Tensor weight, Tensor? bias, {_LAYOUT}) -> Tensor")
OPERATORS.define(
    "fp4_linear_int(Tensor x, Tensor start, Tensor? block_scale, Tensor? row_scale, Tensor weight, Tensor? bias, "
    f"{_LAYOUT}) -> Tensor"
)


def _fp4_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: int, columns: int, element: int, scale: int, g: float
) -> Tensor:
    bias = None if bias is None else bias.float().contiguous()
    lib = _library()
    x = x if x.dtype == torch.bfloat16 and lib is not None else x.float()
    if lib is None:
        return F.linear(x, _dense(weight, rows, columns, element, scale).mul_(0.5 / g), bias)
    padded = _padded(columns, scale)
    x = F.pad(x, (0, padded - columns)) if padded != columns else x.contiguous()
    y = torch.empty(len(x), rows)
    n = threads(x.numel() * rows, _WORK_PER_THREAD)
    w = weight_struct(weight.data_ptr(), rows, columns, element, scale, 0.5 / g)
    call = lib.reqat_gemm_bf16 if x.dtype == torch.bfloat16 else lib.reqat_gemm_float
    if call(w, x.data_ptr(), _pointer(bias), y.data_ptr(), len(x), rows, n) == NO_MEMORY:
        raise _no_memory(x)
    return y


def _fp4_linear_int(
    x: Tensor,
    start: Tensor,
    block_scale: Tensor | None,
    row_scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    rows: int,
    columns: int,
    element: int,
    scale: int,
    g: float,
) -> Tensor:
    bias = None if bias is None else bias.float().contiguous()
    lib = _library()
    y = torch.empty(len(x), rows)
    if lib is None:
        dense = F.pad(_dense(weight, rows, columns, element, scale), (0, x.shape[1] - columns))
        values = x.float()
        if block_scale is not None:
            values = values.view(*block_scale.shape, _block(scale)).mul(block_scale.unsqueeze(-1)).view(x.shape)
        y = F.linear(values, dense).mul_(0.5 / g)
        y = y if row_scale is None else y.mul_(row_scale[:, None])
        return y if bias is None else y.add_(bias)
    n = threads(x.numel() * rows, _WORK_PER_THREAD)
    w = weight_struct(weight.data_ptr(), rows, columns, element, scale, 0.5 / g)
    status = lib.reqat_gemm_int(
        w, x.data_ptr(), start.data_ptr(), _pointer(block_scale), _pointer(row_scale), _pointer(bias), y.data_ptr(),
        len(x), rows, n,
    )  # fmt: skip
    if status == NO_MEMORY:
        raise _no_memory(x)
    return y


def _meta(x: Tensor, *rest: object) -> Tensor:
    rows = next(item for item in rest if isinstance(item, int))
    return x.new_empty((x.shape[0], rows), dtype=torch.float32)


for _name, _function in (("fp4_linear", _fp4_linear), ("fp4_linear_int", _fp4_linear_int)):
    OPERATORS.impl(_name, _function, "CPU")
    torch.library.register_fake(f"reqat::{_name}", _meta)


# --- details ----------------------------------------------------------------------------------------------------------


@cache
def _library() -> ctypes.CDLL | None:
    lib = library()
    if lib is not None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        lib.reqat_gemm_int.argtypes = [ctypes.POINTER(Weight), *[pointer] * 6, number, number, ctypes.c_int]
        for call in (lib.reqat_gemm_float, lib.reqat_gemm_bf16):
            call.argtypes = [ctypes.POINTER(Weight), *[pointer] * 3, number, number, ctypes.c_int]
        lib.reqat_int8_input.argtypes = [pointer, number, number, number, ctypes.c_int32, pointer, pointer, pointer]
        lib.reqat_fp4_input.argtypes = [
            ctypes.POINTER(Spec), pointer, number, number, ctypes.c_float, pointer, pointer, pointer,
        ]  # fmt: skip
        lib.reqat_products.argtypes = [ctypes.POINTER(Product), number, ctypes.c_int]
    return lib


@lru_cache(maxsize=4096)
def weight_struct(data: int, rows: int, columns: int, element: int, scale: int, alpha: float) -> Weight:
    """A packed weight at address ``data`` as C reads it, products times ``alpha``; the memory must outlive it."""
    padded = _padded(columns, scale)
    code_bytes = -(-rows // _TILE) * _TILE * padded // 2
    values = (ctypes.c_int8 * 16)(*_values(element))
    return Weight(data, data + code_bytes, rows, padded // _STEP, _block(scale), scale, values, alpha)


def _values(element: int) -> list[int]:
    return [int(2 * v) for v in ELEMENTS[_ELEMENTS[element]].code_values()]


def _block(scale: int) -> int:
    return 32 if _SCALES[scale] == "E8M0" else 16


def _padded(columns: int, scale: int) -> int:
    return -(-columns // _block(scale)) * _block(scale)


def _no_memory(x: Tensor) -> MemoryError:
    return MemoryError(f"no memory for a product of {len(x)} rows of {x.shape[1]} columns")


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _unpack(data: Tensor, rows: int, columns: int, element: int, scale: int) -> tuple[Tensor, Tensor]:
    """Codes [rows, padded columns] and scale bytes [rows, blocks]."""
    tiles, width = -(-rows // _TILE), _padded(columns, scale)
    code_bytes = tiles * _TILE * width // 2
    packed = data[:code_bytes].view(tiles, width // _STEP, 2, _TILE, 4)
    codes = torch.stack((packed & 15, packed >> 4), dim=3).permute(0, 4, 1, 2, 3, 5)  # tile, row, step, load, half, i
    scales = data[code_bytes:].view(tiles, -1, _TILE).transpose(1, 2).reshape(tiles * _TILE, -1)
    return codes.reshape(tiles * _TILE, width)[:rows].contiguous(), scales[:rows].contiguous()


def _dense(data: Tensor, rows: int, columns: int, element: int, scale: int) -> Tensor:
    """Doubled values times block scales, float32 [rows, columns]."""
    codes, scales = _unpack(data, rows, columns, element, scale)
    values = torch.tensor(_values(element), dtype=torch.float32)[codes.int()]
    if scale == _SCALES.index("E4M3"):
        S = scales.view(torch.float8_e4m3fn).float()
    else:
        S = (scales.int() << 23).clamp_(min=0x400000).view(torch.float32)
    return (values.view(rows, scales.shape[1], -1) * S.unsqueeze(-1)).view(rows, -1)[:, :columns]


def _int8_input(x_MK: Tensor, block: int, shape: torch.Size, dtype: torch.dtype, name: str | None) -> QuantizedInput:
    x_MK = x_MK.float()
    columns = x_MK.shape[1]
    padded = -(-columns // block) * block
    lib = _library()
    if lib is not None:
        x_MK = x_MK.contiguous()
        values = torch.empty(len(x_MK), padded, dtype=torch.int8)
        start = torch.empty(len(x_MK), padded // block, dtype=torch.int32)
        row_scale = torch.empty(len(x_MK))
        finite = lib.reqat_int8_input(
            x_MK.data_ptr(),
            len(x_MK),
            columns,
            padded,
            block,
            values.data_ptr(),
            start.data_ptr(),
            row_scale.data_ptr(),
        )
    else:
        amax = x_MK.abs().amax(-1) if columns else x_MK.new_zeros(len(x_MK))
        finite = bool(torch.isfinite(amax).all())
        row_scale = torch.where(amax == 0, 1.0, amax / torch.full_like(amax, 127.0))
        values = F.pad((x_MK / row_scale[:, None]).round_(), (0, padded - columns)).to(torch.int8) if finite else x_MK
        start = _start(values, block) if finite else x_MK
    if not finite:
        raise ValueError(
            f"{name or 'input'} of shape {tuple(shape)} holds NaN or infinity; only finite numbers can be quantized"
        )
    return QuantizedInput(values, start, None, row_scale, block, shape, dtype)


def _fp4_input(
    lib: ctypes.CDLL, x_MK: Tensor, fmt: Format, global_scale: Tensor | None, x: Tensor, name: str | None
) -> QuantizedInput:
    block = fmt.block or 1
    if global_scale is None:
        g = 0.0
        if fmt.global_scale == "static":
            quantize(x_MK[:1], fmt, pad=True)  # raises: it says what is missing
    else:
        g = float(global_scale)
        fmt = fmt.replace(global_scale="static")
    ragged = -x_MK.shape[1] % block
    x_MK = F.pad(x_MK.float(), (0, ragged)) if ragged else x_MK.float().contiguous()
    M, K = x_MK.shape
    values = torch.empty(M, K, dtype=torch.int8)
    start = torch.empty(M, K // block, dtype=torch.int32)
    scale = torch.empty(M, K // block)
    if not lib.reqat_fp4_input(
        spec_of(fmt), x_MK.data_ptr(), M, K, g, values.data_ptr(), start.data_ptr(), scale.data_ptr()
    ):
        quantize(x, fmt, global_scale=global_scale, pad=True, name=name)  # raises: it counts what is not finite
    return QuantizedInput(values, start, scale, None, block, x.shape, x.dtype)


def _start(values: Tensor, block: int) -> Tensor:
    M, K = values.shape
    return values.view(M, K // block, block).sum(-1, dtype=torch.int32) * -_OFFSET
