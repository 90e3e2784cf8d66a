"""W4A4 for decoding: at most eight rows of activations against a whole packed weight matrix.

With so few rows the time is that of reading the weights once, so the kernel is built around their stream:

- All rows share one weight tile: it is loaded and unpacked once, whatever M is. Weights are marked evict-first, the
  small activations evict-last, so that the stream does not push them out of the cache.
- Inside a block of 16 the sum is taken in float16, two products an instruction (half2). That is exact: products are
  multiples of 1/4 up to 36, so partial sums up to 512 fit float16's eleven bits. (Only a block whose sixteen products
  nearly all are +-36 goes beyond, to 576, and may round by 1/4.)
- Across blocks the sum is float32. A block's sum is multiplied by both block scales; their product is formed in float16
  too, exactly, E4M3 having four significant bits, once the activations' scale is premultiplied by 1/4: 448 * 448 / 4
  fits below float16's 65504. The output is multiplied by 4 * alpha, alpha = 1 / (g_x g_w).

MXFP4 has two such groups of 16 a block, and its scales, powers of two, are multiplied in float32.

Trade-off: no tensor cores; beyond about eight rows gemm.py is faster. No split over K, whose order of additions would
vary: rows of weights alone fill the GPU from N of about 1000.

Source: the small-M kernel of ReSET, arXiv:2606.13233.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reqat.formats import PackedTensor
from reqat_kernels.triton.elements import as_float32, cast, decode_e4m3, decode_e8m0, decode_element_fp16
from reqat_kernels.triton.gemm import operand_parts
from reqat_kernels.triton.runtime import INTERPRETED, tl, triton

MAX_ROWS = 8


@triton.jit
def _halves(packed, E1M2: tl.constexpr):
    """float16 values of the even and of the odd elements of bytes."""
    packed = packed.to(tl.int16)
    return decode_element_fp16(packed & 0xF, E1M2), decode_element_fp16(packed >> 4, E1M2)


@triton.jit
def gemv_w4a4_kernel(
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
    BYTES: tl.constexpr = BLOCK_K // 2
    GROUPS: tl.constexpr = BLOCK_K // 16
    rows = tl.arange(0, ROWS)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    w_row = columns.to(tl.int64)[:, None]
    in_m, in_n = (rows < M)[:, None], (columns < N)[:, None]
    acc = tl.zeros((ROWS, BLOCK_N, GROUPS), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        pairs = (k // 2 + tl.arange(0, BYTES))[None, :]
        in_k = pairs < K // 2
        w = tl.load(w_ptr + w_row * (K // 2) + pairs, mask=in_n & in_k, other=0, eviction_policy="evict_first")
        a = tl.load(a_ptr + rows[:, None] * (K // 2) + pairs, mask=in_m & in_k, other=0, eviction_policy="evict_last")
        w_even, w_odd = _halves(w, E1M2)
        a_even, a_odd = _halves(a, E1M2)
        pair_sum = tl.fma(a_odd[:, None, :], w_odd[None, :, :], a_even[:, None, :] * w_even[None, :, :])
        group_sum = tl.sum(tl.reshape(pair_sum, (ROWS, BLOCK_N, GROUPS, 8)), axis=3).to(tl.float32)

        # The scale of each 16 elements; two of them share MXFP4's.
        groups = (k // 16 + tl.arange(0, GROUPS))[None, :]
        blocks = groups // (BLOCK // 16)
        in_blocks = groups < K // 16
        ws = tl.load(
            ws_ptr + w_row * (K // BLOCK) + blocks, mask=in_n & in_blocks, other=0, eviction_policy="evict_first"
        )
        a_s = tl.load(
            as_ptr + rows[:, None] * (K // BLOCK) + blocks, mask=in_m & in_blocks, other=0, eviction_policy="evict_last"
        )
        if NVFP4:
            quarter = (decode_e4m3(a_s) * 0.25).to(tl.float16)
            scale = quarter[:, None, :] * decode_e4m3(ws).to(tl.float16)[None, :, :]
            acc = tl.fma(group_sum, scale.to(tl.float32), acc)
        else:
            acc = tl.fma(group_sum * decode_e8m0(a_s)[:, None, :], decode_e8m0(ws)[None, :, :], acc)
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
    tl.store(at, cast(y, out_ptr.dtype.element_ty), mask=in_m & (columns < N)[None, :])


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
        BN, BK = (min(64, triton.next_power_of_2(N)), 512) if INTERPRETED else (8, 512)
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
            K,
            BLOCK=w.block,
            NVFP4=w.nvfp4,
            E1M2=w.e1m2,
            G_A=a.mode,
            G_W=w.mode,
            HAS_BIAS=bias is not None,
            ROWS=triton.next_power_of_2(M),
            BLOCK_N=BN,
            BLOCK_K=BK,
            num_warps=4,
            enable_fp_fusion=False,  # where products and sums meet in one rounding, the kernel says so itself
        )
    return out.view(*x.shape[:-1], N)
