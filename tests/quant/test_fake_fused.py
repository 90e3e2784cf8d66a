"""Fake quantization by Triton's kernel, as training on a GPU takes it: bits, gradients and errors of the reference.

With a CUDA device the tests run on it, by the way that training goes. Without one, CPU tensors are sent that way,
through triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from reqat.formats import Format, get_format, quantize_dequantize
from reqat.quant import block_hadamard, fake, fake_quantize

runtime = pytest.importorskip("reqat_kernels.triton.runtime")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [
    pytest.mark.skipif(
        not runtime.AVAILABLE or (DEVICE.type == "cpu" and not runtime.INTERPRETED),
        reason="no triton, or no CUDA device and triton was imported before TRITON_INTERPRET=1 was set",
    ),
    pytest.mark.filterwarnings("ignore:(divide by zero|overflow|invalid value):RuntimeWarning"),
]

FUSED = {
    "NVFP4": get_format("NVFP4"),
    "NVFP4 row E1M2": get_format("NVFP4", global_scale="row", element="E1M2"),
    "NVFP4 multiply": get_format("NVFP4", scale_rule="multiply"),
    "NVFP4 reciprocal row": get_format("NVFP4", scale_rule="reciprocal", global_scale="row"),
    "MXFP4": get_format("MXFP4"),
    "MXFP4 even E1M2": get_format("MXFP4", scale_rule="even", element="E1M2"),
    "MXFP4 floor": get_format("MXFP4", scale_rule="floor"),
}
EAGER = {
    "NVFP4-4/6": get_format("NVFP4-4/6"),
    "NVFP4 away": get_format("NVFP4", rounding="away"),
    "AMXFP4": get_format("AMXFP4"),
    "INT4-row": get_format("INT4-row"),
}
SHAPES: list[tuple[int, ...]] = [(5, 64), (2, 3, 7, 96), (64,), (1, 256)]


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Send this device's tensors to the kernel; a list of its calls, by format."""
    kernel: Any = fake._triton_kernel()
    fused, calls = kernel.fake_quantize, list[str]()

    def counted(x: Tensor, fmt: Format, **options: Any) -> Tensor:
        calls.append(fmt.name)
        return fused(x, fmt, **options)

    monkeypatch.setattr(kernel, "fake_quantize", counted)
    monkeypatch.setitem(fake.BY_DEVICE, DEVICE.type, fake.on_a_gpu)
    return calls


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (x * torch.exp(2 * x.roll(1, -1))).to(dtype)


@pytest.mark.parametrize("rotation", [None, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_values_and_gradients(
    name: str, dtype: torch.dtype, rotation: int | None, launches: list[str], same_numbers: Any
) -> None:
    for shape in SHAPES:
        x, dy = (randn(*shape, seed=seed, dtype=dtype).to(DEVICE) for seed in (0, 1))
        leaf = x.clone().requires_grad_()
        y = fake_quantize(leaf, FUSED[name], rotation=rotation)
        rotated = x if rotation is None else block_hadamard(x, rotation)
        same_numbers(y, quantize_dequantize(rotated.cpu(), FUSED[name]))
        same_numbers(fake_quantize(x, FUSED[name], rotation=rotation), y)
        y.backward(dy)
        same_numbers(leaf.grad, dy if rotation is None else block_hadamard(dy, rotation))
    assert len(launches) == 2 * len(SHAPES)


@pytest.fixture
def same_numbers() -> Any:
    """Assert equal bits, a zero's sign aside."""

    def check(a: Tensor, b: Tensor) -> None:
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a.cpu(), b.cpu())

    return check


@pytest.mark.parametrize("name", EAGER)
def test_other_formats_go_to_the_reference(name: str, launches: list[str], same_numbers: Any) -> None:
    x = randn(4, 64).to(DEVICE)
    same_numbers(fake_quantize(x, EAGER[name]), quantize_dequantize(x.cpu(), EAGER[name]))
    assert launches == []


@pytest.mark.parametrize("g", [7.5, [[3.0], [700.0], [0.1]]], ids=["one", "a row"])
def test_a_given_global_scale(g: Any, launches: list[str], same_numbers: Any) -> None:
    fmt, scale = get_format("NVFP4", global_scale="static"), torch.tensor(g)
    x = randn(3, 48).to(DEVICE)
    got = fake_quantize(x, fmt, global_scale=scale.to(DEVICE))
    same_numbers(got, quantize_dequantize(x.cpu(), fmt, global_scale=scale))
    keys = randn(3, 5, 2, 32).to(DEVICE).transpose(1, 2)
    if scale.ndim == 0:
        got = fake_quantize(keys, fmt, global_scale=scale.to(DEVICE))
        same_numbers(got, quantize_dequantize(keys.cpu(), fmt, global_scale=scale))
    assert set(launches) == {"NVFP4"}


@pytest.mark.parametrize("fmt", [FUSED["NVFP4"], FUSED["NVFP4 reciprocal row"], FUSED["MXFP4"]], ids=repr)
def test_strides_are_those_of_the_input(fmt: Format, launches: list[str], same_numbers: Any) -> None:
    """Keys seen as [B, H, T, D] and stored as [B, T, H, D] are read as they lie."""
    keys = randn(2, 5, 3, 64).to(DEVICE).transpose(1, 2)
    got = fake_quantize(keys, fmt)
    same_numbers(got, quantize_dequantize(keys.cpu(), fmt))
    assert got.stride() == keys.stride()
    for other in (randn(64, 6).to(DEVICE).T, randn(4, 128).to(DEVICE)[:, ::2]):
        same_numbers(fake_quantize(other, fmt), quantize_dequantize(other.cpu(), fmt))
    assert len(launches) == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["NVFP4", "NVFP4 reciprocal row", "MXFP4"])
def test_errors_are_the_reference_s(name: str, bad: float) -> None:
    x = randn(3, 64).to(DEVICE)
    x[1, 17] = bad
    told = []
    for call in (fake_quantize, quantize_dequantize):
        with pytest.raises(ValueError) as error:
            call(x, FUSED[name], name="up_proj input")
        told.append(str(error.value))
    assert told[0] == told[1] and "up_proj input" in told[0]


def test_other_errors_too() -> None:
    x, static = randn(3, 40).to(DEVICE), get_format("NVFP4", global_scale="static")
    for fmt, g, message in (
        (FUSED["MXFP4"], None, "block of 32"),
        (FUSED["MXFP4"], torch.tensor(2.0), "no global scale"),
        (static, None, "calibrated"),
        (static, torch.tensor(0.0), "finite and above"),
    ):
        with pytest.raises(ValueError, match=message):
            fake_quantize(x[:, :32] if g is not None or fmt is static else x, fmt, global_scale=g)


def test_nothing_to_round(launches: list[str]) -> None:
    for shape in ((0, 64), (3, 0)):
        assert fake_quantize(torch.empty(shape, device=DEVICE), "MXFP4").shape == shape
    assert launches == []


def test_without_triton_the_reference_rounds(monkeypatch: pytest.MonkeyPatch, launches: list[str]) -> None:
    monkeypatch.setattr(fake, "_triton_kernel", lambda: None)
    x = randn(4, 64).to(DEVICE)
    assert torch.equal(fake_quantize(x, "NVFP4").cpu(), quantize_dequantize(x.cpu(), "NVFP4"))
    assert launches == []
