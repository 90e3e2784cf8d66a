"""NVIDIA modelopt's unified layout, NVFP4: what TensorRT-LLM, SGLang and vLLM load.

Per linear layer ``weight`` uint8 [N, K/2], ``weight_scale`` float8_e4m3fn [N, K/16], ``weight_scale_2`` float32 scalar
(1/g) and, with quantized inputs, ``input_scale`` float32 scalar (1/g). ``hf_quant_config.json`` says so, and
``config.json`` again. Its ``kv_cache_quant_algo`` can say that keys and values are NVFP4 (E2M1), with ``k_scale`` and
``v_scale`` 1/g = amax/2688 as all other scales here; nothing else about them.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from reqat import __version__
from reqat.config.files import write_file
from reqat.export._exporter import Exporter, Frozen, Layer, left_out
from reqat.export._huggingface import write_folder
from reqat.formats import to_layout
from reqat.models import kv_quantizers
from reqat.models.adapters import cached_attentions
from reqat.quant import Precision

NAME = "modelopt"
QUANT_CONFIG = "hf_quant_config.json"


def write(frozen: Frozen, folder: Path) -> None:
    """Write the folder."""
    precision = frozen.precision
    scales = _cache_scales(frozen)
    frozen.notes += left_out(frozen.model, precision, NAME, EXPORTER, cache=scales is not None)
    quantization = {
        "quant_algo": "NVFP4" if precision.inputs is not None else "W4A16_NVFP4",
        "kv_cache_quant_algo": "NVFP4" if scales is not None else None,
        "group_size": 16,
        "exclude_modules": frozen.dense,
    }
    producer = {"name": "reqat", "version": __version__}
    arguments = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    config = {
        "quant_method": "modelopt",
        "quant_algo": quantization["quant_algo"],
        "producer": producer,
        "ignore": frozen.dense,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": arguments,
                "input_activations": arguments if precision.inputs is not None else None,
            }
        },
        **({"kv_cache_scheme": {"dynamic": False, "num_bits": 4, "type": "float"}} if scales is not None else {}),
    }

    def tensors(layer: Layer) -> dict[str, Tensor]:
        return to_layout(layer.quantized, NAME, input_global_scale=layer.input_global_scale)

    write_folder(frozen, folder, tensors, config, scales)
    described = {"producer": producer, "quantization": quantization}
    write_file(folder / QUANT_CONFIG, json.dumps(described, indent=2) + "\n")


def _cache_scales(frozen: Frozen) -> dict[str, Tensor] | None:
    """Scales of keys and values by their names in the file; None where the layout cannot say how they are quantized."""
    if not _says(frozen.precision):
        return None
    found: dict[str, Tensor] = {}
    for (_, attention), kv in zip(cached_attentions(frozen.model), kv_quantizers(frozen.model), strict=True):
        scales = (kv.key.global_scale, kv.value.global_scale)
        if kv.shift is not None or kv.basis.changes or kv.key.clip is not None or kv.value.clip is not None:
            return None
        for projection, part, g in zip(attention.projections[1:], ("k_scale", "v_scale"), scales, strict=True):
            if g is None:
                return None
            found[f"{attention.name}.{projection}.{part}"] = g.reciprocal().cpu().reshape(())
    return found


def _says(precision: Precision) -> bool:
    plain = precision.kv_rotation is None
    return plain and all(
        fmt is not None and fmt.name == "NVFP4" and fmt.element == "E2M1" and fmt.global_scale == "static"
        for fmt in (precision.keys, precision.values)
    )


EXPORTER = Exporter(write, families=("NVFP4", "NVFP4-4/6"))
