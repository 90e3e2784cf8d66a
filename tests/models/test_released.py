"""Checkpoints as ReQAT's authors released them: dense fake-quantized weights, a key, and a shift in every layer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.evaluation.loading import load_at
from reqat.hf import ReqatConfig
from reqat.models import kv_quantizers, load_model, precision_of, prepare, save_model
from reqat.quant import Precision

Tiny = Callable[..., PreTrainedModel]
RELEASED = {"cfg": "nvfp4", "kv_quant": True, "kv_cfg": "nvfp4_e1m2", "shift_k": True}
E1M2 = "NVFP4-W4A4KV4:kv_element=E1M2,global_scale=dynamic"


def release(model: PreTrainedModel, folder: Path, given: Any, *, shift: bool = True) -> dict[int, Tensor]:
    """Write ``folder`` in the released shape; returns the shifts [G, D]."""
    save_model(model, None, folder, dtype=torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["Qwen2FakeQuantizedModelOPTForCausalLM"], "fake_quant_config": given}
    (folder / "config.json").write_text(json.dumps(config))
    state = load_file(folder / "model.safetensors")
    shifts = {i: torch.randn(2, 32, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(2)}
    if shift:
        state |= {f"model.layers.{i}.self_attn.k_shift": s[None, :, None].contiguous() for i, s in shifts.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return {i: s.float() for i, s in shifts.items()}


def test_a_released_folder_becomes_the_model_that_it_describes(tiny: Tiny, ids: Tensor, tmp_path: Path) -> None:
    original = tiny("qwen2")
    shifts = release(original, tmp_path / "r", RELEASED)
    model = load_model(tmp_path / "r")
    assert not hasattr(model.config, "fake_quant_config")
    report = prepare(model, "NVFP4-W4A4KV4")
    assert precision_of(model) == Precision.parse(E1M2) and "2 KV shifts" in report.restored
    for index, kv in enumerate(kv_quantizers(model)):
        assert torch.equal(kv.shift, shifts[index])
    reference = tiny("qwen2")  # the released weights, prepared and shifted by hand
    for parameter in reference.parameters():
        parameter.data = parameter.data.bfloat16().float()
    prepare(reference, E1M2)
    for index, kv in enumerate(kv_quantizers(reference)):
        kv.set_shift(shifts[index])
    for name, parameter in reference.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name]), name
    assert torch.equal(model(ids).logits, reference(ids).logits)
    save_model(model, None, tmp_path / "ours")
    for folder in ("r", "ours"):
        assert precision_of(load_at(tmp_path / folder, None)) == Precision.parse(E1M2)
    again = load_model(tmp_path / "ours")
    prepare(again, "NVFP4-W4A4KV4")
    assert torch.equal(again(ids).logits, reference(ids).logits)


@pytest.mark.parametrize("config", [ReqatConfig(), ReqatConfig("NVFP4-W4A4KV4")])
def test_transformers_loads_it_at_what_it_describes(
    tiny: Tiny, ids: Tensor, tmp_path: Path, config: ReqatConfig
) -> None:
    shifts = release(tiny("qwen2"), tmp_path / "r", RELEASED)
    ours = load_model(tmp_path / "r")
    prepare(ours, "NVFP4-W4A4KV4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "r", quantization_config=config, dtype=torch.float32)
    assert precision_of(model) == Precision.parse(E1M2)
    for index, kv in enumerate(kv_quantizers(model)):
        assert torch.equal(kv.shift, shifts[index])
    assert torch.equal(model(ids).logits, ours(ids).logits)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(again(ids).logits, ours(ids).logits)


@pytest.mark.parametrize(
    ("given", "precision"),
    [
        ({"cfg": "nvfp4", "kv_quant": False}, "NVFP4-W4A4:global_scale=dynamic"),
        ({"cfg": "nvfp4", "kv_quant": True, "shift_k": False}, "NVFP4-W4A4KV4:global_scale=dynamic"),
        ({"cfg": "mxfp4", "kv_quant": False, "kv_cfg": "none"}, "MXFP4-W4A4"),
        ({"cfg": "mxfp4", "kv_quant": True}, "MXFP4-W4A4KV4"),
        ({"cfg": "none", "kv_quant": True, "kv_cfg": "nvfp4_e1m2"}, "NVFP4-KV4:kv_element=E1M2,global_scale=dynamic"),
        ({"cfg": "mxfp4", "kv_quant": True, "kv_cfg": "nvfp4"}, "MXFP4-W4A4+NVFP4-KV4:global_scale=dynamic"),
        ({"cfg": "nvfp4", "disabled_layers_mlp": [1]}, "NVFP4-W4A4:global_scale=dynamic"),
    ],
)
def test_every_value_has_its_precision(tiny: Tiny, tmp_path: Path, given: dict[str, Any], precision: str) -> None:
    release(tiny("qwen2"), tmp_path / "r", given, shift=False)
    model = load_model(tmp_path / "r")
    wanted = Precision.parse(precision)
    report = prepare(model, wanted.name)
    assert precision_of(model) == wanted
    assert len([entry for entry in report.skipped if ".mlp." in entry.name]) >= (
        3 if "disabled_layers_mlp" in given else 0
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (RELEASED | {"cfg": "int4"}, ("cfg", "int4", "nvfp4")),
        (RELEASED | {"cfg": None}, ("cfg",)),
        (RELEASED | {"kv_cfg": "nvfp4_e3m0"}, ("kv_cfg", "nvfp4_e1m2")),
        (RELEASED | {"kv_cfg": "none"}, ("kv_cfg", "kv_quant")),
        (RELEASED | {"shift_k": "true"}, ("shift_k",)),
        (RELEASED | {"shift_k": False}, ("shift_k", "2 tensors")),
        (RELEASED | {"w_bits": 4}, ("w_bits",)),
        (RELEASED | {"down_cfg": "mxfp4"}, ("down_cfg",)),
        (RELEASED | {"disabled_layers": [0]}, ("disabled_layers", "cache")),
        ("nvfp4", ("fake_quant_config",)),
    ],
)
def test_values_that_are_not_known_are_refused(tiny: Tiny, tmp_path: Path, given: Any, words: tuple[str, ...]) -> None:
    release(tiny("qwen2"), tmp_path / "r", given)
    with pytest.raises(ReqatError) as error:
        load_model(tmp_path / "r")
    for word in words:
        assert word in str(error.value)


def test_shifts_that_do_not_fit_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    release(tiny("qwen2"), tmp_path / "r", RELEASED, shift=False)
    with pytest.raises(ReqatError, match="shift_k"):
        load_model(tmp_path / "r")
    for shape in ((1, 2, 1, 16), (2, 32), (1, 4, 1, 32)):
        folder = tmp_path / "-".join(map(str, shape))
        release(tiny("qwen2"), folder, RELEASED, shift=False)
        state = load_file(folder / "model.safetensors")
        state |= {f"model.layers.{i}.self_attn.k_shift": torch.zeros(shape) for i in range(2)}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ReqatError, match="shift"):
            load_model(folder)
