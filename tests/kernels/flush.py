"""Digests of everything that must not depend on how a CPU takes subnormal numbers; run by test_flush_mode.py.

``flush.py on|off|helpers THREADS``: subnormals flushed to zero, or kept, or flushed by torch's own threads alone.
Prints one line a case: its name and a digest of the bits of its results.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import reqat
from reqat.quant import block_hadamard
from reqat_kernels.native import attention, dense, gemm, int8, table
from reqat_kernels.native import quantize as native

MODE, THREADS = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)

FORMATS = [
    *((name, {"global_scale": g}) for name in ("NVFP4", "NVFP4-4/6") for g in ("dynamic", "row")),
    ("NVFP4", {"scale_rule": "multiply"}),
    ("NVFP4", {"scale_rule": "reciprocal"}),
    *(("MXFP4", {"scale_rule": rule}) for rule in ("ceil", "floor", "even")),
    ("AMXFP4", {}),
    ("INT4-g128", {}),
    ("INT4-row", {}),
]


def inputs() -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 1024, generator=generator)
    # Rows of all magnitudes that float32 has, down to the last subnormal, and blocks of different ones side by side.
    exponents = torch.linspace(-149, 100, 64).round().int()
    yield "rows", torch.ldexp(x.double(), exponents[:, None]).float()
    blocks = torch.randint(-140, -90, (64, 64), generator=generator)
    yield "blocks", torch.ldexp(x.double(), blocks.repeat_interleave(16, 1)).float()
    yield (
        "subnormal",
        torch.randint(-(1 << 20), 1 << 20, (64, 1024), generator=generator).double().mul(2.0**-149).float(),
    )


def bits(t: Tensor | None) -> bytes:
    if t is None:
        return b"none"
    return t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def half(x: Tensor) -> Tensor:
    return (x * 2.0**70).clamp(-6e4, 6e4).half()  # its subnormals are others


Case = tuple[str, Callable[[], tuple[Tensor | None, ...]]]


def formats(what: str, x: Tensor) -> Iterator[Case]:
    for y in (x, x.bfloat16(), x.double(), half(x)) if what == "rows" else (x,):
        for name, options in FORMATS:
            fmt = reqat.get_format(name, **options)

            def case(y: Tensor = y, fmt: reqat.Format = fmt) -> tuple[Tensor | None, ...]:
                q, packed = reqat.quantize(y, fmt), native.quantize_packed(y, fmt)
                both = reqat.quantize_dequantize(y, fmt), native.fake_quantize(y, fmt)
                parts = packed.packed, packed.scales, packed.global_scale
                return q.codes, q.scales, q.global_scale, q.block_scales(), q.dequantize(), *both, *parts

            yield f"{what} {name} {'-'.join(options.values())} {y.dtype}", case


def products(what: str, x: Tensor) -> Iterator[Case]:
    for name in ("NVFP4", "NVFP4-4/6", "MXFP4"):
        fmt = reqat.get_format(name, global_scale="row" if name != "MXFP4" else None)
        for factor in (1.0, 2.0**-100):  # the global scale of the second is beyond 2^126
            q = reqat.quantize(x[:48].clamp(-1, 1) * factor, name)
            for rows in (1, 5, 33):
                some, narrow = x[-rows:], x[-rows:].bfloat16()

                def case(
                    q: reqat.QuantizedTensor = q, fmt: reqat.Format = fmt, some: Tensor = some, narrow: Tensor = narrow
                ) -> tuple[Tensor | None, ...]:
                    w = gemm.pack_weight(q)
                    outs = [gemm.linear(some, w, x[0, :48], inputs=kind) for kind in (None, "A8", fmt)]
                    return *outs, gemm.linear(narrow, w), w.dequantize()

                yield f"linear {what} {name} {factor} {rows}", case
    yield f"rotation {what}", lambda: (block_hadamard(x, 32),)
    weight = x[:40].bfloat16()
    yield f"dense {what}", lambda: (dense.dense_bf16(x[:3], weight),)
    eight = reqat.quantize(x[:40], "INT8-row")

    def rounded() -> tuple[Tensor | None, ...]:
        w = int8.pack_int8(eight)
        products = [int8.linear_int8(x[:rows], w, inputs=kind) for rows in (3, 12) for kind in (None, "A8")]
        return *products, w.rows_at(torch.tensor([0, 39]))

    yield f"int8 {what}", rounded
    tables = torch.tensor([2e-38]), torch.tensor([1e-3, 1.0]), torch.tensor([0.0, -1e-38])
    small = x * 1e-38  # now, before the mode is set
    yield f"table {what}", lambda: (table.piecewise_linear(small, *tables),)


def cache(what: str, x: Tensor) -> Iterator[Case]:
    states = x[:, :512].reshape(2, 4, 128, 32)
    shift, query = states[0, :, 0].clone(), torch.ldexp(states[:, :, :3].sign(), torch.tensor(90))
    tokens = [(states[:, :, :120], shift), (states[:, :, 120:125].bfloat16(), None)]
    tokens.append((states[:, :, 125:].double(), shift.double()))
    for name in ("NVFP4", "MXFP4"):
        for g in ("row", "dynamic") if name == "NVFP4" else (None,):
            fmt = reqat.get_format(name, global_scale=g)

            def case(fmt: reqat.Format = fmt) -> tuple[Tensor | None, ...]:
                sides = [attention.PackedStates.allocate(kind, fmt, 2, 4, 130, 32) for kind in ("key", "value")]
                for side in sides:
                    start = 0
                    for new, subtracted in tokens:
                        side.append(new, start, shift=subtracted)
                        start += new.shape[2]
                out = attention.kv_attention(query, sides[0], sides[1], 128, scaling=2.0**-20)
                parts = [part for side in sides for part in (side.codes, side.scales, side.global_scale)]
                return *parts, out, *(side.dequantize(128) for side in sides)

            yield f"cache {what} {name} {g}", case


def main() -> None:
    cases = [case for what, x in inputs() for make in (formats, products, cache) for case in make(what, x)]
    smallest = torch.full((1 << 17,), 2.0**-126)
    torch.set_flush_denormal(MODE == "helpers")  # they take the mode of the thread that starts them, and keep it
    torch.set_num_threads(THREADS)
    assert bool((smallest * 0.5).view(torch.int32)[-1]) == (MODE != "helpers")
    torch.set_flush_denormal(MODE == "on")
    for name, compute in cases:
        results = compute()
        print(name, hashlib.sha256(b"|".join(map(bits, results))).hexdigest()[:16])
        flushed = not bool((smallest[:4] * 0.5).view(torch.int32).any())
        assert flushed == (MODE == "on"), "the caller's mode must come back"


main()
