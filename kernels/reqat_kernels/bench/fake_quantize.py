"""Fake quantization, ``x [M, K]`` float32 to four bits and back: what every QAT step does to weights and inputs.

The measure is memory: a result needs one read and one write (the row ``copy``), so a time is worth stating as a
multiple of that. Whoever finds a scale for the whole tensor (NVFP4) has to read twice.

Checks: ours and the copy must be right to the last bit. A peer rounds its scales by its own rule; it is held against
``reqat.formats`` with that rule, up to two units in the last place of float32 (it may multiply by a reciprocal where
the reference divides) and, since such a last bit decides ties, but for one element in ten thousand.

Run alone: ``python -m reqat_kernels.bench.fake_quantize [M [rounds]]`` prints the rows as CSV.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from reqat.formats import quantize_dequantize
from reqat_kernels.bench.measure import Absent, Case, Kernel, Needs, Work, Wrong, against_roofline, triton_runs
from reqat_kernels.bench.turns import Roofline, measure
from reqat_kernels.native.library import library
from reqat_kernels.native.quantize import fake_quantize

SEED = 7
_TIES = 1e-4  # share of elements that may differ where a peer's last bit decides a tie


def _needs(case: Case) -> Needs:
    """A tensor, what it should become, and what is being made of it; rounding by operations holds many in passing."""
    tensor = 4 * case.M * case.K
    return Needs(held=4 * tensor, passing=24 * tensor, copy=tensor)


FAKE_QUANTIZE = Kernel("fake_quantize", _needs)


def cases(sizes: Iterable[int], *, device: str | None = None, ring_bytes: int = 0) -> list[Case]:
    """A square tensor of each size, on ``device`` or on every one that this machine has."""
    asked = [Case("fake_quantize", (("M", size), ("K", size)), ring_bytes=ring_bytes) for size in sizes]
    return [found for case in asked for found in case.on(device)]


def operand(case: Case) -> Tensor:
    """The tensor ``x_MK``: normal numbers, as weights at the start of training are."""
    return torch.randn(case.M, case.K, generator=torch.Generator().manual_seed(SEED)).to(case.device)


def _work(case: Case, call: Callable[[Tensor], Any], expected: Tensor, exact: bool = False) -> Work:
    x = operand(case)
    ring = [x, *(x.clone() for _ in range(case.copies(x.nbytes) - 1))]

    def check() -> None:
        y = call(x)
        if exact and not torch.equal(y, expected):
            raise Wrong(f"{int((y != expected).sum())} of {y.numel()} elements differ from reqat.formats")
        wrong = float(((y - expected).abs() > 2.0**-22 * expected.abs()).float().mean())
        if not wrong <= _TIES:
            raise Wrong(f"{wrong:.2%} of the elements differ from reqat.formats with the same rule")

    return Work(
        run=lambda i: call(ring[i]),
        copies=len(ring),
        bytes_moved=2 * x.nbytes,
        check=check,
        ring_bytes=len(ring) * x.nbytes,
    )


@FAKE_QUANTIZE.provider("copy", format="FP32", devices=("cpu", "cuda"))
def copy(case: Case) -> Work:
    """The floor: one read and one write, into memory that is there already."""
    x = operand(case)
    out = torch.empty_like(x)
    return _work(case, out.copy_, x, exact=True)


def _ours(name: str) -> None:
    @FAKE_QUANTIZE.provider("reqat", format=name, ours=True)
    def native(case: Case) -> Work:
        if library() is None:
            raise Absent("the native library is not built, or REQAT_ISA=torch.")
        return _work(case, lambda x: fake_quantize(x, name), quantize_dequantize(operand(case), name), exact=True)

    @FAKE_QUANTIZE.provider("reqat, Triton", format=name, devices=("cuda",), ours=True)
    def triton(case: Case) -> Work:
        triton_runs(case.device)
        from reqat_kernels.triton.quantize import fake_quantize as fused

        # Looking for NaN would make the host wait.
        expected = quantize_dequantize(operand(case), name)
        return _work(case, lambda x: fused(x, name, check=False), expected, exact=True)

    @FAKE_QUANTIZE.provider("reqat.formats, eager", format=name, arithmetic="emulated", devices=("cpu", "cuda"))
    def reference(case: Case) -> Work:
        return _work(case, lambda x: quantize_dequantize(x, name), quantize_dequantize(operand(case), name))


for _name in ("NVFP4", "MXFP4"):
    _ours(_name)


def _torchao(module: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about GPU libraries that it does not find
            return importlib.import_module(f"torchao.prototype.mx_formats.{module}")
    except ImportError as error:
        raise Absent(f"torchao is not installed ({error}).") from None


@FAKE_QUANTIZE.provider("torchao", format="NVFP4", arithmetic="emulated")
def torchao_nvfp4(case: Case) -> Work:
    """torchao's quantization and its tensor's ``dequantize``, g from the tensor at hand."""
    nvfp4 = _torchao("nvfp4_tensor")

    def call(x: Tensor) -> Tensor:
        kept = nvfp4.per_tensor_amax_to_scale(x.abs().amax())
        scales, packed = nvfp4.nvfp4_quantize(x, per_tensor_scale=kept)
        return nvfp4.NVFP4Tensor(packed, scales, 16, x.dtype, kept).dequantize(torch.float32)

    return _work(case, call, quantize_dequantize(operand(case), "NVFP4", scale_rule="reciprocal"))


@FAKE_QUANTIZE.provider("torchao", format="MXFP4", arithmetic="emulated")
def torchao_mxfp4(case: Case) -> Work:
    """torchao's ``to_mx`` and back, scales rounded up."""
    mx, mode = _torchao("mx_tensor"), _torchao("config").ScaleCalculationMode.RCEIL

    def call(x: Tensor) -> Tensor:
        scales, packed = mx.to_mx(x, torch.float4_e2m1fn_x2, 32, mode)
        return mx.to_dtype(packed, scales, torch.float4_e2m1fn_x2, 32, torch.float32)

    return _work(case, call, quantize_dequantize(operand(case), "MXFP4"))


