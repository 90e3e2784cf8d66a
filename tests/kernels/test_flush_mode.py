"""Flushing subnormals to zero, which a process may have switched on, changes no result."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import reqat
from reqat_kernels.native import gemm, instruction_set
from reqat_kernels.native import quantize as native

SCRIPT = Path(__file__).with_name("flush.py")


@pytest.fixture
def flushing() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU has no such mode")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("name", ["NVFP4", "NVFP4-4/6", "MXFP4", "AMXFP4", "INT4-g128"])
def test_formats_keep_subnormals(name: str, flushing: None) -> None:
    torch.set_flush_denormal(False)
    exponents = torch.randint(-145, -118, (4, 8, 1), generator=torch.Generator().manual_seed(0))
    x = torch.ldexp(torch.randn(4, 8, 32, generator=torch.Generator().manual_seed(1)), exponents).view(4, 256)
    w = gemm.pack_weight(reqat.quantize(torch.ones(16, 256), "MXFP4"))

    def results() -> list[torch.Tensor]:
        q = reqat.quantize(x, name)
        packed = native.quantize_packed(x, name)
        parts = [q.codes, q.scales, q.dequantize(), reqat.quantize_dequantize(x, name), packed.packed, packed.scales]
        parts += [native.fake_quantize(x, name), gemm.linear(x, w, inputs=reqat.get_format("MXFP4"))]
        return parts

    expected = results()
    assert bool(expected[2].any()) or name == "AMXFP4"  # numbers that a flush would lose; its scales do not go so low
    torch.set_flush_denormal(True)
    found = results()
    flushed = not bool((torch.full((4,), 2.0**-126) * 0.5).view(torch.int32).any())
    torch.set_flush_denormal(False)
    assert flushed, "the caller's mode must come back"
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def digests(mode: str, isa: str, threads: int) -> list[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if isa != "best":
        environment["REQAT_ISA"] = isa
    done = subprocess.run(
        [sys.executable, str(SCRIPT), mode, str(threads)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["best", *(pytest.param(isa, marks=pytest.mark.long) for isa in ("portable", "torch"))])
def test_no_result_depends_on_the_mode(isa: str, flushing: None) -> None:
    if isa == "portable" and instruction_set() == "torch":
        pytest.skip("needs the native library")
    # torch's own products add in an order that depends on the number of threads.
    threads = 1 if isa == "torch" else 2
    expected = digests("off", isa, threads)
    assert len(expected) > 100
    for mode in ("on", "helpers") if isa == "best" else ("on",):
        assert digests(mode, isa, threads) == expected, mode
