"""Weights quantized once per optimizer step: the same training, bit for bit, and nothing kept where it must not be."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import reqat.models.linear
from reqat.formats import quantize
from reqat.models import freeze, prepare, quant_linears, weights_quantized_once
from reqat.models.linear import QuantLinear
from reqat.quant import block_hadamard

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


@pytest.mark.slow
def test_training_is_the_same_without_the_native_library(tmp_path: Path) -> None:
    script = (
        "import importlib.util, sys, torch\n"
        f"spec = importlib.util.spec_from_file_location('once', {__file__!r})\n"
        "once = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(once)\n"
        "torch.set_num_threads(1)\n"
        "torch.save({p: once.steps(p, once=True) for p in once.PRECISIONS}, sys.argv[1])\n"
    )
    path = tmp_path / "weights.pt"
    environment = {**os.environ, "REQAT_ISA": "torch", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script, str(path)], env=environment, check=True)
    torch.set_num_threads(1)
    for precision, other in torch.load(path).items():
        ours = steps(precision, once=True)
        assert all(torch.equal(ours[name], other[name]) for name in ours), precision


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
