"""Weights quantized once per optimizer step: the same training, bit for bit, and nothing kept where it must not be."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import reqat.models.linear
from reqat.formats import Format, quantize, quantize_dequantize
from reqat.models import freeze, prepare, quant_linears, weights_quantized_once
from reqat.models.linear import QuantLinear
from reqat.quant import block_hadamard
from reqat_kernels.native import quantize as native
from reqat_kernels.native.library import build

PRECISIONS = ["NVFP4-W4A4KV4", "MXFP4-W4A4:rotation=32", "INT4-row-W4A16"]


def model_of(precision: str = "NVFP4-W4A4KV4", seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=96,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).train()
    prepare(model, precision)
    return model


def steps(
    precision: str, *, once: bool, autocast: bool = True, checkpointing: bool = False, n: int = 2
) -> dict[str, Tensor]:
    """The parameters after ``n`` optimizer steps of two micro-batches each."""
    model = model_of(precision)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    source = torch.Generator().manual_seed(1)
    for _ in range(n):
        with weights_quantized_once(model, enabled=once):
            for _ in range(2):
                ids = torch.randint(0, 40, (2, 12), generator=source)
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                (loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_training_is_the_same_to_the_last_bit(precision: str, autocast: bool, checkpointing: bool) -> None:
    plain = steps(precision, once=False, autocast=autocast, checkpointing=checkpointing)
    kept = steps(precision, once=True, autocast=autocast, checkpointing=checkpointing)
    assert all(torch.equal(plain[name], kept[name]) for name in plain)
    start = dict(model_of(precision).named_parameters())
    assert not torch.equal(plain["model.layers.0.mlp.up_proj.weight"], start["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_is_the_same_without_the_native_library(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process: libraries of matrix products do not promise the same order of sums in another."""
    if native.library() is None:
        pytest.skip("no native library, or REQAT_ISA=torch")
    ours = steps(precision, once=True)
    taken: list[str] = []

    def reference(x: Tensor, fmt: Format, **options: Any) -> Tensor:
        taken.append(fmt.name)
        return quantize_dequantize(x, fmt, **options)

    with monkeypatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        patch.setattr(native, "reference_quantize_dequantize", reference)
        native._call_of.cache_clear()  # it remembers functions of the library
        plain = steps(precision, once=True)
    native._call_of.cache_clear()
    assert taken
    differences = {name: float((ours[name] - plain[name]).abs().max()) for name in ours}
    assert not any(differences.values()), build()


