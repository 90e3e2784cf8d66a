"""Without triton, or without a device for it, the package imports and a call says what to do."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

CALLS = """
import torch
from reqat.formats import quantize as reference
from reqat_kernels.triton import elements, gemm, gemv, naive, quantize, runtime

packed = reference(torch.ones(2, 32), "MXFP4").pack()
print(runtime.status())
for call in (
    lambda: quantize.quantize(torch.ones(2, 32), "MXFP4"),
    lambda: gemm.linear_w4a16(torch.ones(2, 32), packed),
    lambda: gemm.linear_w4a4(packed, packed),
    lambda: gemv.gemv_w4a4(packed, packed),
):
    try:
        call()
    except (ImportError, ValueError) as error:
        print(type(error).__name__, error)
"""


def test_without_triton():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = "import sys\nsys.modules['triton'] = None\n" + CALLS
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    status, *errors = done.stdout.splitlines()
    assert status.startswith("Triton kernels: none")
    assert len(errors) == 4 and all("ImportError" in line and "pip install 'reqat[kernels]'" in line for line in errors)


def test_on_a_cpu_without_the_interpreter(monkeypatch):
    runtime = pytest.importorskip("reqat_kernels.triton.runtime")
    if not runtime.AVAILABLE:
        pytest.skip("triton is not installed")
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    with pytest.raises(ValueError, match="CUDA.*cpu.*TRITON_INTERPRET=1"):
        runtime.require(torch.ones(1), None)
    assert runtime.status().startswith("Triton kernels: ")
    assert runtime.capability(torch.ones(1)) == 0


def test_tensors_on_several_devices():
    runtime = pytest.importorskip("reqat_kernels.triton.runtime")
    if not runtime.AVAILABLE:
        pytest.skip("triton is not installed")
    with pytest.raises(ValueError, match="several devices .*move them to one"):
        runtime.require(torch.ones(1), torch.ones(1, device="meta"))
