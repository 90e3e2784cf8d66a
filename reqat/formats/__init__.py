"""4-bit number formats (need torch alone): elements, block scales, quantization, packing, checkpoint layouts.

Beside them, for every program that reads a folder of ours without transformers: rotations (``hadamard``), precisions
(``precision``), and what the folder says (``described``, ``stored``, which needs safetensors).
"""

from __future__ import annotations

from reqat.config.formats import FORMATS
from reqat.formats.elements import ELEMENTS, Element
from reqat.formats.format import Format, get_format
from reqat.formats.layouts import LAYOUT_NAMES, from_layout, input_global_scale, quantization_config, to_layout
from reqat.formats.quantize import clamp_affine_, global_scale_for, quantize, quantize_dequantize
from reqat.formats.tensors import PackedTensor, QuantizedTensor, pack_codes, unpack_codes

__all__ = [
    "ELEMENTS",
    "FORMATS",
    "LAYOUT_NAMES",
    "Element",
    "Format",
    "PackedTensor",
    "QuantizedTensor",
    "clamp_affine_",
    "from_layout",
    "get_format",
    "global_scale_for",
    "input_global_scale",
    "pack_codes",
    "quantization_config",
    "quantize",
    "quantize_dequantize",
    "to_layout",
    "unpack_codes",
]
