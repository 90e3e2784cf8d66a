"""compressed-tensors and modelopt: read back by transformers and by our own reader of layouts."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.export import export_model
from reqat.formats import from_layout, input_global_scale
from reqat.methods.transforms import TRANSFORMS
from reqat.models import (
    calibrate_static,
    freeze,
    kv_quantizers,
    load_model,
    prepare,
    quant_linears,
    save_model,
)
from reqat.models.sidecar import Sidecar
from reqat.quant import Precision

Tiny = Callable[..., PreTrainedModel]
Dense = Callable[[PreTrainedModel], dict[str, Tensor]]
LAYOUT = {"NVFP4": "nvfp4-pack-quantized", "NVFP4-4/6": "nvfp4-pack-quantized", "MXFP4": "mxfp4-pack-quantized"}


def of_layer(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): tensor for key, tensor in state.items() if key.startswith(f"{name}.")}


@pytest.mark.parametrize("precision", ["NVFP4-W4A16", "MXFP4-W4A16", "NVFP4-4/6-W4A16"])
@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen2", True), ("qwen3", False)])
def test_transformers_loads_the_weights_that_we_compute_with(
    tiny: Tiny, ids: Tensor, dense: Dense, tmp_path: Path, family: str, tied: bool, precision: str
) -> None:
    model = tiny(family, tie_word_embeddings=tied)
    done = export_model(model, None, tmp_path / "ct", "compressed-tensors", precision=precision)
    assert done.layers == 14 and done.dense == ("lm_head",) and done.notes == ()
    save_model(model, None, tmp_path / "dense", dtype=torch.bfloat16)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    expected = plain(ids).logits
    for name, weight in dense(model).items():
        assert torch.equal(plain.get_submodule(name).weight, weight.to(torch.bfloat16))
    for options in ({}, {"quantization_config": CompressedTensorsConfig(dequantize=True)}):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ct", dtype=torch.bfloat16, **options)
        assert torch.equal(loaded(ids).logits, expected)
        if options:
            for name, weight in plain.state_dict().items():
                assert torch.equal(loaded.state_dict()[name], weight), name


@pytest.mark.parametrize("precision", ["NVFP4-W4A16", "MXFP4-W4A16"])
def test_codes_are_those_of_the_frozen_model(tiny: Tiny, tmp_path: Path, precision: str) -> None:
    export_model(tiny(), None, tmp_path / "ct", "compressed-tensors", precision=precision)
    model = tiny()
    prepare(model, precision)
    freeze(model, share_global_scale=True)
    state = load_file(tmp_path / "ct" / "model.safetensors")
    for name, layer in quant_linears(model).items():
        ours, stored = layer.quantized.pack(), of_layer(state, name)
        assert torch.equal(stored["weight_packed"], ours.packed)
        assert torch.equal(stored["weight_scale"].view(torch.uint8), ours.scales.view(torch.uint8))
        if ours.global_scale is not None:
            assert torch.equal(stored["weight_global_scale"], ours.global_scale.reshape(1))
    folder = tmp_path / "dense"
    save_model(model, None, folder)
    again = load_model(folder)  # codes that were frozen before are written as they are
    export_model(again, None, tmp_path / "again", "compressed-tensors")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "ct" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_shared_scales_round_again_are_named(tiny: Tiny, tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny()
    prepare(model, "NVFP4-W4A16")
    save_model(freeze(model), None, tmp_path / "dense", dtype=dtype)
    for sidecar in (tmp_path / "dense").glob("reqat.*"):  # dense weights on grids of their own, as released ones
        sidecar.unlink()
    file = tmp_path / "dense" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in config.items() if name != "quantization_config"}))
    before = load_model(tmp_path / "dense").state_dict()
    with pytest.warns(UserWarning, match="rounded again"):
        done = export_model(
            load_model(tmp_path / "dense"), None, tmp_path / "ct", "compressed-tensors", precision="NVFP4-W4A16"
        )
    written, changes = load_file(tmp_path / "ct" / "model.safetensors"), {}
    for name in quant_linears(model):
        weight = before[f"{name}.weight"]
        now = from_layout(of_layer(written, name), LAYOUT["NVFP4"]).dequantize(torch.float32)
        changes[name] = float((now - weight).norm() / weight.norm())
    most = max(changes, key=lambda name: changes[name])
    assert changes[most] > 0.02 and f"{most} most, by {changes[most]:.2%}" in done.notes[0]
    with warnings.catch_warnings():  # each keeps its scale there
        warnings.simplefilter("error")
        export_model(load_model(tmp_path / "dense"), None, tmp_path / "ours", "reqat", precision="NVFP4-W4A16")


@pytest.mark.parametrize("format", ["compressed-tensors", "modelopt"])
def test_inputs_share_the_models_static_scale(tiny: Tiny, ids: Tensor, tmp_path: Path, format: str) -> None:
    model = tiny("qwen2")
    prepare(model, "NVFP4-W4A4", global_scale="static")
    calibrate_static(model, [ids])
    export_model(model, None, tmp_path / "out", format)
    state = load_file(tmp_path / "out" / "model.safetensors")
    layout = LAYOUT["NVFP4"] if format == "compressed-tensors" else format
    for name, layer in quant_linears(model).items():
        tensors = of_layer(state, name)
        read = from_layout(tensors, layout)
        assert torch.equal(read.codes, layer.quantized.codes)
        assert torch.equal(read.scales.view(torch.uint8), layer.quantized.scales.view(torch.uint8))
        found = input_global_scale(tensors, layout)
        assert found is not None
        torch.testing.assert_close(found, layer.input_quantizer.global_scale, rtol=2**-23, atol=0)
        torch.testing.assert_close(read.global_scale, layer.quantized.global_scale, rtol=2**-23, atol=0)
    second = "weight_scale_2" if format == "modelopt" else "weight_global_scale"
    inputs = "input_scale" if format == "modelopt" else "input_global_scale"
    for layer_name in ("model.layers.0", "model.layers.1"):
        for group in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            for part in (second, inputs):
                assert len({float(state[f"{layer_name}.{name}.{part}"]) for name in group}) == 1
    if format == "compressed-tensors":
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
        assert bool(torch.isfinite(loaded(ids).logits).all())


def test_scales_of_inputs_come_from_the_model_else_from_data_else_it_is_refused(
    tiny: Tiny, ids: Tensor, tmp_path: Path
) -> None:
    with pytest.raises(ReqatError, match="--calibration"):
        export_model(tiny(), None, tmp_path / "a", "compressed-tensors", precision="NVFP4-W4A4")
    assert not (tmp_path / "a").exists()
    export_model(tiny(), None, tmp_path / "a", "compressed-tensors", precision="NVFP4-W4A4", calibration=[ids])
    model = tiny()
    prepare(model, "NVFP4-W4A4:global_scale=static")
    calibrate_static(model, [ids])
    save_model(model, None, tmp_path / "static")
    export_model(load_model(tmp_path / "static"), None, tmp_path / "b", "compressed-tensors", calibration=[ids[:1] * 0])
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert list(a) == list(b)
    for name, tensor in a.items():
        assert torch.equal(tensor.view(torch.uint8), b[name].view(torch.uint8)), name
    # MXFP4 scales inputs block by block: nothing is to be measured, and engines have a rule of their own.
    with pytest.warns(UserWarning, match="scale_rule"):
        export_model(tiny(), None, tmp_path / "c", "compressed-tensors", precision="MXFP4-W4A4")


@pytest.mark.parametrize(("format", "shards"), [("compressed-tensors", True), ("modelopt", False)])
def test_the_index_lists_every_tensor(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, shards: bool
) -> None:
    if shards:
        monkeypatch.setattr("reqat.export._huggingface._SHARD", 20_000)
    export_model(tiny(), None, tmp_path / "out", format, precision="NVFP4-W4A16", skip=["*.layers.1.*"])
    files = [file for file in (tmp_path / "out").glob("*.safetensors") if not file.name.startswith("reqat")]
    assert (len(files) > 2) == shards
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            found |= dict.fromkeys(tensors.keys(), file.name)
    assert json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"] == found
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    ignored = config["quantization_config"]["ignore"]
    assert len(ignored) == 8 and "lm_head" in ignored and "model.layers.1.mlp.up_proj" in ignored
    if format == "modelopt":
        described = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
        assert described["quant_algo"] == "W4A16_NVFP4" and described["exclude_modules"] == ignored
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
        assert torch.equal(
            loaded.model.layers[1].mlp.up_proj.weight, tiny().model.layers[1].mlp.up_proj.weight.bfloat16()
        )


def test_what_the_cache_needs_is_in_the_sidecar_and_named(tiny: Tiny, ids: Tensor, tmp_path: Path) -> None:
    model = tiny("qwen2")
    prepare(model, "NVFP4-W4A4KV4", kv_element="E1M2", global_scale="static")
    for kv in kv_quantizers(model):
        kv.set_shift(torch.randn(kv.shape))
    calibrate_static(model, [ids])
    with pytest.warns(UserWarning, match="shift"):
        done = export_model(model, None, tmp_path / "out", "compressed-tensors")
    assert len(done.notes) == 1 and "E1M2" in done.notes[0]
    sidecar = Sidecar.read(tmp_path / "out")
    assert sidecar is not None and sidecar.precision == done.precision and not sidecar.weights
    for index, kv in enumerate(kv_quantizers(model)):
        assert torch.equal(sidecar.tensors[f"layers.{index}.kv_shift"], kv.shift)
        assert torch.equal(sidecar.tensors[f"layers.{index}.keys_global_scale"], kv.key.global_scale.reshape(1))


@pytest.mark.parametrize("element", ["E2M1", "E1M2"])
def test_modelopt_says_nvfp4_keys_and_values_and_no_others(
    tiny: Tiny, ids: Tensor, tmp_path: Path, element: str
) -> None:
    model = tiny()
    prepare(model, "NVFP4-W4A4KV4", kv_element=element, global_scale="static")
    calibrate_static(model, [ids])
    with warnings.catch_warnings():
        warnings.simplefilter("error" if element == "E2M1" else "ignore", UserWarning)
        export_model(model, None, tmp_path / "out", "modelopt")
    described = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    state = load_file(tmp_path / "out" / "model.safetensors")
    names = [name for name in state if name.endswith(("k_scale", "v_scale"))]
    assert described["kv_cache_quant_algo"] == ("NVFP4" if element == "E2M1" else None)
    assert len(names) == (4 if element == "E2M1" else 0)


def test_modelopts_cache_scales_are_the_largest_magnitude_over_6_times_448(
    tiny: Tiny, ids: Tensor, tmp_path: Path
) -> None:
    # ModelOpt's export: amax / maxbound, where the maxbound of KV_CACHE_NVFP4 is 6 * 448 (unified_export_hf).
    model = tiny()
    prepare(model, "NVFP4-W4A4KV4", global_scale="static")
    calibrate_static(model, [ids])
    for kv in kv_quantizers(model):
        for quantizer, amax in ((kv.key, 13.44), (kv.value, 2.688)):
            quantizer.amax = torch.tensor(amax)
            quantizer.set_from_amax()
    export_model(model, None, tmp_path / "out", "modelopt")
    state = load_file(tmp_path / "out" / "model.safetensors")
    for index in range(2):
        attention = f"model.layers.{index}.self_attn"
        torch.testing.assert_close(state[f"{attention}.k_proj.k_scale"], torch.tensor(0.005))
        torch.testing.assert_close(state[f"{attention}.v_proj.v_scale"], torch.tensor(0.001))


def test_qfits_scale_is_in_the_weights(tiny: Tiny, ids: Tensor, tmp_path: Path) -> None:
    model = tiny("qwen2")
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    precision = Precision.parse("NVFP4-W4A4KV4", kv_element="E1M2", global_scale="dynamic")
    TRANSFORMS["qfit"].apply(model, precision, ids, grid=3, progress=False)
    fitted = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    with pytest.warns(UserWarning, match="shift"):
        export_model(
            model, None, tmp_path / "out", "compressed-tensors", precision="NVFP4-W4A4KV4", kv_element="E1M2",
            calibration=[ids],
        )  # fmt: skip
    tensors = of_layer(load_file(tmp_path / "out" / "model.safetensors"), "model.layers.0.self_attn.q_proj")
    weight = from_layout(tensors, LAYOUT["NVFP4"]).dequantize(torch.float32)
    error = [float((weight - w).norm() / w.norm()) for w in (fitted, before)]
    assert error[0] < 0.12 and (torch.equal(fitted, before) or error[1] > error[0])
