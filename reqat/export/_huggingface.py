"""A Hugging Face folder whose linear layers are stored as codes: shards, index, configuration, tokenizer.

Everything but the codes and scales is bfloat16, which is what engines compute in (with float32 beside them,
compressed-tensors' own layers stop at a mismatch of types). There is an index even for a single file: engines read
every safetensors file of a folder without one, our sidecar too.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from reqat.config.files import write_file
from reqat.export._exporter import Frozen, Layer
from reqat.models.folder import CONFIG, INDEX
from reqat.models.pretrained import fix_config, plain_state

DTYPE = torch.bfloat16
_SHARD = "5GB"


def write_folder(
    frozen: Frozen,
    folder: Path,
    tensors_of: Callable[[Layer], dict[str, Tensor]],
    quantization: dict[str, Any],
    more: dict[str, Tensor] | None = None,
) -> None:
    """Write weights (each layer's ``tensors_of`` in place of its weight, and ``more``), ``config.json`` with
    ``quantization`` as its quantization_config, generation settings and tokenizer."""
    state = _dense(frozen)
    for name, layer in frozen.layers.items():
        # Layers share the scale of their inputs; a file must not.
        state |= {f"{name}.{part}": tensor.clone().contiguous() for part, tensor in tensors_of(layer).items()}
    state |= more or {}
    shards = split_torch_state_dict_into_shards(state, max_shard_size=_SHARD)
    for file, names in shards.filename_to_tensors.items():
        save_file({name: state[name] for name in names}, folder / file, metadata={"format": "pt"})
    index = {
        "metadata": shards.metadata,
        "weight_map": {name: shards.tensor_to_filename[name] for name in sorted(state)},
    }
    write_file(folder / INDEX, json.dumps(index, indent=2) + "\n")
    _config(frozen, folder, quantization)
    if frozen.tokenizer is not None:
        frozen.tokenizer.save_pretrained(folder)


def _dense(frozen: Frozen) -> dict[str, Tensor]:
    """What is not quantized, each tensor once: a head that is tied to the embedding is left to the configuration."""
    quantized = {f"{name}.weight" for name in frozen.layers}
    found: dict[str, Tensor] = {}
    seen: set[tuple[int, int]] = set()
    for name, tensor in plain_state(frozen.model).items():
        place = (tensor.data_ptr(), tensor.numel())
        if name in quantized or (tensor.ndim and place in seen):
            continue
        seen.add(place)
        found[name] = tensor.detach().to("cpu", DTYPE if tensor.is_floating_point() else None, copy=True).contiguous()
    return found


def _config(frozen: Frozen, folder: Path, quantization: dict[str, Any]) -> None:
    model = frozen.model
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    fix_config(folder / CONFIG, DTYPE)
    described = json.loads((folder / CONFIG).read_text())
    write_file(
        folder / CONFIG,
        json.dumps(described | {"quantization_config": quantization}, indent=2, sort_keys=True) + "\n",
    )
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
