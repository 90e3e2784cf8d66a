"""The plain PyTorch twin of each kernel, written to be read: ``reqat.formats``, float arithmetic, no tiles.

A twin states what its kernel computes. Codes, scales and rotated numbers are bit-equal; sums of products agree up to
the order of float32 additions, and bit for bit where those are exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reqat.formats import Format, PackedTensor, get_format
from reqat.formats import quantize as reference


def block_hadamard(x: Tensor, size: int) -> Tensor:
    """Each ``size`` consecutive elements of the last axis times the normalized Hadamard matrix; x's shape and dtype.

    Sums and differences of neighbours, of pairs two apart, four apart, ..., then one multiplication; in float32.
    """
    y = x.float().reshape(-1, size)
    step = 1
    while step < size:
        pair = y.view(-1, size // (2 * step), 2, step)
        a, b = pair[:, :, 0], pair[:, :, 1]
        y = torch.stack((a + b, a - b), dim=2).view(-1, size)
        step *= 2
    y = y * torch.tensor(size, dtype=torch.float64, device=y.device).rsqrt().float()
    return y.view(x.shape).to(x.dtype)


def quantize(
    x: Tensor,
    fmt: str | Format,
    *,
    rotation: int | None = None,
    global_scale: Tensor | float | str | None = None,
    **options: str | None,
) -> PackedTensor:
    """Twin of :func:`reqat_kernels.triton.quantize.quantize`: rotate, then ``reqat.quantize`` along the last axis."""
    if rotation is not None:
        x = block_hadamard(x, rotation)
    return reference(x, get_format(fmt, **options), global_scale=global_scale).pack()


def scaled_codes(t: PackedTensor) -> tuple[Tensor, Tensor]:
    """``code * s`` (exact) [..., K] and the divisor g [rows or 1, 1], which is 1 without global scale; float64."""
    q = t.unpack()
    values = q.format.element_type.decode(q.codes).double()
    s = 2.0 ** (q.scales.double() - 127) if q.format.scale == "E8M0" else q.scales.double()
    g = values.new_ones(()) if q.global_scale is None else q.global_scale.double()
    return values * s.repeat_interleave(q.format.block or 1, dim=-1), g.cpu().to(s.device).reshape(-1, 1)


def linear_w4a16(x: Tensor, weight: PackedTensor, bias: Tensor | None = None) -> Tensor:
    """Twin of :func:`reqat_kernels.triton.gemm.linear_w4a16`, summed in float64: float64 [..., N]."""
    w_NK, g = scaled_codes(weight)
    y = x.double() @ w_NK.T / g.T
    return y if bias is None else y + bias.double()


def linear_w4a4(x: PackedTensor, weight: PackedTensor, bias: Tensor | None = None) -> Tensor:
    """Twin of ``linear_w4a4`` of gemm.py and ``gemv_w4a4`` of gemv.py, summed in float64: float64 [..., N]."""
    a, ga = scaled_codes(x)
    w_NK, gw = scaled_codes(weight)
    y = a.reshape(-1, a.shape[-1]) @ w_NK.T / ga / gw.T
    y = y.view(*x.shape[:-1], -1)
    return y if bias is None else y + bias.double()
