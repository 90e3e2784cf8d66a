"""A sidecar that was damaged, mixed up or edited is refused by name, or gives exactly what was saved.

What is sealed with digests is damaged byte by byte. Folders without digests, as earlier versions wrote them, have every
tensor and every key changed in turn.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from reqat.config.errors import ReqatError
from reqat.formats.stored import JSON, TENSORS, place_of
from reqat.models import (
    calibrate_static,
    carried,
    freeze,
    kv_quantizers,
    leave,
    load_model,
    prepare,
    quant_linears,
    save_model,
)
from reqat.models.sidecar import Sidecar

LAYER = "model.layers.0.mlp.up_proj"


def small(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=24,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=32,
        )
    ).eval()


def frozen(folder: Path, precision: str = "NVFP4-W4A4KV4", seed: int = 0, **options: Any) -> Path:
    """A frozen model with everything that a sidecar can hold."""
    model = small(seed)
    prepare(model, precision, **options)
    for kv in kv_quantizers(model):
        kv.set_shift(torch.full((1, 16), 0.25))
    calibrate_static(model, [torch.arange(20).reshape(2, 10)])
    return save_model(freeze(model), None, folder)


@pytest.fixture(scope="module")
def nvfp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return frozen(tmp_path_factory.mktemp("nvfp4") / "m", global_scale="static")


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return frozen(tmp_path_factory.mktemp("mxfp4") / "m", "MXFP4-W4A16:rotation=32")


@pytest.fixture
def folder(nvfp4: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(nvfp4, tmp_path / "m"))


def content(sidecar: Sidecar | None) -> list[Any]:
    """All that a sidecar says, comparable."""
    assert sidecar is not None
    parts: dict[str, Any] = dict(sidecar.tensors)
    for name, q in sidecar.weights.items():
        parts |= {f"{name} codes": q.codes, f"{name} scales": q.scales.float(), f"{name} g": q.global_scale}
        parts[f"{name} is"] = (q.format, q.axis, tuple(q.shape), q.dtype)
    plain = {key: value.tolist() if isinstance(value, Tensor) else value for key, value in parts.items()}
    return [sidecar.precision, plain]


def unseal(folder: Path, change: Callable[[dict[str, Any]], object] = lambda about: None) -> None:
    """Make reqat.json one of an earlier version, without digests, and ``change`` it."""
    about = json.loads((folder / JSON).read_text())
    for key in ("digest", "tensors_sha256"):
        del about[key]
    for info in about["quantized"].values():
        del info["dense_sha256"]
    change(about)
    (folder / JSON).write_text(json.dumps(about))


def test_a_folder_without_digests_still_loads_to_the_same(folder: Path, nvfp4: Path) -> None:
    unseal(folder)
    assert content(Sidecar.read(folder)) == content(Sidecar.read(nvfp4))


def test_every_flipped_byte_is_found(folder: Path, nvfp4: Path) -> None:
    expected = content(Sidecar.read(nvfp4))
    refused = 0
    for name in (JSON, TENSORS):
        whole = (folder / name).read_bytes()
        for at in range(0, len(whole), max(1, len(whole) // 60)):
            for bit in (0x01, 0x80):
                (folder / name).write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
                try:
                    assert content(Sidecar.read(folder)) == expected, f"{name}, byte {at}"
                except ReqatError as error:
                    assert JSON in str(error) or TENSORS in str(error)
                    refused += 1
        for length in (0, 1, 7, 8, len(whole) // 2, len(whole) - 1):
            (folder / name).write_bytes(whole[:length])
            if whole[:length].rstrip() != whole.rstrip():
                with pytest.raises(ReqatError, match=name):
                    Sidecar.read(folder)
        (folder / name).write_bytes(whole)
    assert refused > 200
    assert content(Sidecar.read(folder)) == expected


def bits(tensor: Tensor, value: int) -> Tensor:
    raw = tensor.clone().view(torch.uint8)
    raw.view(-1)[-1] = value
    return raw.view(tensor.dtype)


# Name -> (the tensor it acts on, what becomes of it; None: it is taken away).
DAMAGE: dict[str, tuple[str, Callable[[Tensor], Tensor | None]]] = {
    "codes missing": (f"{LAYER}.weight_packed", lambda t: None),
    "codes short": (f"{LAYER}.weight_packed", lambda t: t[:, :-1].clone()),
    "codes of fewer rows": (f"{LAYER}.weight_packed", lambda t: t[:-1].clone()),
    "codes flat": (f"{LAYER}.weight_packed", lambda t: t.reshape(-1)),
    "codes signed": (f"{LAYER}.weight_packed", lambda t: t.to(torch.int8)),
    "codes float": (f"{LAYER}.weight_packed", lambda t: t.float()),
    "scales missing": (f"{LAYER}.weight_scale", lambda t: None),
    "scales of one row": (f"{LAYER}.weight_scale", lambda t: t[:1].clone()),
    "scales empty": (f"{LAYER}.weight_scale", lambda t: t[:0].clone()),
    "scales of fewer blocks": (f"{LAYER}.weight_scale", lambda t: t[:, :1].clone()),
    "scales as bytes": (f"{LAYER}.weight_scale", lambda t: t.view(torch.uint8)),
    "scales of the other FP8": (f"{LAYER}.weight_scale", lambda t: t.float().to(torch.float8_e5m2)),
    "scales float": (f"{LAYER}.weight_scale", lambda t: t.float()),
    "a scale NaN": (f"{LAYER}.weight_scale", lambda t: bits(t, 0x7F)),
    "a scale negative": (f"{LAYER}.weight_scale", lambda t: bits(t, 0xB8)),
    "a scale -0": (f"{LAYER}.weight_scale", lambda t: bits(t, 0x80)),
    "global scale missing": (f"{LAYER}.weight_global_scale", lambda t: None),
    "global scale 0": (f"{LAYER}.weight_global_scale", lambda t: t * 0),
    "global scale negative": (f"{LAYER}.weight_global_scale", lambda t: -t),
    "global scale NaN": (f"{LAYER}.weight_global_scale", lambda t: t * torch.nan),
    "global scale infinite": (f"{LAYER}.weight_global_scale", lambda t: t * torch.inf),
    "global scale twice": (f"{LAYER}.weight_global_scale", lambda t: t.repeat(2)),
    "global scale in half": (f"{LAYER}.weight_global_scale", lambda t: t.half()),
    "shift missing": ("layers.0.kv_shift", lambda t: None),
    "shift flat": ("layers.0.kv_shift", lambda t: t.reshape(-1)),
    "shift in half": ("layers.0.kv_shift", lambda t: t.half()),
    "shift NaN": ("layers.0.kv_shift", lambda t: t * torch.nan),
    "shift infinite": ("layers.0.kv_shift", lambda t: t * torch.inf),
    "static scale 0": ("layers.0.keys_global_scale", lambda t: t * 0),
    "static scale negative": ("layers.0.values_global_scale", lambda t: -t),
    "static scale NaN": (f"{LAYER}.input_global_scale", lambda t: t * torch.nan),
    "static scale twice": (f"{LAYER}.input_global_scale", lambda t: t.repeat(2)),
    "static scale in double": (f"{LAYER}.input_global_scale", lambda t: t.double()),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_tensor_without_a_digest_is_refused(what: str, folder: Path) -> None:
    unseal(folder)
    stored = load_file(folder / TENSORS)
    name, change = DAMAGE[what]
    new = change(stored.pop(name))
    if new is not None:
        stored[name] = new.contiguous()
    save_file(stored, folder / TENSORS)
    with pytest.raises(ReqatError, match=rf"{TENSORS}.*(copy|make) the checkpoint"):
        Sidecar.read(folder)


@pytest.mark.parametrize(
    "name",
    ["model.layers.9.mlp.up_proj.weight_packed", "strange", "layers.x.kv_shift", "layers.0.queries_global_scale"],
)
def test_a_tensor_of_no_layer_is_refused(name: str, folder: Path) -> None:
    unseal(folder)
    stored = load_file(folder / TENSORS)
    save_file({**stored, name: torch.ones(1)}, folder / TENSORS)
    with pytest.raises(ReqatError, match=f"{TENSORS}: {name}"):
        Sidecar.read(folder)


def test_nan_of_e8m0_is_refused(mxfp4: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(mxfp4, tmp_path / "m"))
    unseal(folder)
    stored = load_file(folder / TENSORS)
    stored[f"{LAYER}.weight_scale"][0, 0] = 255
    save_file(stored, folder / TENSORS)
    with pytest.raises(ReqatError, match=f"{TENSORS}: .*{LAYER}.*NaN"):
        Sidecar.read(folder)


def of_layer(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda about: about["quantized"][LAYER].update({key: value})


ABOUT: dict[str, Callable[[dict[str, Any]], object]] = {
    "no schema": lambda a: a.pop("schema"),
    "another schema": lambda a: a.update(schema=2),
    "a schema that is true": lambda a: a.update(schema=True),
    "no precision": lambda a: a.pop("precision"),
    "a precision that is a name": lambda a: a.update(precision="NVFP4-W4A4KV4"),
    "a precision without rotation": lambda a: a["precision"].pop("rotation"),
    "a rotation that is a text": lambda a: a["precision"].update(rotation="32"),
    "another family": lambda a: a["precision"]["weights"].update(name="MXFP4"),
    "no weights": lambda a: a["precision"].update(weights=None),
    "an unknown key of a format": lambda a: a["precision"]["weights"].update(blocks=3),
    "weights of a third kind": lambda a: a.update(weights="half"),
    "dense weights with codes": lambda a: a.update(weights="dense"),
    "a list of layers": lambda a: a.update(quantized=[LAYER]),
    "no list of layers": lambda a: a.pop("quantized"),
    "a layer without codes": lambda a: a["quantized"].update(strange={"shape": [32, 32], "dtype": "float32"}),
    "codes without a layer": lambda a: a["quantized"].pop(LAYER),
    "a layer that is null": lambda a: a["quantized"].update({LAYER: None}),
    "a shift that is a number": lambda a: a.update(kv_shift=1),
    "no shift": lambda a: a.update(kv_shift=False),
    "no static scales": lambda a: a.update(static_scales=False),
    "an unknown key": lambda a: a.update(colour="red"),
    "a skip that is a text": lambda a: a.update(skip="model.*"),
    "another shape": of_layer("shape", [16, 64]),
    "a negative shape": of_layer("shape", [-32, 32]),
    "a shape of floats": of_layer("shape", [32.0, 32.0]),
    "no shape": of_layer("shape", []),
    "a dtype that is a function of torch": of_layer("dtype", "load"),
    "a dtype that is none": of_layer("dtype", "int8"),
    "a dtype that is a list": of_layer("dtype", ["float32"]),
}


@pytest.mark.parametrize("what", ABOUT)
def test_a_damaged_description_without_a_digest_is_refused(what: str, folder: Path) -> None:
    unseal(folder, ABOUT[what])
    with pytest.raises(ReqatError, match=r"reqat\.(json|safetensors).*(copy|make) the checkpoint"):
        Sidecar.read(folder)


def test_files_of_two_models_do_not_go_together(folder: Path, tmp_path: Path, mxfp4: Path) -> None:
    other = frozen(tmp_path / "other", global_scale="static", seed=1)
    for source, name in ((other, TENSORS), (other, JSON), (mxfp4, TENSORS), (mxfp4, JSON)):
        mixed = Path(shutil.copytree(folder, tmp_path / "mixed"))
        shutil.copy(source / name, mixed / name)
        with pytest.raises(ReqatError, match=TENSORS):
            Sidecar.read(mixed)
        shutil.rmtree(mixed)
    (folder / JSON).unlink()
    with pytest.raises(ReqatError, match=f"{TENSORS}.*without {JSON}.*delete"):
        load_model(folder)


def test_dense_weights_that_were_changed_after_freezing_are_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    dense = load_file(file)
    with safe_open(file, framework="pt") as tensors:
        metadata = tensors.metadata()
    dense["model.embed_tokens.weight"] += 1  # no codes stand for it
    save_file(dense, file, metadata)
    load_model(folder)
    dense[f"{LAYER}.weight"][0, 0] += 1e-3
    save_file(dense, file, metadata)
    with pytest.raises(ReqatError, match=rf"{LAYER}\.weight was changed .*1 of 7 .*delete {JSON} and {TENSORS}"):
        load_model(folder)
    for name in (JSON, TENSORS):
        (folder / name).unlink()
    assert float(load_model(folder).get_submodule(LAYER).weight.detach()[0, 0]) == float(dense[f"{LAYER}.weight"][0, 0])


def test_weights_in_several_files_are_the_same_weights(folder: Path, nvfp4: Path) -> None:
    dense = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(dense)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: dense[name] for name in part}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    models = [load_model(path) for path in (folder, nvfp4)]
    for model in models:
        prepare(model, "NVFP4-W4A4KV4", global_scale="static")
    ids = torch.arange(8)[None]
    assert torch.equal(models[0](ids).logits, models[1](ids).logits)


def test_a_sidecar_of_another_model_is_refused_where_the_model_is_known(folder: Path, tmp_path: Path) -> None:
    for what, change in {
        "heads": lambda t: t.update({"layers.0.kv_shift": torch.zeros(2, 16)}),
        "layers": lambda t: t.update({"layers.1.kv_shift": torch.zeros(1, 16)}),
        "no such layer": lambda t: t.update({"model.layers.0.mlp.side.input_global_scale": torch.ones(1)}),
    }.items():
        wrong = Path(shutil.copytree(folder, tmp_path / "wrong"))
        unseal(wrong)
        stored = load_file(wrong / TENSORS)
        change(stored)
        save_file(stored, wrong / TENSORS)
        with pytest.raises(ReqatError, match=f"{JSON} is of another model.*{what}"):
            load_model(wrong)
        shutil.rmtree(wrong)


def test_digests_change_nothing_in_what_is_saved_again(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    prepare(model, "NVFP4-W4A4KV4", global_scale="static")
    assert len(quant_linears(model)) == 7
    again = save_model(freeze(model), None, tmp_path / "again")
    for name in (JSON, TENSORS, "model.safetensors"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


UP = "model.layers.0.mlp.up_proj"
UNFIT: dict[str, tuple[dict[str, Tensor], str]] = {
    "unknown name": ({"layers.0.keys_size": torch.ones(2)}, "layers.0.keys_size"),
    "layer": ({"layers.3.keys_clip": torch.ones(2)}, "layers.3.keys_clip"),
    "linear layer": ({"model.layers.0.mlp.side.input_clip": torch.ones(2)}, "side.input_clip"),
    "dtype": ({"layers.0.kv_shift": torch.zeros(1, 16, dtype=torch.float64)}, "kv_shift.*float32"),
    "heads": ({"layers.0.kv_shift": torch.zeros(2, 16)}, r"kv_shift.*\(2, 16\).*\(1, 16\)"),
    "rows": ({f"{UP}.weight_clip": torch.ones(31, 2)}, r"weight_clip.*\(31, 2\).*\(32, 2\)"),
    "a clip of rows": ({f"{UP}.input_clip": torch.ones(32, 2)}, r"input_clip.*\(32, 2\)"),
    "a clip beyond": ({"layers.0.values_clip": torch.tensor([0.5, 1.5])}, "values_clip.*1.5"),
    "a factor": ({f"{UP}.input_left": torch.eye(5)}, rf"{UP}.input.*\(5, 5\).*32"),
    "two factors": ({f"{UP}.input_left": torch.eye(4), f"{UP}.input_right": torch.eye(4)}, rf"{UP}.input.*4 x 4.*32"),
    "keys": ({"layers.0.keys_right": torch.eye(32)}, r"layers.0.keys.*\(32, 32\).*16"),
    "not invertible": ({"layers.0.keys_right": torch.zeros(16, 16)}, "layers.0.keys"),
    "not finite": ({"layers.0.kv_shift": torch.full((1, 16), torch.nan)}, "kv_shift"),
}


@pytest.mark.parametrize("what", UNFIT)
def test_what_does_not_fit_the_model_is_refused_and_nothing_of_it_is_kept(what: str, tmp_path: Path) -> None:
    tensors, says = UNFIT[what]
    model = small()
    leave(model, {"layers.0.keys_clip": torch.full((2,), 0.5)})
    with pytest.raises(ReqatError, match=says):
        leave(model, {f"{UP}.input_clip": torch.full((2,), 0.5), **tensors})
    assert carried(model, "bases", "clips", "kv_shift") == ["layers.0.keys_clip"]
    # The same in a folder, of a version that wrote no digests.
    folder = save_model(model, None, tmp_path / "m")
    unseal(folder)
    stored = load_file(folder / TENSORS)
    save_file({**stored, **tensors}, folder / TENSORS)
    unseal_kinds(folder, [*stored, *tensors])
    with pytest.raises(ReqatError, match=says):
        load_model(folder)


def unseal_kinds(folder: Path, names: list[str]) -> None:
    """Let reqat.json list the kinds of these tensors."""
    about = json.loads((folder / JSON).read_text())
    kinds = {place.kind for name in names if (place := place_of(name)) is not None}
    for kind in ("bases", "clips", "kv_shift", "static_scales"):
        about[kind] = kind in kinds
    (folder / JSON).write_text(json.dumps(about))


def test_the_layers_of_a_model_without_a_head_are_no_caches() -> None:
    place = place_of("layers.0.self_attn.q_proj.input_left")
    assert place is not None and place.linear == "layers.0.self_attn.q_proj" and place.layer is None
    place = place_of("layers.0.keys_left")
    assert place is not None and place.layer == 0 and place.prefix == "layers.0.keys"
