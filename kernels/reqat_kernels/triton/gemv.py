"""W4A4 for decoding: at most eight rows of activations against a whole packed weight matrix.

With so few rows the time is that of reading the weights once, so the kernel is built around their stream:

- All rows share one weight tile: it is loaded and unpacked once, whatever M is. Weights are marked evict-first, the
  small activations evict-last, so that the stream does not push them out of the cache.
- A block of 16 codes is one 64-bit word, and everything until its sum stays in the thread that loaded it. Shifts and
  masks take two nibbles at a time to the places of two float16 (an E2M1 code, moved to the top of float16's mantissa,
  is the number times 2^-14), and one instruction multiplies and adds two products (half2).
- These sums are exact: products of codes are multiples of 1/4 up to 36, and each half adds eight of them, at most 288,
  which float16's eleven bits hold; the two halves meet in float32.
- Across blocks the sum is float32. The product of both block scales is formed in float16, exactly, E4M3 having four
  significant bits, once the activations' scale is premultiplied by 1/4: 448 * 448 / 4 fits below float16's 65504. The
  output is multiplied by 4 * alpha, alpha = 1 / (g_x g_w).

MXFP4 has two such words a block, and its scales, powers of two, are multiplied in float32.

Trade-off: no tensor cores; beyond about eight rows gemm.py is faster. No split over K, whose order of additions would
vary: rows of weights alone fill the GPU from N of about 1000. Loads are 16 bytes wide, triton's widest, not 32. The
interpreter has no half2 instruction: there a function of the same meaning takes its place.

Source: the small-M kernel of ReSET, arXiv:2606.13233.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from reqat.formats import PackedTensor
from reqat_kernels.triton.elements import as_float32, cast, decode_e4m3, decode_e8m0
from reqat_kernels.triton.gemm import Parts, operand_parts
from reqat_kernels.triton.launches import launch
from reqat_kernels.triton.runtime import INTERPRETED, capability, tl, triton

MAX_ROWS = 8
_HALF2 = tl.constexpr(not INTERPRETED)


@triton.jit
def _low(x):
    """The lower of two float16 in int32."""
    return (x & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _high(x):
    """The upper of two float16 in int32."""
    return (x >> 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _fma2(a, b, c):
    """``a * b + c`` of two float16 in each int32, rounded once; blocks of one shape."""
    if _HALF2:
        return tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        low = tl.fma(_low(a), _low(b), _low(c)).to(tl.int16, bitcast=True).to(tl.int32)
        high = tl.fma(_high(a), _high(b), _high(c)).to(tl.int16, bitcast=True).to(tl.int32)
        return (low & 0xFFFF) | (high << 16)


@triton.jit
def _two_codes(word, J: tl.constexpr, E1M2: tl.constexpr, FULL: tl.constexpr):
    """Nibbles J and J + 4 of int32 words as two float16: the elements times 2 (E1M2), or times 2^-14 unless FULL."""
    two = word >> (4 * J)
    sign = (two & 0x00080008) << 12
    if E1M2:
        # 1024 + n has n as its mantissa, and the subtraction is exact.
        one = tl.full(word.shape, 0x3C003C00, tl.int32)
        return _fma2((two & 0x00070007) | 0x64006400, one, one * 0 - 0x1BFF1C00) | sign
    else:
        bits = ((two & 0x00070007) << 9) | sign
        if FULL:
            zero = tl.zeros(word.shape, tl.int32)
            bits = _fma2(bits, zero + 0x74007400, zero)  # times 2^14
        return bits


@triton.jit
def gemv_w4a4_kernel(
    a_ptr,  # uint8 [M, K / 2]
    as_ptr,  # uint8 [M, K / BLOCK]
    ga_ptr,  # float32 [1] or [M]
    w_ptr,  # uint8 [N, K / 2], both 8-byte aligned
    ws_ptr,  # uint8 [N, K / BLOCK]
    gw_ptr,  # float32 [1] or [N]
    bias_ptr,  # [N]
    out_ptr,  # [M, N]
    M,
    N,
    K,  # a multiple of 32
    BLOCK: tl.constexpr,  # 16 or 32
    NVFP4: tl.constexpr,
    E1M2: tl.constexpr,
    G_A: tl.constexpr,  # 0: no global scale, 1: a scalar, 2: one a row
    G_W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,  # M, rounded up to a power of two
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = dequantize(A) @ dequantize(W)^T + bias for all rows and BLOCK_N columns."""
    GROUPS: tl.constexpr = BLOCK_K // 16
    # What the codes' products have to be multiplied by: 1/2 of each E1M2; one E2M1 lies 2^-14 too low.
    UNIT: tl.constexpr = 0.25 if E1M2 else 16384.0
    words = K // 32 * 2  # a row of 64-bit words; an even number, so that two make one load
    per_row = K // BLOCK
    rows = tl.arange(0, ROWS)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    a_row, w_row = rows[:, None, None], columns.to(tl.int64)[None, :, None]
    in_m, in_n = (rows < M)[:, None, None], (columns < N)[None, :, None]
    a_words = a_ptr.to(tl.pointer_type(tl.int64))
    w_words = w_ptr.to(tl.pointer_type(tl.int64))
    acc = tl.zeros((ROWS, BLOCK_N, GROUPS), dtype=tl.float32)
    for k in range(0, words, GROUPS):
        group = (k + tl.arange(0, GROUPS))[None, None, :]
        in_k = group < words
        block = group // (BLOCK // 16)
        w = tl.load(w_words + w_row * words + group, mask=in_n & in_k, other=0, eviction_policy="evict_first")
        ws = tl.load(ws_ptr + w_row * per_row + block, mask=in_n & in_k, other=0, eviction_policy="evict_first")
        a = tl.load(a_words + a_row * words + group, mask=in_m & in_k, other=0, eviction_policy="evict_last")
        a_s = tl.load(as_ptr + a_row * per_row + block, mask=in_m & in_k, other=0, eviction_policy="evict_last")
        two_sums = tl.zeros((ROWS, BLOCK_N, GROUPS), dtype=tl.int32)
        for half in tl.static_range(2):
            a_word, w_word = (a >> (32 * half)).to(tl.int32), (w >> (32 * half)).to(tl.int32)
            for j in tl.static_range(4):
                x = tl.broadcast_to(_two_codes(a_word, j, E1M2, True), (ROWS, BLOCK_N, GROUPS))
                y = tl.broadcast_to(_two_codes(w_word, j, E1M2, False), (ROWS, BLOCK_N, GROUPS))
                two_sums = _fma2(x, y, two_sums)
        block_sum = (_low(two_sums).to(tl.float32) + _high(two_sums).to(tl.float32)) * UNIT
        if NVFP4:
            scale = (decode_e4m3(a_s) * 0.25).to(tl.float16) * decode_e4m3(ws).to(tl.float16)
            acc = tl.fma(block_sum, scale.to(tl.float32), acc)
        else:
            acc = tl.fma(block_sum * decode_e8m0(a_s), tl.broadcast_to(decode_e8m0(ws), acc.shape), acc)
    y = tl.sum(acc, axis=2)
    if NVFP4:
        y = y * 4.0
    if G_A == 1:
        y = tl.div_rn(y, tl.load(ga_ptr))
    elif G_A == 2:
        y = tl.div_rn(y, tl.load(ga_ptr + rows, mask=rows < M, other=1.0)[:, None])
    if G_W == 1:
        y = tl.div_rn(y, tl.load(gw_ptr))
    elif G_W == 2:
        y = tl.div_rn(y, tl.load(gw_ptr + columns, mask=columns < N, other=1.0)[None, :])
    if HAS_BIAS:
        y += as_float32(tl.load(bias_ptr + columns, mask=columns < N, other=0.0))[None, :]
    at = out_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(at, cast(y, out_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])


