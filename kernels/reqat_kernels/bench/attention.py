"""Decode attention: one new token of each sequence looks at T tokens of the cache, heads shared as in SmolLM2 (9 of 3).

Time is the cache's bytes, so the ring holds copies of the cache. Outputs are held against a float64 softmax over the
keys and values that a provider's cache stands for. With s the scores and p the softmax:

    bfloat16   |out error| <= (2^-7 max|s| + 2^-7) sum_t p_t |v_t| + 2^-8 |out|   scores, weights rounded to bfloat16
    ours       the bound that :mod:`reqat_kernels.native.attention` states
    Triton     scores in float32 (D + 10 roundings), an exponential within 8 units in the last place, softmax weights
               rounded to bfloat16 before they weigh the values (2^-8), output rounded to bfloat16
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from reqat.formats import get_format, quantize_dequantize
from reqat_kernels.bench.measure import Absent, Case, Kernel, Needs, Work, Wrong, triton_runs, within

SEED = 8
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
_U = 2.0**-24


def _needs(case: Case) -> Needs:
    """Keys and values in bfloat16; a check holds them in float64, a copy for each query head, several times."""
    both = 2 * 2 * case.B * case.G * case.T * case.D
    return Needs(held=2 * both, passing=6 * 8 * case.B * case.H * case.T * case.D, copy=both, pages=1.1)


ATTENTION = Kernel("attention", _needs)


def cases(
    batches: Iterable[int], contexts: Iterable[int], *, device: str | None = None, ring_bytes: int = 0
) -> list[Case]:
    """A case for each batch and context, on ``device`` or on every one that this machine has."""
    sizes, rows = (("H", HEADS), ("G", KV_HEADS), ("D", HEAD_DIM)), list(batches)
    asked = [
        Case("attention", (("B", batch), ("T", tokens), *sizes), ring_bytes=ring_bytes)
        for tokens in contexts
        for batch in rows
    ]
    return [found for case in asked for found in case.on(device)]


def operands(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Query [B, H, 1, D], keys and values [B, G, T, D]: normal numbers, bfloat16."""
    source = torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source).to(torch.bfloat16).to(case.device)

    sides = (case.B, case.G, case.T, case.D)
    return normal(case.B, case.H, 1, case.D), normal(*sides), normal(*sides)


