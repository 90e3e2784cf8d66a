"""Linear layers on packed FP4 weights: W4A16 (activations as they are) and W4A4 (activations packed too).

Both keep g out of the inner loop. ``code * s`` is a number of few bits: an element has at most 3 significant bits, an
E4M3 scale 4, so their product is exact in float16 and bfloat16 (and at most 2688); tensor cores multiply those exactly
and add in float32, and only the finished sum is divided by the float32 global scales. So against the exact result
there is no error but that of float32 additions and of the output's type.

- *W4A16* saves memory traffic, not arithmetic: weights are unpacked in registers. Under float16 an E8M0 scale may not
  fit; it is taken relative to the weight's largest one, 2^12, and what falls below 2^-24 then lies 36 binades below the
  top. float32 activations are multiplied in true float32, off the tensor cores.
- *W4A4* gives codes and scales to the tensor core as they are (``tl.dot_scaled``), where it has such an instruction:
  MXFP4 from sm_90 (where triton unpacks it to bfloat16), NVFP4 from sm_100. Elsewhere, and for E1M2, which no tensor
  core knows, a branch unpacks both operands and uses the plain instruction.

In the interpreter ``tl.dot`` on bfloat16 multiplies raw bits and ``dot_scaled`` reads E4M3 scales as E8M0, so there the
compute type is float32 and NVFP4 takes the unpacking branch: same numbers.

Trade-off: scales are read row-major as checkpoints have them, not swizzled for the tensor memory: no repacking, more
instructions a tile. Tile sizes come from a table (launches.py) rather than a search, so that results are reproducible.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reqat.formats import PackedTensor
from reqat_kernels.triton.elements import (
    as_float32,
    bits_float,
    cast,
    decode_e4m3,
    decode_e8m0,
    decode_element_fp16,
    spread,
    unpack_pairs,
)
from reqat_kernels.triton.launches import launch
from reqat_kernels.triton.runtime import INTERPRETED, capability, require, tl, triton

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def _tile_of(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which tile a program takes: eight rows of tiles at a time, column by column, so that neighbours share weights."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    group = 8 * tl.cdiv(N, BLOCK_N)
    first = pid // group * 8
    height = tl.minimum(tiles_m - first, 8)
    return first + pid % group % height, pid % group // height


@triton.jit
def _unpack(packed, scales, shift, NVFP4: tl.constexpr, E1M2: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr):
    """``code * s * 2^-shift`` as COMPUTE [R, K], from bytes [R, K / 2] and scale bytes [R, K / BLOCK]."""
    ROWS: tl.constexpr = packed.shape[0]
    BLOCKS: tl.constexpr = scales.shape[1]
    value = decode_element_fp16(unpack_pairs(packed, ROWS, packed.shape[1]).to(tl.int16), E1M2)
    if NVFP4:
        value = value * spread(decode_e4m3(scales).to(tl.float16), ROWS, BLOCKS, BLOCK)
    else:
        s = decode_e8m0(tl.maximum(scales.to(tl.int32) - shift, 0))
        value = value.to(tl.float32) * spread(s, ROWS, BLOCKS, BLOCK)
    return value.to(COMPUTE)


@triton.jit
def _load_packed(
    packed_ptr, scales_ptr, rows, length, k, K, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, EVICT: tl.constexpr
):
    """Bytes [R, BLOCK_K / 2] and scale bytes [R, BLOCK_K / BLOCK] of columns k.. of [length, K]; zeros outside."""
    pairs = k // 2 + tl.arange(0, BLOCK_K // 2)
    blocks = k // BLOCK + tl.arange(0, BLOCK_K // BLOCK)
    inside = (rows < length)[:, None]
    row = rows.to(tl.int64)[:, None]
    packed = tl.load(
        packed_ptr + row * (K // 2) + pairs[None, :],
        mask=inside & (pairs < K // 2)[None, :],
        other=0,
        eviction_policy=EVICT,
    )
    scales = tl.load(
        scales_ptr + row * (K // BLOCK) + blocks[None, :],
        mask=inside & (blocks < K // BLOCK)[None, :],
        other=0,
        eviction_policy=EVICT,
    )
    return packed, scales


@triton.jit
def _divide_by_g(acc, g_ptr, index, length, MODE: tl.constexpr, AXIS: tl.constexpr):
    """``acc`` / g. MODE 0: there is no g; 1: a scalar; 2: one for each row (AXIS 0) or column (AXIS 1)."""
    if MODE == 1:
        acc = tl.div_rn(acc, tl.load(g_ptr))
    elif MODE == 2:
        g = tl.load(g_ptr + index, mask=index < length, other=1.0)
        acc = tl.div_rn(acc, g[:, None] if AXIS == 0 else g[None, :])
    return acc


@triton.jit
def _store_rows(out_ptr, acc, bias_ptr, rows, columns, M, N, HAS_BIAS: tl.constexpr):
    """Add the bias and write float32 ``acc`` to out [M, N], rounded to its type."""
    if HAS_BIAS:
        acc += as_float32(tl.load(bias_ptr + columns, mask=columns < N, other=0.0))[None, :]
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    at = out_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(at, cast(acc, out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def w4a16_kernel(
    x_ptr,  # [M, K]
    w_ptr,  # uint8 [N, K / 2]
    ws_ptr,  # uint8 [N, K / BLOCK]
    gw_ptr,  # float32 [1] or [N]
    top_ptr,  # int32 [1]: the largest E8M0 byte of ws, if SHIFT
    bias_ptr,  # [N]
    out_ptr,  # [M, N]
    M,
    N,
    K,
    BLOCK: tl.constexpr,
    NVFP4: tl.constexpr,
    E1M2: tl.constexpr,
    G_W: tl.constexpr,  # 0: no global scale, 1: a scalar, 2: one a row of W
    HAS_BIAS: tl.constexpr,
    SHIFT: tl.constexpr,  # take E8M0 scales relative to the largest, for float16
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = x @ dequantize(W)^T + bias, one tile a program."""
    pid_m, pid_n = _tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    shift = 0
    if SHIFT:
        shift = tl.maximum(tl.load(top_ptr), 13) - 139  # the largest scale becomes 2^12; 2^shift stays normal
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        depth = k + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + rows.to(tl.int64)[:, None] * K + depth[None, :],
            mask=(rows < M)[:, None] & (depth < K)[None, :],
            other=0.0,
        )
        if x.dtype != COMPUTE:
            x = as_float32(x).to(COMPUTE)
        packed, scales = _load_packed(w_ptr, ws_ptr, columns, N, k, K, BLOCK, BLOCK_K, "")
        w = _unpack(packed, scales, shift, NVFP4, E1M2, BLOCK, COMPUTE)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    if SHIFT:
        acc = acc * bits_float((shift + 127) << 23)
    acc = _divide_by_g(acc, gw_ptr, columns, N, G_W, 1)
    _store_rows(out_ptr, acc, bias_ptr, rows, columns, M, N, HAS_BIAS)


