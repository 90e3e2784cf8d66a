"""Linear layers with packed FP4 weights on a CPU: W4A16, W4A8 and W4A4, for as few rows as decoding has.

:func:`pack_weight` (:mod:`reqat_kernels.native.weights`) rearranges the codes of a quantized weight once into the order
in which the kernel streams them; :func:`linear` multiplies. Inputs are float32 or bfloat16
(W4A16), rounded to integers a token at a time (``"A8"``: symmetric, amax / 127), or FP4 (W4A4), whose blocks must be
those of the weight. :func:`quantize_input` rounds once for several layers that read the same tensor.

W4A4 and W4A8 multiply integers exactly; sums over blocks are float32, in one order whatever the instruction set, the
number of threads and the batch. Against ``dequantize(x) @ dequantize(w).T`` the result differs by that order alone:
at most ``(blocks + 3) * 2^-24`` of the sum of the products' magnitudes.

Without the native library the same functions compute from the same packed bytes in PyTorch.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from reqat.formats import Format, quantize
from reqat.formats.subnormals import keeps_subnormals, subnormals_kept
from reqat_kernels.native import check
from reqat_kernels.native.library import NO_MEMORY, NOT_FINITE, OPERATORS, library, threads
from reqat_kernels.native.quantize import Spec, spec_of
from reqat_kernels.native.weights import (
    PackedWeight,
    Weight,
    allocate,
    block_of,
    check_data,
    check_layout,
    dense,
    pack_weight,
    packed_bytes,
    padded_columns,
    struct_of,
    supports,
    weight_of,
    weight_struct,
)

__all__ = [
    "PackedWeight",
    "Products",
    "QuantizedInput",
    "Weight",
    "allocate",
    "linear",
    "pack_weight",
    "packed_bytes",
    "quantize_input",
    "supports",
    "weight_of",
    "weight_struct",
]

_OFFSET = 16  # gemm.h
_MAX_BLOCK = 1024  # of integers: their sums stay far inside 32 bits
# Multiply-adds that make a second thread worth starting.
_WORK_PER_THREAD = 1 << 18
Inputs = Format | Literal["A8"] | None


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


@keeps_subnormals
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
    Raises ValueError for NaN or infinity (naming ``name``), a format whose block is not the weight's, a block below 1
    or above 1024, another type or device, and a global scale that is not finite and positive.
    """
    label = name or "input"
    if check.floats(label, x).ndim == 0:
        raise ValueError(f"{label} is a single number: an axis of length K is needed")
    check.on_cpu(label, x)
    check_inputs(inputs, block)
    if x.is_neg():
        x = x.resolve_neg()
    x_MK = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if isinstance(inputs, str):
        if global_scale is not None:
            raise ValueError("inputs='A8' has a scale a row and no global scale: pass None")
        return _int8_input(x_MK, block, x.shape, x.dtype, name)
    if global_scale is not None:
        check.on_cpu("global_scale", check.floats("global_scale", global_scale))
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
    Raises ValueError for shapes, types or devices that do not fit and for an input rounded for another block than the
    weight's, TypeError, MemoryError, and what :func:`quantize_input` raises.
    """
    if not isinstance(w, PackedWeight):
        raise TypeError(f"w is a {type(w).__name__}, not a PackedWeight; pack_weight() makes one")
    if not isinstance(x, (Tensor, QuantizedInput)):
        raise TypeError(f"x is a {type(x).__name__}, not a torch tensor nor what quantize_input() makes")
    if (inputs is None or isinstance(x, QuantizedInput)) and global_scale is not None:
        raise ValueError("global_scale is that of inputs rounded here: say how in inputs=, or leave it out")
    if isinstance(x, Tensor) and inputs is not None:
        x = quantize_input(x, inputs, block=w.format.block or 1, global_scale=global_scale)
    if not x.shape or x.shape[-1] != w.columns:
        raise ValueError(f"input of shape {tuple(x.shape)} does not fit a weight of shape [{w.rows}, {w.columns}]")
    if isinstance(x, QuantizedInput) and x.block != (w.format.block or 1):
        raise ValueError(
            f"input rounded for blocks of {x.block} does not fit {w.format.name}, whose blocks are of "
            f"{w.format.block}; round it with block={w.format.block}"
        )
    if bias is not None:
        check.tensor("bias", bias)
    M = math.prod(x.shape[:-1])
    if isinstance(x, Tensor):
        y = torch.ops.reqat.fp4_linear(x.reshape(M, w.columns), w.data, bias, *w.layout)
    else:
        if check.tensor("x.x", x.x).shape[:1] != (M,):
            raise ValueError(f"values of shape {list(x.x.shape)} are not those of an input of shape {list(x.shape)}")
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
        M, K = check.on_cpu("x", check.floats("x", x_MK, ndim=2)).shape
        for w in weights:
            if not isinstance(w, PackedWeight):
                raise TypeError(f"a weight is a {type(w).__name__}, not a PackedWeight; pack_weight() makes one")
            block = w.format.block or 1
            if w.columns != K or K % block or not x_MK.is_contiguous() or x_MK.is_neg():
                raise ValueError(f"contiguous [M, {w.columns}] in blocks of {block} is needed, got {tuple(x_MK.shape)}")
            if inputs is not None:
                check_inputs(inputs, block)
        if x_MK.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"x is {x_MK.dtype}; float32 and bfloat16 are taken")
        self.outputs = [torch.empty(M, w.rows, dtype=torch.float32, device="cpu") for w in weights]
        structs = [weight_of(w) for w in weights]
        spec = ctypes.pointer(spec_of(inputs)) if isinstance(inputs, Format) else None
        self._array = (Product * len(weights))(
            *(
                Product(
                    ctypes.pointer(struct),
                    check.address(x_MK),
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
        self._x, self._address = x_MK, x_MK.data_ptr()
        self._alive = (list(weights), structs, spec)
        self._call = lib.reqat_products
        self._threads = threads(x_MK.numel() * max((w.rows for w in weights), default=0), _WORK_PER_THREAD)

    def __call__(self) -> list[Tensor]:
        """Compute; the outputs (float32 [M, N], overwritten by the next call).

        Raises ValueError for NaN and infinity and for an x whose memory has moved, MemoryError.
        """
        if self._x.data_ptr() != self._address:
            raise ValueError("the memory of x has moved since these products were made: make them again")
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
    w = struct_of(weight, rows, columns, element, scale, g)
    _check_float(x, weight, bias, rows, columns)
    bias = None if bias is None else bias.float().contiguous()
    lib = _library()
    x = x if x.dtype == torch.bfloat16 and lib is not None else x.float()
    if lib is None:
        with subnormals_kept(weight):
            return F.linear(x, dense(weight, rows, columns, element, scale).mul_(0.5 / g), bias)
    padded = padded_columns(columns, scale)
    x = F.pad(x, (0, padded - columns)) if padded != columns else x.contiguous()
    y = torch.empty(len(x), rows, dtype=torch.float32, device="cpu")
    if not x.numel() or not rows:
        return y.zero_() if bias is None else y.copy_(bias)
    n = threads(x.numel() * rows, _WORK_PER_THREAD)
    call = lib.reqat_gemm_bf16 if x.dtype == torch.bfloat16 else lib.reqat_gemm_float
    if call(w, check.address(x), check.address(bias), y.data_ptr(), len(x), rows, n) == NO_MEMORY:
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
    w = struct_of(weight, rows, columns, element, scale, g)
    _check_int(x, start, block_scale, row_scale, weight, bias, rows, columns, scale)
    bias = None if bias is None else bias.float().contiguous()
    lib = _library()
    if lib is None:
        with subnormals_kept(weight):
            dense_NK = dense(weight, rows, x.shape[1], element, scale)  # padded columns too, as C reads them
            values = x.float()
            if block_scale is not None:
                values = values.view(*block_scale.shape, block_of(scale)).mul(block_scale.unsqueeze(-1)).view(x.shape)
            y = F.linear(values, dense_NK).mul_(0.5 / g)
            y = y if row_scale is None else y.mul_(row_scale[:, None])
            return y if bias is None else y.add_(bias)
    y = torch.empty(len(x), rows, dtype=torch.float32, device="cpu")
    if not x.numel() or not rows:
        return y.zero_() if bias is None else y.copy_(bias)
    n = threads(x.numel() * rows, _WORK_PER_THREAD)
    status = lib.reqat_gemm_int(
        w, check.address(x), check.address(start), check.address(block_scale), check.address(row_scale),
        check.address(bias), y.data_ptr(), len(x), rows, n,
    )  # fmt: skip
    if status == NO_MEMORY:
        raise _no_memory(x)
    return y


def _fp4_linear_meta(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: int, columns: int, element: int, scale: int, g: float
) -> Tensor:
    check_layout(rows, columns, element, scale, g)
    check_data(weight, rows, columns, element, scale)
    _check_float(x, weight, bias, rows, columns)
    return x.new_empty((x.shape[0], rows), dtype=torch.float32)


def _fp4_linear_int_meta(
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
    check_layout(rows, columns, element, scale, g)
    check_data(weight, rows, columns, element, scale)
    _check_int(x, start, block_scale, row_scale, weight, bias, rows, columns, scale)
    return x.new_empty((x.shape[0], rows), dtype=torch.float32)


for _name, _function, _meta in (
    ("fp4_linear", _fp4_linear, _fp4_linear_meta),
    ("fp4_linear_int", _fp4_linear_int, _fp4_linear_int_meta),
):
    OPERATORS.impl(_name, _function, "CPU")
    torch.library.register_fake(f"reqat::{_name}", _meta)


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_float(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int, columns: int) -> None:
    check.floats("x", x, ndim=2, device=check.tensor("weight data", weight).device)
    if x.shape[1] != columns:
        raise ValueError(f"x of shape {list(x.shape)} does not fit a weight of shape [{rows}, {columns}]")
    check.bias(bias, rows, weight.device)


def _check_int(
    x: Tensor,
    start: Tensor,
    block_scale: Tensor | None,
    row_scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    rows: int,
    columns: int,
    scale: int,
) -> None:
    check.tensor("x", x)
    M, padded, device = x.shape[0] if x.ndim else 0, padded_columns(columns, scale), weight.device
    blocks = padded // block_of(scale)
    check.exactly("x", x, torch.int8, (M, padded), device)
    check.exactly("start", start, torch.int32, (M, blocks), device)
    if block_scale is not None:
        check.exactly("block_scale", block_scale, torch.float32, (M, blocks), device)
    if row_scale is not None:
        check.exactly("row_scale", row_scale, torch.float32, (M,), device)
    check.bias(bias, rows, device)


def check_inputs(inputs: Any, block: int) -> None:
    """Refuse ways to round an input that do not fit a weight in blocks of ``block``."""
    if type(block) is not int or not 0 < block <= _MAX_BLOCK:
        check.size("block", block, least=1, most=_MAX_BLOCK)
    if isinstance(inputs, str) and inputs == "A8":
        return
    if not isinstance(inputs, Format):
        raise TypeError(f"inputs is {inputs!r}: 'A8' or a Format is needed; get_format(name) makes one")
    if inputs.block != block or not supports(inputs):
        raise ValueError(f"inputs in {inputs.name} (block {inputs.block}) do not fit weights in blocks of {block}")


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


def _no_memory(x: Tensor) -> MemoryError:
    return MemoryError(f"no memory for a product of {len(x)} rows of {x.shape[1]} columns")


def _int8_input(x_MK: Tensor, block: int, shape: torch.Size, dtype: torch.dtype, name: str | None) -> QuantizedInput:
    x_MK = x_MK.float()
    columns = x_MK.shape[1]
    padded = -(-columns // block) * block
    lib = _library()
    if lib is not None:
        x_MK = x_MK.contiguous()
        values = torch.empty(len(x_MK), padded, dtype=torch.int8, device="cpu")
        start = torch.empty(len(x_MK), padded // block, dtype=torch.int32, device="cpu")
        row_scale = torch.empty(len(x_MK), dtype=torch.float32, device="cpu")
        finite = lib.reqat_int8_input(
            check.address(x_MK),
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
        g = check.global_scale("global_scale", global_scale)
        fmt = fmt.replace(global_scale="static")
    ragged = -x_MK.shape[1] % block
    x_MK = F.pad(x_MK.float(), (0, ragged)) if ragged else x_MK.float().contiguous()
    M, K = x_MK.shape
    values = torch.empty(M, K, dtype=torch.int8, device="cpu")
    start = torch.empty(M, K // block, dtype=torch.int32, device="cpu")
    scale = torch.empty(M, K // block, dtype=torch.float32, device="cpu")
    if not lib.reqat_fp4_input(
        spec_of(fmt), check.address(x_MK), M, K, g, values.data_ptr(), start.data_ptr(), scale.data_ptr()
    ):
        quantize(x, fmt, global_scale=global_scale, pad=True, name=name)  # raises: it counts what is not finite
    return QuantizedInput(values, start, scale, None, block, x.shape, x.dtype)


def _start(values: Tensor, block: int) -> Tensor:
    M, K = values.shape
    return values.view(M, K // block, block).sum(-1, dtype=torch.int32) * -_OFFSET
