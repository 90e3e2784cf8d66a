"""4-bit number formats (floor 0: torch alone): elements, block scales, quantization, packing, checkpoint layouts."""

from __future__ import annotations

from reqat.formats.elements import ELEMENTS, Element
from reqat.formats.format import FORMAT_NAMES, Format, get_format
from reqat.formats.packing import PackedTensor, pack_codes, unpack_codes
from reqat.formats.quantize import QuantizedTensor, global_scale_for, quantize, quantize_dequantize

__all__ = [
    "ELEMENTS",
    "FORMAT_NAMES",
    "Element",
    "Format",
    "PackedTensor",
    "QuantizedTensor",
    "get_format",
    "global_scale_for",
    "pack_codes",
    "quantize",
    "quantize_dequantize",
    "unpack_codes",
]