@triton.jit
def w4a4_kernel(
    a_ptr,  # uint8 [M, K / 2]
    as_ptr,  # uint8 [M, K / BLOCK]
    ga_ptr,  # float32 [1] or [M]
    w_ptr,  # uint8 [N, K / 2]
    ws_ptr,  # uint8 [N, K / BLOCK]
    gw_ptr,  # float32 [1] or [N]
    bias_ptr,  # [N]
    out_ptr,  # [M, N]
    M,
    N,
    K,
    BLOCK: tl.constexpr,
    NVFP4: tl.constexpr,
    E1M2: tl.constexpr,
    G_A: tl.constexpr,  # 0: no global scale, 1: a scalar, 2: one a row
    G_W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALED: tl.constexpr,  # codes and scales go to the tensor core as they are; E2M1 only
    COMPUTE: tl.constexpr,  # else both are unpacked to this type
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = dequantize(A) @ dequantize(W)^T + bias, one tile a program."""
    pid_m, pid_n = _tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        a, a_scales = _load_packed(a_ptr, as_ptr, rows, M, k, K, BLOCK, BLOCK_K, "")
        w, w_scales = _load_packed(w_ptr, ws_ptr, columns, N, k, K, BLOCK, BLOCK_K, "")
        if SCALED:
            if NVFP4:
                a_scales = a_scales.to(tl.float8e4nv, bitcast=True)
                w_scales = w_scales.to(tl.float8e4nv, bitcast=True)
            acc = tl.dot_scaled(a, a_scales, "e2m1", tl.trans(w), w_scales, "e2m1", acc)
        else:
            lhs = _unpack(a, a_scales, 0, NVFP4, E1M2, BLOCK, COMPUTE)
            rhs = _unpack(w, w_scales, 0, NVFP4, E1M2, BLOCK, COMPUTE)
            acc = tl.dot(lhs, tl.trans(rhs), acc, input_precision="ieee")
    acc = _divide_by_g(acc, ga_ptr, rows, M, G_A, 0)
    acc = _divide_by_g(acc, gw_ptr, columns, N, G_W, 1)
    _store_rows(out_ptr, acc, bias_ptr, rows, columns, M, N, HAS_BIAS)


@torch.no_grad()
def linear_w4a16(x: Tensor, weight: PackedTensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.dequantize().T + bias``: x [..., K] float16, bfloat16 or float32, weight [N, K]; x's dtype [..., N].

    Weights NVFP4 (any global scale; also NVFP4-4/6) or MXFP4, packed along the last axis. Sums are float32.

    Raises:
        ImportError: triton is not installed.
        ValueError: shapes, dtypes, formats or devices that do not fit; the message says what would.
    """
    w = weight_parts(weight, bias, "weight")
    require(x, w.packed, w.scales, bias)
    if x.dtype not in DTYPES:
        raise ValueError(f"x has dtype {x.dtype}: give float16, bfloat16 or float32")
    x_MK, out, N, K = _prepare(x, w.packed, x.shape[:-1], x.shape[-1] if x.ndim else 0, x.dtype)
    M = x_MK.shape[0]
    if out.numel():
        compute = tl.float32 if INTERPRETED and x.dtype == torch.bfloat16 else _TRITON_DTYPES[x.dtype]
        shift = not w.nvfp4 and x.dtype == torch.float16 and w.scales.numel() > 0
        top = w.scales.amax().to(torch.int32) if shift else w.g
        BM, BN, BK, options = _tile(M, N, "w4a16", capability(out))
        w4a16_kernel[(triton.cdiv(M, BM) * triton.cdiv(N, BN),)](
            x_MK,
            w.packed,
            w.scales,
            w.g,
            top,
            bias if bias is not None else w.g,
            out,
            M,
            N,
            K,
            BLOCK=w.block,
            NVFP4=w.nvfp4,
            E1M2=w.e1m2,
            G_W=w.mode,
            HAS_BIAS=bias is not None,
            SHIFT=shift,
            COMPUTE=compute,
            BLOCK_M=BM,
            BLOCK_N=BN,
            BLOCK_K=BK,
            **options,
        )
    return out.view(*x.shape[:-1], N)


@torch.no_grad()
def linear_w4a4(
    x: PackedTensor,
    weight: PackedTensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    scaled: bool | None = None,
) -> Tensor:
    """``x.dequantize() @ weight.dequantize().T + bias``: x [..., K] and weight [N, K] packed; [..., N].

    Both in one format family, NVFP4 or MXFP4, one element and block; any global scales. For up to 8 rows
    :func:`reqat_kernels.triton.gemv.gemv_w4a4` is faster.

    Args:
        x: packed activations (:func:`reqat_kernels.triton.quantize.quantize`).
        weight: packed weights.
        bias: [N], or None.
        dtype: of the result; x's, or float32 where that is float64.
        scaled: use ``tl.dot_scaled``; None: where the hardware has it and the interpreter gets it right.

    Raises:
        ImportError: triton is not installed.
        ValueError: shapes, dtypes, formats or devices that do not fit; the message says what would.
    """
    a, w, dtype = operand_parts(x, weight, bias, dtype)
    a_MK, out, N, _ = _prepare(a.packed, w.packed, x.shape[:-1], x.shape[-1], dtype)
    M, K = a_MK.shape[0], x.shape[-1]
    if out.numel():
        level = capability(out)
        if scaled is None:  # MXFP4 on sm_80 would spill registers
            scaled = not w.e1m2 and (level >= 100 or (not w.nvfp4 and (INTERPRETED or level >= 90)))
        elif scaled and (w.e1m2 or (w.nvfp4 and INTERPRETED)):
            raise ValueError(
                "scaled=True: tensor cores have no E1M2, and the interpreter reads E4M3 scales wrongly; leave it out"
            )
        # E4M3 times E2M1 fits float16, which every GPU multiplies; E8M0 wants bfloat16's range.
        compute = tl.float16 if w.nvfp4 else tl.float32 if INTERPRETED else tl.bfloat16
        BM, BN, BK, options = _tile(M, N, "w4a4 scaled" if scaled else "w4a4 unpacked", level)
        w4a4_kernel[(triton.cdiv(M, BM) * triton.cdiv(N, BN),)](
            a_MK,
            a.scales,
            a.g,
            w.packed,
            w.scales,
            w.g,
            bias if bias is not None else w.g,
            out,
            M,
            N,
            K,
            BLOCK=w.block,
            NVFP4=w.nvfp4,
            E1M2=w.e1m2,
            G_A=a.mode,
            G_W=w.mode,
            HAS_BIAS=bias is not None,
            SCALED=scaled,
            COMPUTE=compute,
            BLOCK_M=BM,
            BLOCK_N=BN,
            BLOCK_K=BK,
            **options,
        )
    return out.view(*x.shape[:-1], N)


# --- what both share, and gemv.py -------------------------------------------------------------------------------------

_TRITON_DTYPES: dict[torch.dtype, Any] = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}


