"""Quantize activations on the GPU: numbers in, packed FP4 codes and block scales out, optionally rotated on the way.

A tile of rows and columns is read once; each block's maximum, scale and codes follow in registers (elements.py has the
arithmetic). What costs extra is NVFP4's global scale g:

- ``static``: known beforehand. One pass: 2 bytes read and 0.56 written an element, the way to serve.
- ``row`` and ``dynamic``: g needs the row's or tensor's maximum, so a first pass reads everything (and rotates, since
  the maximum is that of the rotated numbers). Tiles meet in an atomic maximum of bits, whose result has no order; g is
  then computed by the second kernel, so the host never waits for it.

The rotation is a block Hadamard by sums and differences in float32, rounded to the input's type as the unfused one is
by ``reqat.quant.block_hadamard``. Its order of summation is fixed (see elements.py), so codes are alike on every
device, but it is not a matrix product's: promised are the bits of ``naive.block_hadamard``, and closeness to the
product.

Refusing NaN and infinity, as the reference does, makes the host wait for one number. A caller with many calls gives a
:class:`~reqat_kernels.triton.finite.FiniteFlag` and looks at it once, after them; until then the codes of non-finite
input are garbage.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reqat.formats import Format, PackedTensor, get_format
from reqat_kernels.native.quantize import _back, _memory_order
from reqat_kernels.triton.elements import (
    as_float32,
    bits_float,
    block_maxima,
    cast,
    decode_e4m3,
    decode_e8m0,
    decode_element,
    encode_e8m0,
    encode_element,
    float_bits,
    hadamard_butterfly,
    nvfp4_effective_scale,
    nvfp4_global_scale,
    nvfp4_scale_bits,
    pack_pairs,
    spread,
)
from reqat_kernels.triton.finite import FiniteFlag, raise_flag, refusal
from reqat_kernels.triton.launches import launch
from reqat_kernels.triton.runtime import INTERPRETED, capability, require, tl, triton

ROTATIONS = (2, 4, 8, 16, 32, 64, 128)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# The smallest g lets the largest block scale, 448 / g, still be a float32; as in reqat.formats.
_SMALLEST_G = 1.01 * 448.0 / torch.finfo(torch.float32).max


@triton.jit
def _load_tile(
    x_ptr,
    rows,
    columns,
    M,
    K,
    HADAMARD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows and columns of row-major x [M, K], rotated, as float32 [BLOCK_M, BLOCK_K]; zeros outside."""
    mask = (rows < M)[:, None] & (columns < K)[None, :]
    x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * K + columns[None, :], mask=mask, other=0.0)
    y = as_float32(x)
    if HADAMARD:
        y = hadamard_butterfly(y, BLOCK_M, BLOCK_K // HADAMARD, HADAMARD)
        y = as_float32(cast(y, x.dtype))
    return y


@triton.jit
def amax_kernel(
    x_ptr,  # [M, K]
    amax_ptr,  # int32 [1] or [M], zeros: takes the bits of max |x|
    M,
    K,
    ROW: tl.constexpr,
    HADAMARD: tl.constexpr,  # size of the rotation, or 0
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """First pass: the largest magnitude of x, or of each row, after rotation."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    y = _load_tile(x_ptr, rows, columns, M, K, HADAMARD, BLOCK_M, BLOCK_K)
    top = tl.max(float_bits(y) & 0x7FFFFFFF, axis=1)
    if ROW:
        tl.atomic_max(amax_ptr + rows, top, mask=rows < M)
    else:
        tl.atomic_max(amax_ptr, tl.max(top, axis=0))


@triton.jit(do_not_specialize=["call"])
def quantize_kernel(
    x_ptr,  # [M, K] float16, bfloat16 or float32
    packed_ptr,  # uint8 [M, K / 2]; under FAKE the numbers that codes and scales stand for, [M, K] in x's type
    scales_ptr,  # uint8 [M, K / BLOCK]: E8M0, or the bits of E4M3; not written under FAKE
    g_ptr,  # float32 [1] or [M]; written if DYNAMIC
    amax_ptr,  # int32 [1] or [M]: the bits of the largest magnitudes, if DYNAMIC
    flag_ptr,  # int32 [1]: takes ``call`` if a number is not finite (see finite.py)
    M,
    K,
    call,
    BLOCK: tl.constexpr,  # 16 or 32 elements a scale
    E1M2: tl.constexpr,
    RULE: tl.constexpr,  # of the scales: rceil, floor, even (E8M0); divide, multiply, reciprocal (E4M3)
    NVFP4: tl.constexpr,
    ROW: tl.constexpr,  # g and amax are [M]
    DYNAMIC: tl.constexpr,
    HADAMARD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FAKE: tl.constexpr = False,
    LIMIT: tl.constexpr = 3.4028234663852886e38,  # the largest number of x's type
):
    """Codes and scales of a tile of rows and columns, or (FAKE) the numbers they stand for."""
    BLOCKS: tl.constexpr = BLOCK_K // BLOCK
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    y = _load_tile(x_ptr, rows, columns, M, K, HADAMARD, BLOCK_M, BLOCK_K)
    amax = block_maxima(y, BLOCK_M, BLOCKS, BLOCK)
    if NVFP4:
        if ROW:
            if DYNAMIC:
                top = tl.load(amax_ptr + rows, mask=rows < M, other=0)
                g = nvfp4_global_scale(bits_float(top), E1M2, RULE)
                if tl.program_id(1) == 0:
                    tl.store(g_ptr + rows, g, mask=rows < M)
            else:
                g = tl.load(g_ptr + rows, mask=rows < M, other=1.0)
            g = g[:, None]
        else:
            if DYNAMIC:
                g = nvfp4_global_scale(bits_float(tl.load(amax_ptr)), E1M2, RULE)
                if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
                    tl.store(g_ptr, g)
            else:
                g = tl.load(g_ptr)
        stored = nvfp4_scale_bits(amax, g, E1M2, RULE)
        s = decode_e4m3(stored)
        if RULE == "reciprocal":
            kept = tl.minimum(tl.div_rn(1.0, tl.div_rn(1.0, g)), 3.4028234663852886e38)
            inverse = tl.minimum(tl.div_rn(kept, s), 3.4028234663852886e38)
            y = y * spread(inverse, BLOCK_M, BLOCKS, BLOCK)
        else:
            y = tl.div_rn(y, spread(nvfp4_effective_scale(s, g, RULE), BLOCK_M, BLOCKS, BLOCK))
    else:
        stored = encode_e8m0(amax, RULE, E1M2)
        y = tl.div_rn(y, spread(decode_e8m0(stored), BLOCK_M, BLOCKS, BLOCK))
    raise_flag(flag_ptr, float_bits(amax), call)

    first = rows.to(tl.int64)[:, None]
    if FAKE:
        scale = nvfp4_effective_scale(s, g, RULE) if NVFP4 else decode_e8m0(stored)
        value = decode_element(encode_element(y, E1M2), E1M2) * spread(scale, BLOCK_M, BLOCKS, BLOCK)
        value = tl.minimum(tl.maximum(value, -LIMIT), LIMIT)
        inside = (rows < M)[:, None] & (columns < K)[None, :]
        tl.store(packed_ptr + first * K + columns[None, :], cast(value, packed_ptr.dtype.element_ty), mask=inside)
        return
    packed = pack_pairs(encode_element(y, E1M2), BLOCK_M, BLOCK_K // 2)
    pairs = tl.program_id(1) * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
    tl.store(
        packed_ptr + first * (K // 2) + pairs[None, :], packed, mask=(rows < M)[:, None] & (pairs < K // 2)[None, :]
    )
    blocks = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    in_range = (rows < M)[:, None] & (blocks < K // BLOCK)[None, :]
    tl.store(scales_ptr + first * (K // BLOCK) + blocks[None, :], stored.to(tl.uint8), mask=in_range)


@torch.no_grad()
def quantize(
    x: Tensor,
    fmt: str | Format,
    *,
    rotation: int | None = None,
    global_scale: Tensor | float | str | None = None,
    flag: FiniteFlag | None = None,
    name: str | None = None,
    **options: str | None,
) -> PackedTensor:
    """``reqat.quantize(x, fmt, ...).pack()`` along the last axis, bit for bit.

    Args:
        x: [..., K] float16, bfloat16, float32 or float64 (rounded to float32 first), K a multiple of the block.
        fmt: NVFP4 or MXFP4, by name or as a Format, with ``options`` as for ``reqat.quantize``.
        rotation: size of a block Hadamard along the last axis, applied first; a power of two from 2 to 128.
        global_scale: ``dynamic``, ``row`` or ``static``, or the value of g: a scalar, or [..., 1].
        flag: takes note of NaN and infinity, for the caller to look at; a g that lies on the device is then taken as
            it is. None: look before returning, for which the host waits.
        name: what to call ``x`` in an error.

    Raises:
        ImportError: triton is not installed.
        ValueError: a format, rounding, shape or device that the kernel does not take; a g that is not positive and
            finite.
        NotFinite: NaN or infinity in ``x`` (a ValueError, too).
    """
    _, K, packed, scales, g, fmt = _launch(x, fmt, rotation, global_scale, flag, name, options, fake=False)
    lead = x.shape[:-1]
    assert scales is not None
    make = PackedTensor if flag is None else PackedTensor.unchecked
    return make(
        packed.view(*lead, K // 2),
        (scales if fmt.scale == "E8M0" else scales.view(torch.float8_e4m3fn)).view(*lead, scales.shape[-1]),
        None if not fmt.has_global_scale else g.view(*lead, 1) if g.ndim else g,
        fmt,
        x.ndim - 1,
        x.shape,
        x.dtype,
    )


@torch.no_grad()
def fake_quantize(
    x: Tensor,
    fmt: str | Format,
    *,
    rotation: int | None = None,
    global_scale: Tensor | float | str | None = None,
    flag: FiniteFlag | None = None,
    name: str | None = None,
    **options: str | None,
) -> Tensor:
    """``reqat.formats.quantize_dequantize(x, fmt, ...)`` along the last axis, bit for bit, in one pass.

    Arguments and errors of :func:`quantize`; no codes are written. The result has x's strides where the last axis is
    contiguous. Not differentiable.
    """
    order = _memory_order(x) if isinstance(x, Tensor) and x.ndim and x.stride(-1) == 1 else None
    if order is not None and isinstance(global_scale, Tensor) and global_scale.numel() != 1:
        order = None  # which rows it belongs to is said in x's order
    given = x if order is None else x.permute(order)
    _, _, y, _, _, _ = _launch(given, fmt, rotation, global_scale, flag, name, options, fake=True)
    return _back(y.view(given.shape).to(x.dtype), order)


def takes(x: Tensor, fmt: Format, global_scale: Tensor | None) -> bool:
    """Whether :func:`fake_quantize` is defined for ``x`` and this format along the last axis, and nothing traces it."""
    plain = type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling() and not x.is_neg()
    known = fmt.name in ("NVFP4", "MXFP4") and fmt.rounding == "even"
    if not plain or not known or x.dtype not in _DTYPES or x.ndim == 0 or not x.numel():
        return False
    has_g = fmt.global_scale != "static" if global_scale is None else fmt.has_global_scale
    return has_g and x.shape[-1] % (fmt.block or 1) == 0


def _launch(
    x: Tensor,
    fmt: str | Format,
    rotation: int | None,
    global_scale: Tensor | float | str | None,
    flag: FiniteFlag | None,
    name: str | None,
    options: dict[str, str | None],
    *,
    fake: bool,
) -> tuple[int, int, Tensor, Tensor | None, Tensor, Format]:
    """M, K, bytes [M, K / 2] and scale bytes [M, blocks] (``fake``: numbers, None), g ([M] or scalar), format."""
    label = name or "tensor"
    if not isinstance(x, Tensor):
        raise TypeError(f"{label} is a {type(x).__name__}, not a torch tensor; pass torch.as_tensor(...) of it")
    fmt, given = _resolve(fmt, global_scale, options)
    require(x, given if isinstance(given, Tensor) and given.numel() > 1 else None)
    block = fmt.block or 1
    if x.dtype not in _DTYPES:
        raise ValueError(f"{label} has dtype {x.dtype}; formats take {', '.join(map(str, _DTYPES))}")
    if x.ndim == 0 or x.shape[-1] % block:
        raise ValueError(
            f"{label} of shape {tuple(x.shape)}: the last axis must be a multiple of {fmt.name}'s block of {block}; "
            "pad it with zeros"
        )
    K = x.shape[-1]
    if rotation is not None and (rotation not in ROTATIONS or K % rotation):
        raise ValueError(
            f"rotation={rotation} of {label} with last axis {K}: take a power of two from 2 to 128 that divides the "
            "axis, or None"
        )
    M = x.shape[:-1].numel()
    x_MK = (x.float() if x.dtype == torch.float64 else x.detach()).reshape(M, K).contiguous()
    row = fmt.global_scale == "row" if given is None else False
    dynamic = fmt.has_global_scale and given is None
    g = torch.ones(M if row else 1, dtype=torch.float32, device=x.device)
    if given is not None:
        g = _given_g(given, x, looks=flag is None or not isinstance(given, Tensor))
        row = g.numel() != 1 or g.ndim > 0
        g = g.reshape(-1)
    scales: Tensor | None = None
    if fake:
        packed = torch.empty_like(x_MK)
    else:
        packed = torch.empty(M, K // 2, dtype=torch.uint8, device=x.device)
        scales = torch.empty(M, K // block, dtype=torch.uint8, device=x.device)
    if x_MK.numel():
        amax = torch.zeros(M if row else 1, dtype=torch.int32, device=x.device) if dynamic else g
        noted = FiniteFlag(x.device) if flag is None else flag
        rotated = f" (after a rotation of {rotation})" if rotation else ""
        call = noted.number(refusal(label, x.shape, f"NaN or infinity{rotated}"))
        chosen = launch("quantize", capability(x))
        BM, BK = _tile(M, K, max(block, rotation or 0), chosen["elements"])
        grid = (triton.cdiv(M, BM), triton.cdiv(K, BK))
        # No a * b + c in one rounding: the reference rounds twice.
        tile: dict[str, Any] = {"HADAMARD": rotation or 0, "BLOCK_M": BM, "BLOCK_K": BK}
        tile |= {"num_warps": chosen["num_warps"], "enable_fp_fusion": False}
        if dynamic:
            amax_kernel[grid](x_MK, amax, M, K, ROW=row, **tile)
        quantize_kernel[grid](
            x_MK,
            packed,
            g if scales is None else scales,
            g,
            amax,
            noted.found,
            M,
            K,
            call,
            BLOCK=block,
            E1M2=fmt.element == "E1M2",
            RULE=fmt.scale_rule,
            NVFP4=fmt.has_global_scale,
            ROW=row,
            DYNAMIC=dynamic,
            FAKE=fake,
            LIMIT=torch.finfo(x_MK.dtype).max if fake else 0.0,
            **tile,
        )
        if flag is None:
            noted.check()
    return M, K, packed, scales, g if row else g.reshape(()), fmt


def _resolve(
    fmt: str | Format, global_scale: Tensor | float | str | None, options: dict[str, str | None]
) -> tuple[Format, Tensor | float | None]:
    """The format, and the global scale if it was given by value; ValueError for what the kernel does not take."""
    if isinstance(global_scale, str):
        options = {**options, "global_scale": global_scale}
        global_scale = None
    fmt = get_format(fmt, **options)
    if fmt.name not in ("NVFP4", "MXFP4") or fmt.rounding != "even":
        raise ValueError(
            f"the Triton quantizer takes NVFP4 and MXFP4 with rounding 'even', not {fmt.name} with {fmt.rounding!r}: "
            "use reqat.quantize"
        )
    if global_scale is not None and not fmt.has_global_scale:
        raise ValueError(f"{fmt.name} has no global scale: leave global_scale out, or quantize to NVFP4")
    if global_scale is None and fmt.global_scale == "static":
        raise ValueError(
            f"{fmt.name} with global_scale='static' needs the calibrated value: pass global_scale=<number or tensor>, "
            "or choose 'dynamic' or 'row'"
        )
    return fmt, global_scale


def _given_g(given: Tensor | float, x: Tensor, *, looks: bool) -> Tensor:
    """g as float32 on x's device: a scalar, or ``x``'s shape with a last axis of 1. ``looks``: at its value, too."""
    g = torch.as_tensor(given, dtype=torch.float32, device=x.device)
    if looks and not bool((torch.isfinite(g) & (g > _SMALLEST_G)).all()):
        raise ValueError(f"global_scale must be finite and above {_SMALLEST_G:.2g}, got {given}")
    if g.numel() == 1:
        return g.reshape(())
    shape = (*x.shape[:-1], 1)
    try:
        return g.broadcast_to(shape).contiguous()
    except RuntimeError as error:
        raise ValueError(f"global_scale of shape {tuple(g.shape)} must be a scalar or of shape {shape}") from error


def _tile(M: int, K: int, at_least: int, elements: int) -> tuple[int, int]:
    """Rows and columns a program, ``elements`` together; the interpreter gets large tiles."""
    columns = max(at_least, min(triton.next_power_of_2(K), 512 if INTERPRETED else 256))
    elements = 32768 if INTERPRETED else elements
    return min(triton.next_power_of_2(M), max(1, elements // columns)), columns
