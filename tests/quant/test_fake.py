"""Fake quantization: values as in packing, gradients straight through, static scales calibrated."""

from __future__ import annotations

import pytest
import torch

from reqat.formats import get_format, global_scale_for, quantize
from reqat.quant import Quantizer, block_hadamard, calibrating, fake_quantize

STATIC = get_format("NVFP4", global_scale="static")


@pytest.mark.parametrize("name", ["NVFP4", "MXFP4", "NVFP4-4/6", "AMXFP4", "INT4-row"])
@pytest.mark.parametrize("rotation", [None, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_those_of_packing_and_gradients_those_of_the_rotation_alone(
    name: str, rotation: int | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 64, dtype=dtype, requires_grad=True)
    weight = torch.randn(6, 64, dtype=dtype)
    out = fake_quantize(x, name, rotation=rotation)
    rotated = x.detach() if rotation is None else block_hadamard(x.detach(), rotation)
    assert out.dtype == dtype
    assert torch.equal(out, quantize(rotated, name).dequantize())
    assert torch.equal(out, fake_quantize(x.detach(), name, rotation=rotation))

    (out * weight).sum().backward()
    dense = x.detach().clone().requires_grad_()
    ((dense if rotation is None else block_hadamard(dense, rotation)) * weight).sum().backward()
    assert torch.equal(x.grad, dense.grad)


def test_nothing_is_kept_for_the_backward_pass() -> None:
    x = torch.randn(4, 64, requires_grad=True)
    assert fake_quantize(x, "NVFP4").grad_fn.saved_tensors == ()  # type: ignore[union-attr]


def test_bad_numbers_are_named() -> None:
    for bad in (float("nan"), float("inf")):
        x = torch.randn(2, 32)
        x[1, 3] = bad
        quantizer = Quantizer(get_format("NVFP4"), name="model.layers.3.mlp.up_proj input")
        with pytest.raises(ValueError, match="model.layers.3.mlp.up_proj input"):
            quantizer(x)


def test_static_scale_is_the_one_of_everything_seen() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(3, 32) * k for k in (1.0, 5.0, 2.0)]
    quantizer = Quantizer(STATIC, name="q")
    with pytest.raises(ValueError, match="q: .*static.*not calibrated"):
        quantizer(batches[0])
    with calibrating([quantizer]):
        for batch in batches:
            assert torch.equal(quantizer(batch), quantize(batch, "NVFP4").dequantize())  # dynamic meanwhile
    quantizer.set_from_amax()
    expected = global_scale_for(torch.cat(batches), get_format("NVFP4"))
    assert torch.equal(quantizer.global_scale, expected)
    x = torch.randn(3, 32)
    assert torch.equal(quantizer(x), quantize(x, STATIC, global_scale=expected).dequantize())
    assert list(quantizer.state_dict()) == ["global_scale"]  # saved checkpoints have it in the sidecar
    assert torch.equal(quantizer.state_dict()["global_scale"], expected)


def test_observer_sees_the_rotated_tensor() -> None:
    x = torch.zeros(1, 32)
    x[0, 0] = 32.0
    quantizer = Quantizer(STATIC, rotation=32)
    with calibrating([quantizer]):
        quantizer(x)
    assert float(quantizer.amax) == pytest.approx(32.0 / 32**0.5)


def test_calibration_without_data_is_an_error() -> None:
    quantizer = Quantizer(STATIC, name="layer input")
    with calibrating([quantizer]):
        pass
    with pytest.raises(ValueError, match="layer input.*nothing"):
        quantizer.set_from_amax()


def test_without_format_it_is_the_identity_or_the_rotation() -> None:
    x = torch.randn(2, 32)
    assert Quantizer(None)(x) is x
    assert torch.equal(Quantizer(None, rotation=32)(x), block_hadamard(x, 32))
