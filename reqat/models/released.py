"""Checkpoints that ReQAT's authors released, which their own vLLM classes run.

Such a folder holds dense weights that were fake-quantized once, ``fake_quant_config`` in ``config.json``, and the key
shift of each layer as ``model.layers.{i}.self_attn.k_shift`` [1, G, 1, D]. Read here, it is a folder saved at that
precision: ``prepare`` by the precision's name takes its options and its shift.

| key | values | meaning |
|---|---|---|
| ``cfg`` | nvfp4, mxfp4, none | format of the inputs; with one, weights are in it, too |
| ``kv_quant`` | true, false | whether keys and values are quantized |
| ``kv_cfg`` | nvfp4, nvfp4_e1m2, mxfp4, none; default: ``cfg`` | their format |
| ``shift_k`` | true, false | whether there is a key shift |
| ``down_cfg`` | as ``cfg`` | the same as ``cfg`` only: here all inputs have one format |
| ``disabled_layers``, ``_mlp``, ``_attn`` | numbers of layers | left unquantized |

Their quantizers take the global scale of the tensor at hand (``dynamic``) and rotate nothing. Weights of a folder with
``cfg: none`` are taken as they are: they lie on a grid, but the file does not say on which.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from reqat.config.errors import ReqatError, unknown
from reqat.config.files import read_json
from reqat.models.folder import CONFIG, REMEDY, Header, weight_headers
from reqat.models.sidecar import Sidecar
from reqat.quant import Precision

KEY = "fake_quant_config"
SHIFT = re.compile(r"(?:model\.)?layers\.(\d+)\.self_attn\.k_shift")
_INPUTS = {"nvfp4": "NVFP4-W4A4", "mxfp4": "MXFP4-W4A4", "none": ""}
_CACHE = {"nvfp4": ("NVFP4", "E2M1"), "nvfp4_e1m2": ("NVFP4", "E1M2"), "mxfp4": ("MXFP4", None), "none": None}
_DISABLED = {"disabled_layers": "", "disabled_layers_mlp": "mlp.", "disabled_layers_attn": "self_attn."}
_KNOWN = ("cfg", "kv_quant", "kv_cfg", "shift_k", "down_cfg", *_DISABLED)


def is_shift(name: str) -> bool:
    """Whether a tensor of a checkpoint is a layer's key shift."""
    return SHIFT.fullmatch(name) is not None


def saved_with(
    folder: Path, config: Mapping[str, Any] | None = None, stored: Mapping[str, Header] | None = None
) -> Sidecar | None:
    """What a model's folder says beyond its weights: its sidecar, else what a released one says, else None.

    ``config`` and ``stored``: its ``config.json`` and its tensors, where they were read before. Raises ReqatError as
    :meth:`Sidecar.read` and :func:`read_released` do.
    """
    if config is None:
        config = read_json(folder / CONFIG, "model configuration", REMEDY) if (folder / CONFIG).is_file() else {}
    released = read_released(folder, config, stored if stored is not None else weight_headers(folder))
    sidecar = Sidecar.read(folder)
    return released if released is not None and not sidecar else sidecar


def read_released(folder: Path, config: Mapping[str, Any], stored: Mapping[str, Header]) -> Sidecar | None:
    """What a released folder says beyond its weights, as a sidecar; None where it is no such folder.

    ``config``: its ``config.json``; ``stored``: its tensors. Raises ReqatError, naming key and value, for one that is
    not known, and where the tensors do not belong to what ``config`` says.
    """
    shifts = [name for name in stored if is_shift(name)]
    if KEY not in config:
        if shifts:
            raise ReqatError(f"{folder}: it has {shifts[0]}, and {CONFIG} no {KEY} to say what for; copy it again.")
        return None
    where = f"{folder / CONFIG}: {KEY}"
    given = config[KEY]
    if not isinstance(given, dict):
        raise ReqatError(f"{where} is {given!r}, where an object with cfg, kv_quant, kv_cfg and shift_k is needed.")
    for key in given:
        if key not in _KNOWN:
            raise unknown("key", key, _KNOWN, where)
    for key in ("kv_quant", "shift_k"):
        if type(given.get(key, False)) is not bool:
            raise ReqatError(f"{where}.{key} is {given[key]!r}, where true or false is needed.")
    cfg = _choice(where, "cfg", given.get("cfg"), _INPUTS)
    if (down := given.get("down_cfg", cfg)) != cfg:
        raise ReqatError(f"{where}.down_cfg is {down!r} beside cfg {cfg!r}: here all inputs have one format.")
    cached = _CACHE[_choice(where, "kv_cfg", given.get("kv_cfg", cfg), _CACHE)] if given.get("kv_quant") else None
    if given.get("kv_quant") and cached is None:
        raise ReqatError(f"{where}: kv_quant is true and kv_cfg none; give the format of keys and values.")
    precision = _precision(_INPUTS[cfg], cached)
    if given.get("shift_k", False) != bool(shifts):
        raise ReqatError(
            f"{where}.shift_k is {given.get('shift_k', False)}, and {len(shifts)} tensors are a k_shift; copy it again."
        )
    sidecar = Sidecar(precision, skip=_skip(where, given, cached is not None))
    for name in shifts:
        sidecar.tensors[f"layers.{_layer(name)}.kv_shift"] = _shift(name, stored[name])
    return sidecar


def _precision(inputs: str, cached: tuple[str, str | None] | None) -> Precision:
    if cached is None:
        name = inputs or "BF16"
    elif inputs.startswith(f"{cached[0]}-"):
        name = f"{inputs}KV4"
    else:
        name = "+".join(filter(None, (inputs, f"{cached[0]}-KV4")))
    options: dict[str, Any] = {"kv_element": cached[1]} if cached is not None and cached[1] is not None else {}
    if "NVFP4" in name:
        options["global_scale"] = "dynamic"
    return Precision.parse(name, **options)


def _choice(where: str, key: str, value: Any, known: Mapping[str, Any]) -> str:
    if not isinstance(value, str) or value not in known:
        raise unknown(key, value, known, where)
    return value


def _skip(where: str, given: Mapping[str, Any], cached: bool) -> tuple[str, ...]:
    found = []
    for key, part in _DISABLED.items():
        layers = given.get(key, [])
        if not (isinstance(layers, list) and all(type(layer) is int and layer >= 0 for layer in layers)):
            raise ReqatError(f"{where}.{key} is {layers!r}, where a list of layers' numbers is needed.")
        if layers and cached and part != "mlp.":
            raise ReqatError(f"{where}.{key} is {layers!r}: here the cache is quantized in all layers or in none.")
        found += [f"model.layers.{layer}.{part}*" for layer in layers]
    return tuple(found)


def _layer(name: str) -> int:
    match = SHIFT.fullmatch(name)
    assert match is not None
    return int(match[1])


def _shift(name: str, header: Header) -> Tensor:
    """The shift [G, D] float32 of one layer."""
    if len(header.shape) != 4 or header.shape[0] != 1 or header.shape[2] != 1:
        raise ReqatError(f"{header.file}: {name} has shape {header.shape}, where (1, heads, 1, head_dim) is needed.")
    with safe_open(header.file, framework="pt") as tensors:
        shift = tensors.get_tensor(name).to(torch.float32)[0, :, 0]
    if not bool(torch.isfinite(shift).all()):
        raise ReqatError(f"{header.file}: {name} holds NaN or infinity; copy the checkpoint again.")
    return shift.contiguous()
