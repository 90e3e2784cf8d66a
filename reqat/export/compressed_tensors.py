"""compressed-tensors: what transformers, vLLM and SGLang load, NVFP4 and MXFP4, with or without quantized inputs.

Per linear layer ``weight_packed`` uint8 [N, K/2], ``weight_scale`` (float8_e4m3fn [N, K/16], or uint8 E8M0 [N, K/32]),
for NVFP4 ``weight_global_scale`` float32 [1], and with quantized inputs ``input_global_scale`` float32 [1]. Engines
scale the inputs of NVFP4 by block (``dynamic: "local"``), those of MXFP4 by its rule ``even``. Keys and values could be
said in 8 bits only.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from reqat.export._exporter import Exporter, Frozen, Layer, left_out
from reqat.export._huggingface import write_folder
from reqat.formats import quantization_config, to_layout

NAME = "compressed-tensors"
_LAYOUTS = {"NVFP4": "nvfp4-pack-quantized", "NVFP4-4/6": "nvfp4-pack-quantized", "MXFP4": "mxfp4-pack-quantized"}


def write(frozen: Frozen, folder: Path) -> None:
    """Write the folder."""
    precision = frozen.precision
    assert precision.weights is not None
    layout = _LAYOUTS[precision.weights.name]
    frozen.notes += left_out(frozen.model, precision, NAME, EXPORTER, cache=False)
    config = quantization_config(layout, activations=precision.inputs is not None, ignore=tuple(frozen.dense))

    def tensors(layer: Layer) -> dict[str, Tensor]:
        return to_layout(layer.quantized, layout, input_global_scale=layer.input_global_scale)

    write_folder(frozen, folder, tensors, config)


EXPORTER = Exporter(write, families=tuple(_LAYOUTS), input_rule="even")
