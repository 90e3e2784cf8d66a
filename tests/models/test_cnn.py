"""Convolutional networks: quantized convolutions against torch, the adapter, and costs against torch's own counter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, ResNetForImageClassification
from transformers import ResNetConfig as TransformersConfig

from reqat.config.errors import ReqatError
from reqat.formats import quantize_dequantize
from reqat.methods.pact_sawb import PRECISION, put_in_bits, start_ranges
from reqat.models import freeze, prepare, quant_linears, save_model
from reqat.models.adapters import UnsupportedModelError, adapter_of, blocks_of
from reqat.models.conv import QuantConv2d
from reqat.models.pretrained import plain_state
from reqat.models.resnet import ResNet, ResNetConfig, added, cost, layer_names, usual_widths
from reqat.quant import Quantizer, without_rounding

UNEQUAL = (5, 7, 9, 6, 11, 20, 13)  # stem, then conv1 and conv2 of three blocks


def ours(widths: tuple[int, ...] = (16,), **more: int) -> ResNet:
    torch.manual_seed(0)
    return ResNet(ResNetConfig(8, widths, **{"side": 8, **more})).eval()


def theirs() -> PreTrainedModel:
    torch.manual_seed(0)
    config = TransformersConfig(
        num_channels=1, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], layer_type="basic", num_labels=4
    )
    return ResNetForImageClassification(config).eval()


@pytest.mark.parametrize("make", [ours, theirs])
@pytest.mark.parametrize("precision", ["NVFP4-W4A4", "NVFP4-W4A4:rotation=16"])
def test_without_rounding_a_prepared_model_is_the_original(make, precision: str) -> None:
    model, x = make(), torch.randn(2, 1, 32, 32)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    expected, weights = model(x).logits, {n: t.clone() for n, t in model.state_dict().items()}
    report = prepare(model, precision)
    assert adapter_of(model).kind == "cnn" and report.left == 0 and report.warning is None
    outside = 1  # the first convolution; the classifier is no convolution
    assert len(quant_linears(model)) == len(report.quantized) == len(convolutions) - outside
    assert torch.dist(model(x).logits, expected) > 1e-3
    with without_rounding([m for m in model.modules() if isinstance(m, Quantizer)]):
        torch.testing.assert_close(model(x).logits, expected, rtol=1e-5, atol=1e-5)
    plain = plain_state(model)
    assert plain.keys() == weights.keys() and all(torch.equal(plain[n], t) for n, t in weights.items())


def test_blocks_run_along_channels_and_the_product_is_torchs() -> None:
    model = ours((32,))
    conv = model.blocks[1].conv1  # stride 2
    weight, x = conv.weight.detach().clone(), torch.randn(2, 32, 8, 8)
    prepare(model, "MXFP4-W4A4")
    twin = model.blocks[1].conv1
    assert isinstance(twin, QuantConv2d)
    expected = F.conv2d(
        quantize_dequantize(x, "MXFP4", axis=1), quantize_dequantize(weight, "MXFP4", axis=1), stride=2, padding=1
    )
    torch.testing.assert_close(twin(x), expected, rtol=1e-5, atol=1e-6)
    # A row of a format without blocks is an output channel.
    model = ours((32,))
    prepare(model, "INT4-row-W4A16")
    rows = quantize_dequantize(weight.flatten(1), "INT4-row").view_as(weight)
    torch.testing.assert_close(model.blocks[1].conv1(x), F.conv2d(x, rows, stride=2, padding=1), rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_a_convolution_of_what_was_rounded() -> None:
    model, x = ours(), torch.randn(2, 16, 8, 8, requires_grad=True)
    weight = model.blocks[0].conv1.weight.detach().clone()
    prepare(model, "INT4-tensor-W4A4")
    twin = model.blocks[0].conv1
    y, dy = twin(x), torch.randn(2, 16, 8, 8)
    y.backward(dy)
    inputs, weights = (quantize_dequantize(t.detach(), "INT4-tensor").requires_grad_() for t in (x, weight))
    F.conv2d(inputs, weights, padding=1).backward(dy)
    torch.testing.assert_close(x.grad, inputs.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(twin.as_kernels(twin.weight.grad), weights.grad, rtol=1e-4, atol=1e-4)


def test_what_reads_one_tensor_quantizes_it_once() -> None:
    model = ours()
    prepare(model, PRECISION)
    block = model.blocks[1]
    assert block.conv1.input_quantizer is block.shortcut.input_quantizer
    calls = []
    block.conv1.input_quantizer.gradient.register_forward_hook(lambda *_: calls.append(1))
    model(torch.randn(1, 1, 8, 8))
    assert len(calls) == 1


def test_two_bits_train_freeze_and_come_back(tmp_path: Path) -> None:
    model, x = ours(), torch.randn(4, 1, 8, 8)
    put_in_bits(model)
    start_ranges(model, x)
    levels = {n: float(p.detach()) for n, p in model.named_parameters() if n.endswith("level")}
    assert len(levels) == 6 and all(0 < level < 8 for level in levels.values())  # conv1 and shortcut share one
    F.cross_entropy(model(x).logits, torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    for layer in quant_linears(model).values():
        assert len(layer.weight_quantizer(layer.weight).detach().unique()) == 4
    expected = model(x).logits
    state = model.state_dict()
    assert state["blocks.0.conv1.weight"].shape == (16, 16, 3, 3)
    with pytest.raises(ReqatError, match="state_dict"):
        save_model(model, None, tmp_path / "learned")
    again = ours()
    put_in_bits(again)
    with torch.no_grad():
        again.blocks[0].conv1.weight.zero_()
    again.load_state_dict(state)
    torch.testing.assert_close(again(x).logits, expected, rtol=0, atol=0)
    freeze(model)
    torch.testing.assert_close(model(x).logits, expected, rtol=1e-6, atol=1e-6)
    frozen = model.state_dict()
    assert frozen["blocks.0.conv1.weight"].shape == (16, 16, 3, 3) and "blocks.0.conv1.weight_packed" in frozen
    again.load_state_dict(frozen)
    torch.testing.assert_close(again(x).logits, model(x).logits, rtol=0, atol=0)


def test_a_saved_network_is_the_plain_one_with_codes_beside_it(tmp_path: Path) -> None:
    model, x = ours(UNEQUAL), torch.randn(2, 1, 8, 8)
    prepare(model, "INT4-row-W4A16")
    expected = freeze(model)(x).logits
    save_model(model, None, tmp_path / "m")
    assert load_file(tmp_path / "m" / "model.safetensors")["blocks.1.conv1.weight"].shape == (6, 9, 3, 3)
    again = ResNet.from_pretrained(tmp_path / "m").eval()
    assert again.config.widths == list(UNEQUAL)
    torch.testing.assert_close(again(x).logits, expected, rtol=1e-6, atol=1e-6)


def test_what_cannot_be_quantized_is_refused_by_name() -> None:
    model = ours()
    model.blocks[1].conv2 = nn.Conv2d(32, 32, 3, padding=1, groups=4)
    with pytest.raises(UnsupportedModelError, match=r"blocks\.1\.conv2.*4 groups"):
        blocks_of(model)
    with pytest.raises(ReqatError, match=r"blocks\.0\.conv1.*16 is not divisible.*32"):
        prepare(ours(), "MXFP4-W4A4")
    with pytest.raises(ReqatError, match="no attention"):
        prepare(ours(), "NVFP4-W4A4KV4")


# The networks themselves.


@pytest.mark.parametrize(
    ("depth", "widths", "side"), [(8, (16,), 28), (20, (4,), 28), (8, UNEQUAL, 28), (14, tuple(range(3, 16)), 9)]
)
def test_costs_are_what_torch_counts(depth: int, widths: tuple[int, ...], side: int) -> None:
    model = ResNet(ResNetConfig(depth, widths, side=side)).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1, side, side))
    found = cost(model.config)
    assert counter.get_total_flops() == 2 * found.macs  # a multiplication and an addition each
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert len(layer_names(depth)) == len(model.config.widths) == depth - 1


def test_unequal_channels_are_added_where_both_have_them() -> None:
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    for x, y in ((a, b), (b, a), (a, a)):
        expected = torch.zeros(2, max(x.shape[1], y.shape[1]), 4, 4)
        expected[:, : x.shape[1]] += x
        expected[:, : y.shape[1]] += y
        assert torch.equal(added(x, y), expected)
    assert usual_widths(20, 16) == [16] * 7 + [32] * 6 + [64] * 6


@pytest.mark.parametrize(("depth", "widths"), [(9, (16,)), (2, (16,)), (8, (1, 2, 3)), (8, (0,))])
def test_a_depth_or_widths_of_no_such_network_are_refused(depth: int, widths: tuple[int, ...]) -> None:
    with pytest.raises(ReqatError, match=f"{depth}|widths"):
        ResNetConfig(depth, widths)


@pytest.mark.parametrize(
    ("capability", "width", "left_out"), [("AVX2", 4, True), ("AVX2", 8, False), ("AVX512", 4, False)]
)
def test_onednn_is_left_out_where_it_would_crash(
    monkeypatch: pytest.MonkeyPatch, capability: str, width: int, left_out: bool
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    before = torch.backends.mkldnn.set_flags(True)
    try:
        ResNet(ResNetConfig(8, (width,), side=8))
        assert torch.backends.mkldnn.enabled is not left_out
    finally:
        torch.backends.mkldnn.set_flags(*before[:1])
