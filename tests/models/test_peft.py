"""What PEFT does with a model on its own: adapters beside its layers, merged into them or not.

A merge either takes effect, or is refused before anything is lost.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.inference import pack
from reqat.models import freeze, load_model, prepare, quant_linears, save_model

Tiny = Callable[..., PreTrainedModel]
ROTATED = "MXFP4-W4A4"


class LoRA(nn.Module):
    """PEFT's layout: the wrapped layer as ``base_layer``, the adapter beside it."""

    def __init__(self, base: Any, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})

    def forward(self, x: Tensor) -> Any:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))

    def delta(self) -> Tensor:
        return self.lora_B["default"].weight @ self.lora_A["default"].weight


class ModulesToSave(nn.Module):
    """PEFT's ``modules_to_save``: the original beside the copy that is trained."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.original_module = base
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(base)})
        self.in_features, self.out_features = base.in_features, base.out_features

    def forward(self, x: Tensor) -> Any:
        return self.modules_to_save["default"](x)


def wrap(model: Any) -> PreTrainedModel:
    torch.manual_seed(3)
    for layer in model.model.layers:
        layer.self_attn.q_proj = LoRA(layer.self_attn.q_proj)
        layer.self_attn.v_proj = LoRA(layer.self_attn.v_proj)
        layer.mlp.down_proj = ModulesToSave(layer.mlp.down_proj)
    return model


def test_adapters_are_left_as_they_are_and_named(tiny: Tiny, tmp_path: Path, ids: Tensor) -> None:
    first = wrap(tiny("llama"))
    report = prepare(first, "NVFP4-W4A4", skip=["model.layers.1.self_attn.v_proj"])
    assert len(report.quantized) == 2 * 7 - 1
    for layer in first.model.layers:
        assert type(layer.self_attn.q_proj.lora_A["default"]) is nn.Linear
        assert type(layer.mlp.down_proj.modules_to_save["default"]) is nn.Linear
    reasons = {entry.name: entry.reason for entry in report.skipped}
    assert "adapters" in reasons["model.layers.0.self_attn.q_proj.lora_A.default"]
    assert "adapters" in reasons["model.layers.1.mlp.down_proj.modules_to_save.default"]
    # Prepared first and wrapped then, which is PEFT's own order, is the same model.
    second = tiny("llama")
    prepare(second, "NVFP4-W4A4", skip=["model.layers.1.self_attn.v_proj"])
    for layer in wrap(second).model.layers:
        trained = layer.mlp.down_proj.modules_to_save["default"]
        layer.mlp.down_proj.modules_to_save["default"] = plain = nn.Linear(96, 64, bias=False)
        plain.weight.data = trained.weight.data
    assert torch.equal(first(ids).logits, second(ids).logits)
    for model in (first, second):
        with pytest.raises(ReqatError, match="holds adapters.*merge"):
            model.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_lora_merged_into_a_prepared_layer_takes_effect(tiny: Tiny, tmp_path: Path, ids: Tensor) -> None:
    model = tiny("llama")
    prepare(model, ROTATED)
    before = model(ids).logits
    for layer in wrap(model).model.layers:
        for name in ("q_proj", "v_proj"):  # as merge_and_unload does
            lora = getattr(layer.self_attn, name)
            lora.base_layer.weight.data += lora.delta()
            setattr(layer.self_attn, name, lora.base_layer)
        layer.mlp.down_proj = layer.mlp.down_proj.original_module
    merged = model(ids).logits
    assert not torch.equal(merged, before)
    model.save_pretrained(tmp_path / "m")
    again = load_model(tmp_path / "m")
    prepare(again, ROTATED)
    assert torch.equal(again(ids).logits, merged)
    assert torch.equal(freeze(model)(ids).logits, merged)


@pytest.mark.parametrize("name", [ROTATED, "NVFP4-W4A16", "MXFP4-W16A4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_merged_into_a_frozen_layer_is_refused(
    tiny: Tiny, tmp_path: Path, ids: Tensor, name: str, dtype: torch.dtype
) -> None:
    model = tiny("llama").to(dtype)
    prepare(model, name, rotation=None if name.startswith("NVFP4") else 32)
    freeze(model).to(torch.float32)  # a conversion is no change
    model(ids)
    model.save_pretrained(tmp_path / "before")
    lora = LoRA(model.model.layers[1].self_attn.v_proj)
    lora.base_layer.weight.data += lora.delta()
    for use in (
        lambda: model(ids),
        lambda: model.save_pretrained(tmp_path / "m"),
        lambda: save_model(model, None, tmp_path / "m"),
        lambda: model.state_dict(),
        lambda: pack(model) if name != "MXFP4-W16A4" else model(ids),
        lambda: model.to(torch.bfloat16),
    ):
        with pytest.raises(ReqatError, match=r"layers\.1\.self_attn\.v_proj.*frozen.*before freeze"):
            use()
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("name", [ROTATED, "NVFP4-W4A16"])
@pytest.mark.parametrize("where", ["file", "memory"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_merged_beside_stored_codes_is_refused(
    tiny: Tiny, tmp_path: Path, name: str, where: str, dtype: torch.dtype
) -> None:
    """Loaded by plain transformers, merged and saved over the folder, the codes beside it would undo the merge."""
    model = tiny("llama")
    prepare(model, name)
    save_model(freeze(model), None, tmp_path / "m", dtype=dtype)
    file, key = tmp_path / "m/model.safetensors", "model.layers.1.mlp.up_proj.weight"
    loaded = load_model(tmp_path / "m", dtype=torch.bfloat16)
    prepare(loaded, name)  # another dtype is no change
    if where == "file":
        tensors = load_file(file)
        tensors[key] = (tensors[key].float() + 1e-2 * torch.randn(96, 64)).to(dtype)
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(ReqatError, match=f"{key}.*reqat.json"):
            load_model(tmp_path / "m")
        about = json.loads((tmp_path / "m/reqat.json").read_text())  # without digests, as earlier versions wrote it
        about = {entry: value for entry, value in about.items() if entry not in ("digest", "tensors_sha256")}
        for layer in about["quantized"].values():
            del layer["dense_sha256"]
        (tmp_path / "m/reqat.json").write_text(json.dumps(about))
        loaded = load_model(tmp_path / "m")
    else:
        loaded = load_model(tmp_path / "m")
        loaded.get_parameter(key).data += 1e-2 * torch.randn(96, 64)
        with pytest.raises(ReqatError, match=key):
            loaded.save_pretrained(tmp_path / "other")
    with pytest.raises(ReqatError, match=f"{key}.*reqat.json"):
        prepare(loaded, name)
    assert not quant_linears(loaded)