@torch.no_grad()
def gemv_w4a4(
    x: PackedTensor, weight: PackedTensor, bias: Tensor | None = None, *, dtype: torch.dtype | None = None
) -> Tensor:
    """``x.dequantize() @ weight.dequantize().T + bias`` for up to eight rows: x [..., K], weight [N, K]; [..., N].

    Arguments and errors of :func:`reqat_kernels.triton.gemm.linear_w4a4`; more than eight rows are a ValueError.
    """
    a, w, dtype = operand_parts(x, weight, bias, dtype)
    M, N, K = a.packed.shape[0], w.packed.shape[0], x.shape[-1]
    if M > MAX_ROWS:
        raise ValueError(f"gemv_w4a4 takes up to {MAX_ROWS} rows, not {M}: use reqat_kernels.triton.gemm.linear_w4a4")
    out = torch.empty(M, N, dtype=dtype, device=a.packed.device)
    if out.numel():
        for operand in (a, w):
            _even_words(operand, K)
        tile = launch("gemv one" if M == 1 else "gemv several", capability(out))
        if INTERPRETED:  # pays by program and operation
            tile["BLOCK_N"] = min(128, triton.next_power_of_2(N))
            tile["BLOCK_K"] = max(32, min(1024, triton.next_power_of_2(K)))
        BN = tile["BLOCK_N"]
        gemv_w4a4_kernel[(triton.cdiv(N, BN),)](
            a.packed,
            a.scales,
            a.g,
            w.packed,
            w.scales,
            w.g,
            bias if bias is not None else w.g,
            out,
            M,
            N,
            2 * w.packed.shape[1],
            BLOCK=w.block,
            NVFP4=w.nvfp4,
            E1M2=w.e1m2,
            G_A=a.mode,
            G_W=w.mode,
            HAS_BIAS=bias is not None,
            ROWS=triton.next_power_of_2(M),
            **tile,
            enable_fp_fusion=False,  # where products and sums meet in one rounding, the kernel says so itself
        )
    return out.view(*x.shape[:-1], N)


def _even_words(operand: Parts, K: int) -> None:
    """Make rows whole pairs of 64-bit words, aligned. Copies only odd multiples of 16 and tensors at odd addresses."""
    if K % 32:  # a block of zeros at the end; its scale may be anything finite
        operand.packed, operand.scales = pad(operand.packed, (0, 8)), pad(operand.scales, (0, 1))
    elif operand.packed.data_ptr() % 8:
        operand.packed = operand.packed.clone()