def softmax_over(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """float64 scores and weights [B, H, T], output [B, H, 1, D], and values [B, H, T, D] as each head sees them."""
    share = query.shape[1] // key.shape[1]
    k, v = (t.double().cpu().repeat_interleave(share, 1) for t in (key, value))
    scores = (query.double().cpu() @ k.transpose(2, 3) * query.shape[-1] ** -0.5)[:, :, 0]
    p = scores.softmax(-1)
    return scores, p, p[:, :, None] @ v, v


def _work(case: Case, cache: Any, bytes_each: int, call: Callable[[Any], Tensor], verify: Callable[[Tensor], None],
          clone: Callable[[Any], Any]) -> Work:  # fmt: skip
    ring = [cache, *(clone(cache) for _ in range(case.copies(bytes_each) - 1))]
    moved = bytes_each + 2 * 2 * case.B * case.H * case.D
    return Work(
        run=lambda i: call(ring[i]),
        copies=len(ring),
        bytes_moved=moved,
        check=lambda: verify(call(ring[0])),
        ring_bytes=len(ring) * bytes_each,
    )


def _bf16(case: Case, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Work:
    query, key, value = operands(case)

    def verify(y: Tensor) -> None:
        scores, p, out, v = softmax_over(query, key, value)
        spread = p[:, :, None] @ v.abs()
        bound = 2.0**-7 * (1 + scores.abs().amax(-1)[..., None, None]) * spread + 2.0**-8 * out.abs()
        within(y.cpu(), out, bound, "the output")

    return _work(
        case,
        (key, value),
        key.nbytes + value.nbytes,
        lambda kv: attend(query, *kv),
        verify,
        lambda kv: tuple(t.clone() for t in kv),
    )


@ATTENTION.provider("torch, sdpa", format="BF16", devices=("cpu", "cuda"))
def sdpa(case: Case) -> Work:
    """``scaled_dot_product_attention`` with shared key/value heads."""
    attend = torch.nn.functional.scaled_dot_product_attention
    return _bf16(case, lambda q, k, v: attend(q, k, v, enable_gqa=True))


@ATTENTION.provider("torch, eager", format="BF16", devices=("cpu", "cuda"))
def eager(case: Case) -> Work:
    """Two matrix products and a softmax in float32 between them; query heads of a shared head side by side."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q.view(case.B, case.G, -1, case.D)
        p = (q @ k.transpose(2, 3) * case.D**-0.5).softmax(-1, dtype=torch.float32).to(q.dtype)
        return (p @ v).view(case.B, case.H, 1, case.D)

    return _bf16(case, attend)


def _ours(case: Case, element: str) -> Work:
    try:
        from reqat_kernels.native.attention import PackedStates, kv_attention
    except ImportError:
        raise Absent("reqat_kernels.native has no attention.") from None
    query, key, value = operands(case)
    fmt = get_format("NVFP4", element=element, global_scale="row")

    def packed(_: Any) -> Any:
        sides = []
        for kind, states in (("key", key), ("value", value)):
            side = PackedStates.allocate(kind, fmt, case.B, case.G, case.T, case.D)  # type: ignore[arg-type]
            side.append(states, 0)
            sides.append(side)
        return tuple(sides)

    cache = packed(None)
    k, v = (side.dequantize(case.T) for side in cache)

    def verify(y: Tensor) -> None:
        scores, p, out, values = softmax_over(query, k, v)
        share, block = case.H // case.G, fmt.block or 1
        magnitudes = query.double().abs() @ k.double().abs().repeat_interleave(share, 1).transpose(2, 3)
        score_error = (block + case.D / block + 6) * _U * case.D**-0.5 * magnitudes[:, :, 0]
        e = score_error + _U * (scores - scores.amax(-1, keepdim=True)).abs() + 4 * _U
        spread = p[:, :, None] @ values.abs()
        bound = (p * e)[:, :, None] @ values.abs() + (p * e).sum(-1)[..., None, None] * out.abs()
        bound += (min(case.T, 512) + case.T / 512 + 12) * _U * (spread + out.abs())
        within(y, out, bound, "the output")

    bytes_each = sum(side.nbytes for side in cache)
    return _work(case, cache, bytes_each, lambda kv: kv_attention(query, kv[0], kv[1], case.T), verify, packed)


def _triton(case: Case, element: str) -> Work:
    """Our Triton kernel over a cache of one global scale a row, which it filled itself."""
    triton_runs(case.device)
    from reqat_kernels.triton.append import append
    from reqat_kernels.triton.attention import decode_attention
    from reqat_kernels.triton.kv_side import KVSide

    query, key, value = operands(case)
    fmt = get_format("NVFP4", element=element, global_scale="row")

    def packed(_: Any) -> tuple[KVSide, KVSide]:
        sides = [KVSide.allocate(case.B, case.G, case.T, case.D, fmt, device=case.device) for _ in range(2)]
        append(key, value, sides[0], sides[1], 0)
        return sides[0], sides[1]

    cache = packed(None)
    k, v = (side.dequantize(case.T) for side in cache)

    def verify(y: Tensor) -> None:
        for side, states in zip(cache, (key, value), strict=True):
            expected = quantize_dequantize(states.float(), fmt)
            if not torch.equal(side.dequantize(case.T), expected):
                raise Wrong("the cache does not hold the numbers of reqat.formats")
        scores, p, out, values = softmax_over(query, k, v)
        magnitudes = query.double().abs().cpu() @ k.double().abs().cpu().repeat_interleave(
            case.H // case.G, 1
        ).transpose(2, 3)
        e = (case.D + 10) * _U * case.D**-0.5 * magnitudes[:, :, 0]
        e = e + 4 * _U * (scores - scores.amax(-1, keepdim=True)).abs() + 8 * _U
        spread = p[:, :, None] @ values.abs()
        bound = (p * (e + 2.0**-8))[:, :, None] @ values.abs() + (p * e).sum(-1)[..., None, None] * out.abs()
        bound += (case.T + 12) * _U * (spread + out.abs()) + 2.0**-8 * out.abs()
        within(y.cpu(), out, bound, "the output")

    return _work(
        case, cache, sum(side.nbytes for side in cache), lambda kv: decode_attention(query, *kv), verify, packed
    )


def _register_triton() -> None:
    for element in ("E2M1", "E1M2"):

        def make(case: Case, element: str = element) -> Work:
            return _triton(case, element)

        ATTENTION.provider("reqat, Triton", format=f"NVFP4 {element}", devices=("cuda",), ours=True)(make)


_register_triton()


def _register_ours() -> None:
    for element in ("E2M1", "E1M2"):

        def make(case: Case, element: str = element) -> Work:
            return _ours(case, element)

        ATTENTION.provider("reqat", format=f"NVFP4 {element}", ours=True)(make)


_register_ours()