@FAKE_QUANTIZE.provider("by exponents, eager", format="MXFP4", arithmetic="emulated")
def by_exponents(case: Case) -> Work:
    """The way of microxcaling, in our own words: logarithms give the block's exponent and each element's, elements are
    rounded as integers of their own binade, halves away from zero."""

    def call(x: Tensor) -> Tensor:
        blocks = x.unflatten(-1, (-1, 32))
        shared = torch.floor(torch.log2(blocks.abs().amax(-1, keepdim=True).clamp(min=2.0**-126))) - 2
        y = blocks / 2.0**shared
        own = torch.floor(torch.log2(y.abs().clamp(min=1.0)))
        step = 2.0 ** (own - 1)
        rounded = torch.sign(y) * torch.floor(y.abs() / step + 0.5) * step
        return (rounded.clamp(-6.0, 6.0) * 2.0**shared).flatten(-2)

    expected = quantize_dequantize(operand(case), "MXFP4", scale_rule="floor", rounding="away")
    return _work(case, call, expected)


def _magic(x: Tensor) -> Tensor:
    """NVFP4 by adding and subtracting numbers whose unit in the last place is the spacing, as one expression."""
    blocks = x.unflatten(-1, (-1, 16))
    amax = blocks.abs().amax(-1, keepdim=True)
    g = (1.0 / amax.amax()) * 2688.0
    s = (amax / 6.0 * g).clamp(max=448.0)
    binade = (s.view(torch.int32) & 0x7F800000).view(torch.float32).clamp(min=2.0**-6) * 2.0**20
    s = (s + binade) - binade
    scale = torch.where(s == 0, 0.125, s) / g
    y = blocks / scale
    twice = (y.view(torch.int32) & 0x7F800000).view(torch.float32).clamp(1.0, 4.0) * (1.5 * 2.0**22)
    return (((y + twice) - twice).clamp(-6.0, 6.0) * scale).flatten(-2)


@FAKE_QUANTIZE.provider("magic numbers, eager", format="NVFP4", arithmetic="emulated")
def magic(case: Case) -> Work:
    """The same trick as ours, an operation at a time."""
    return _work(case, _magic, quantize_dequantize(operand(case), "NVFP4"))


@FAKE_QUANTIZE.provider("magic numbers, torch.compile", format="NVFP4")
def compiled(case: Case) -> Work:
    """And fused by torch's compiler, which needs a C++ compiler on a CPU."""
    call = torch.compile(_magic, dynamic=False)
    try:
        call(operand(case))
    except Exception as error:  # whatever a compiler can raise
        raise Absent(f"torch.compile failed ({type(error).__name__}).") from None
    return _work(case, call, quantize_dequantize(operand(case), "NVFP4"))


def main(size: int = 2048, rounds: int = 25) -> None:
    """Measure one case and print its rows as CSV, what was skipped or refused to stderr."""
    probe = Roofline()
    result = measure(cases([size], device="cpu")[0], FAKE_QUANTIZE, rounds=rounds, probe=probe)
    probe.stop()
    for line in result.skipped + result.refused:
        print(line, file=sys.stderr)
    rows = [dataclasses.asdict(row) for row in against_roofline(result.rows, probe.best())]
    writer = csv.DictWriter(sys.stdout, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:3]))