class Parts:
    """The parts of a packed operand as the kernels take them: contiguous, rows first, scales as bytes.

    ``g``: float32, one number (``mode`` 1) or one a row (2); mode 0 has none, and g is a stand-in. Raises ValueError
    for a format that the kernels do not take.
    """

    def __init__(self, t: PackedTensor, name: str):
        if not isinstance(t, PackedTensor):
            raise TypeError(f"{name} is a {type(t).__name__}, not a PackedTensor; quantize() and .pack() make one")
        fmt = t.format
        if fmt.name not in ("NVFP4", "NVFP4-4/6", "MXFP4"):
            raise ValueError(
                f"{name} is {fmt.name}; the Triton kernels multiply NVFP4 and MXFP4: dequantize it instead"
            )
        if t.axis != len(t.shape) - 1:
            raise ValueError(f"{name} is packed along axis {t.axis} of {tuple(t.shape)}: quantize along the last axis")
        if t.packed.shape[-1] * 2 != t.shape[-1]:
            raise ValueError(
                f"{name} of shape {tuple(t.shape)} is padded to its block: quantize multiples of the block"
            )
        self.block = fmt.block or 1
        self.nvfp4 = fmt.has_global_scale
        self.e1m2 = fmt.element == "E1M2"
        rows = t.shape[:-1].numel()
        self.packed = t.packed.reshape(rows, t.packed.shape[-1]).contiguous()
        self.scales = t.scales.view(torch.uint8).reshape(rows, t.scales.shape[-1]).contiguous()
        g = t.global_scale
        self.mode = 0 if g is None else 1 if g.numel() == 1 else 2
        self.g = self.packed.new_empty(1, dtype=torch.float32) if g is None else g.float().reshape(-1).contiguous()