def layer_of(model: LlamaForCausalLM) -> QuantLinear:
    return quant_linears(model)["model.layers.0.mlp.up_proj"]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is quantized, in order."""
    seen: list[str] = []
    original = reqat.quant.fake._quantized

    def count(x: Tensor, fmt: object, g: object, rotation: object, name: str) -> Tensor:
        seen.append(name)
        return original(x, fmt, g, rotation, name)  # type: ignore[arg-type]

    monkeypatch.setattr(reqat.quant.fake, "_quantized", count)
    return seen


def test_once_a_step_and_dropped_after_it(counted: list[str]) -> None:
    model, ids = model_of(), torch.arange(12).view(1, 12)
    for _ in range(2):
        counted.clear()
        with weights_quantized_once(model):
            for _ in range(3):
                model(input_ids=ids, use_cache=False).logits.sum().backward()
            assert all(layer._kept is not None for layer in quant_linears(model).values())
        weights = [name for name in counted if name.endswith(".weight")]
        assert len(weights) == len(set(weights)) == 14
        assert all(layer._kept is None and not layer.keeping for layer in quant_linears(model).values())
    with pytest.raises(RuntimeError, match="stop"), weights_quantized_once(model):  # dropped on errors, too
        model(input_ids=ids, use_cache=False)
        raise RuntimeError("stop")
    assert all(layer._kept is None and not layer.keeping for layer in quant_linears(model).values())
    counted.clear()
    for _ in range(2):
        model(input_ids=ids, use_cache=False)
    assert len([name for name in counted if name.endswith(".weight")]) == 28


@pytest.mark.parametrize("precision", ["NVFP4-W4A4KV4", "MXFP4-W4A4:rotation=32"])
def test_a_changed_weight_is_never_served_stale(precision: str) -> None:
    model = model_of(precision)
    layer = layer_of(model)

    def current() -> Tensor:
        return quantize(layer.rotated_weight(), layer.weight_quantizer.format).dequantize()

    x = torch.eye(64)
    layer.input_quantizer.format, layer.input_quantizer.rotation = None, None
    with weights_quantized_once(model):

        def used() -> Tensor:
            return layer(x).detach().T

        assert torch.equal(used(), current())
        with torch.no_grad():
            layer.weight.mul_(1.5)  # as an optimizer writes
        assert torch.equal(used(), current())
        layer.weight.grad = torch.randn_like(layer.weight)
        torch.optim.AdamW([layer.weight], lr=0.1, fused=False).step()
        assert torch.equal(used(), current())
        layer.weight.data = torch.randn(96, 64)  # memory swapped under the parameter
        assert torch.equal(used(), current())
        layer.weight = torch.nn.Parameter(torch.randn(96, 64))
        assert torch.equal(used(), current())
        layer.weight_quantizer.format = layer.weight_quantizer.format.replace(element="E1M2")
        assert torch.equal(used(), current())
        with torch.no_grad():
            assert torch.equal(layer(x).T, current())
        with torch.inference_mode():
            assert torch.equal(layer(x).T, current())
        layer(x).sum().backward()  # nothing of inference mode was kept


def test_fused_optimizers_write_unseen_so_the_block_ends_before_them() -> None:
    """torch's fused AdamW leaves the version of a parameter as it is. Once it counts, this note may go."""
    model = model_of()
    layer = layer_of(model)
    layer.weight.grad = torch.ones_like(layer.weight)
    version = layer.weight._version
    torch.optim.AdamW([layer.weight], lr=0.1, fused=True).step()
    assert layer.weight._version == version


def test_values_and_gradient_are_those_of_fake_quantization() -> None:
    for precision in ("NVFP4-W4A16", "MXFP4-W4A4:rotation=32"):
        model = model_of(precision)
        layer = layer_of(model)
        with weights_quantized_once(model):
            layer(torch.randn(3, 64))
            kept = layer._quantized_weight()
        upstream = torch.randn_like(kept)
        kept.backward(upstream)
        expected = upstream if layer.rotation is None else block_hadamard(upstream, layer.rotation)
        assert torch.equal(layer.weight.grad, expected)
        assert torch.equal(kept, layer.weight_quantizer(layer.weight))


def test_type_follows_autocast() -> None:
    model = model_of("NVFP4-W4A16")
    layer = layer_of(model)
    with weights_quantized_once(model):
        with torch.autocast("cpu", torch.bfloat16):
            layer(torch.randn(2, 64)).sum().backward()
            assert layer._kept[3].dtype == torch.bfloat16 and layer.weight.grad.dtype == torch.float32
        assert layer(torch.randn(2, 64)).dtype == torch.float32
        assert layer._kept[3].dtype == torch.float32
        layer.double()
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(torch.randn(2, 64, dtype=torch.float64)).dtype == torch.float64


def test_copies_and_pickles_keep_nothing() -> None:
    model = model_of()
    with weights_quantized_once(model):
        model(input_ids=torch.arange(6).view(1, 6), use_cache=False)
        layer = layer_of(model)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert twin._kept is None and not twin.keeping
            assert layer._kept is not None and torch.equal(twin.weight, layer.weight)


def test_frozen_layers_are_left_alone() -> None:
    model = model_of()
    freeze(model)
    ids = torch.arange(6).view(1, 6)
    expected = model(input_ids=ids, use_cache=False).logits
    with weights_quantized_once(model):
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)
        assert layer_of(model)._kept is None