def weight_parts(weight: PackedTensor, bias: Tensor | None, name: str) -> Parts:
    """The parts of a weight [N, K]; ValueError if it or the bias [N] does not fit."""
    if not isinstance(weight, PackedTensor):
        raise TypeError(f"{name} is a {type(weight).__name__}, not a PackedTensor; quantize() and .pack() make one")
    require(bias)
    if len(weight.shape) != 2:
        raise ValueError(f"{name} must be [N, K], not {tuple(weight.shape)}")
    if bias is not None and (tuple(bias.shape) != (weight.shape[0],) or bias.dtype not in DTYPES):
        raise ValueError(
            f"bias must be float16, bfloat16 or float32 of shape ({weight.shape[0]},), got {bias.dtype} of shape "
            f"{tuple(bias.shape)}"
        )
    return Parts(weight, name)


def operand_parts(
    x: PackedTensor, weight: PackedTensor, bias: Tensor | None, dtype: torch.dtype | None
) -> tuple[Parts, Parts, torch.dtype]:
    """The parts of both operands and the output's dtype; ValueError where they do not go together."""
    a, w = Parts(x, "x"), weight_parts(weight, bias, "weight")
    require(a.packed, w.packed, bias)
    if (a.nvfp4, a.e1m2, a.block) != (w.nvfp4, w.e1m2, w.block):
        raise ValueError(
            f"x is {x.format.name} {x.format.element} and weight is {weight.format.name} {weight.format.element}: "
            "quantize both to one format"
        )
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} differ in the last axis")
    dtype = dtype or (x.dtype if x.dtype in DTYPES else torch.float32)
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype}: choose float16, bfloat16 or float32")
    return a, w, dtype


def _prepare(
    x: Tensor, packed: Tensor, lead: torch.Size, K: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, int, int]:
    """Left operand as rows, the empty output [M, N], N and K."""
    N = packed.shape[0]
    if 2 * packed.shape[1] != K:
        raise ValueError(f"x [..., {K}] and weight [{N}, {2 * packed.shape[1]}] differ in the last axis")
    rows = lead.numel()
    x_MK = x.reshape(rows, x.shape[-1]).contiguous()
    return x_MK, torch.empty(rows, N, dtype=dtype, device=x.device), N, K


def _tile(M: int, N: int, kind: str, level: int) -> tuple[int, int, int, dict[str, Any]]:
    """Tile sizes and launch options for M rows on a GPU of capability ``level``.

    Up to 32 rows are ``few``. The interpreter pays by program and operation: large tiles.
    """
    if INTERPRETED:
        return (
            min(128, triton.next_power_of_2(M)),
            min(256, triton.next_power_of_2(N)),
            256,
            {"enable_fp_fusion": False},
        )
    BM = min(128, max(16, triton.next_power_of_2(M)))
    chosen: dict[str, Any] = launch(f"{kind} {'few' if BM <= 32 else 'many'}", level)
    BN, BK = chosen.pop("BLOCK_N"), chosen.pop("BLOCK_K")
    if BM == 64:  # half of the tile that the entry is for
        chosen["num_warps"] = max(4, chosen["num_warps"] // 2)
    return BM, BN, BK, {**chosen, "enable_fp_fusion": False}
