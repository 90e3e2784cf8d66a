"""Checkpoint layouts: names and shapes under which serving engines (vLLM, SGLang, TensorRT-LLM) store a weight [N, K].

| layout | codes | block scales | global scale |
|---|---|---|---|
| ``nvfp4-pack-quantized`` | ``weight_packed`` | ``weight_scale`` | ``weight_global_scale`` float32 [1], divisor |
| ``mxfp4-pack-quantized`` | ``weight_packed`` | ``weight_scale`` | none |
| ``modelopt`` | ``weight`` | ``weight_scale`` | ``weight_scale_2`` float32 scalar, multiplier |

The first two are compressed-tensors', the third NVIDIA modelopt's. Codes are uint8 [N, K/2], the low nibble the even
column; block scales are float8_e4m3fn [N, K/16] or, for MXFP4, uint8 E8M0 [N, K/32], row-major (not swizzled). The
element is E2M1: E1M2 cannot be expressed, so it is refused.

Divisor or multiplier: ``W = code * (s / g)`` and ``W = code * (s * w2)`` with ``w2 = 1/g`` differ in the last bit,
since ``1/g`` is rounded. The scale rule ``reciprocal`` computes the second, and :func:`from_layout` picks it for
modelopt's files; where a foreign ``w2`` is the float32 reciprocal of no g, values lie one unit in the last place away.
Everything else round-trips exactly. (compressed-tensors itself dequantizes through bfloat16.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reqat.config.errors import unknown_text
from reqat.formats.format import Format, get_format
from reqat.formats.tensors import PackedTensor, QuantizedTensor, unpack_codes


@dataclass(frozen=True)
class _Layout:
    codes: str
    scales: str
    global_scale: str | None
    input_scale: str | None
    families: tuple[str, ...]
    scale_dtype: torch.dtype
    format: Format
    multiplier: bool = False


_LAYOUTS = {
    "nvfp4-pack-quantized": _Layout(
        "weight_packed",
        "weight_scale",
        "weight_global_scale",
        "input_global_scale",
        ("NVFP4", "NVFP4-4/6"),
        torch.float8_e4m3fn,
        get_format("NVFP4", global_scale="static"),
    ),
    "mxfp4-pack-quantized": _Layout(
        "weight_packed", "weight_scale", None, None, ("MXFP4",), torch.uint8, get_format("MXFP4", scale_rule="even")
    ),
    "modelopt": _Layout(
        "weight",
        "weight_scale",
        "weight_scale_2",
        "input_scale",
        ("NVFP4", "NVFP4-4/6"),
        torch.float8_e4m3fn,
        get_format("NVFP4", global_scale="static", scale_rule="reciprocal"),
        multiplier=True,
    ),
}
LAYOUT_NAMES = tuple(_LAYOUTS)


def to_layout(
    q: QuantizedTensor | PackedTensor, layout: str, *, input_global_scale: Tensor | float | None = None
) -> dict[str, Tensor]:
    """The tensors of one layer in ``layout``, without the layer's name in front.

    Args:
        q: a weight quantized along its last axis, unpadded, with E2M1 elements and at most one global scale. Any scale
            rule of MXFP4 makes a valid file (compressed-tensors' own is ``even``).
        layout: one of :data:`LAYOUT_NAMES`.
        input_global_scale: the calibrated g of the layer's inputs, to be stored too (in modelopt's its reciprocal).

    Raises ValueError for a tensor that the layout cannot express.
    """
    spec = _spec(layout)
    fmt = q.format
    reason = None
    if fmt.name not in spec.families:
        reason = (
            f"it holds {' or '.join(spec.families)}, not {fmt.name} ({fmt.bits}-bit {fmt.element}); reqat's own "
            "checkpoints (save_model) hold every format"
        )
    elif fmt.element != "E2M1":
        reason = f"its elements are E2M1, not {fmt.element}"
    elif q.axis != len(q.shape) - 1:
        reason = f"blocks run along the last axis, not axis {q.axis} of {len(q.shape)}; transpose the weight first"
    elif q.shape[-1] % (fmt.block or 1):
        reason = f"its rows cannot be padded, and {q.shape[-1]} is not a multiple of {fmt.block}"
    elif q.global_scale is not None and q.global_scale.numel() != 1:
        reason = "it stores one global scale a weight; quantize with global_scale='dynamic' or 'static'"
    if reason:
        raise ValueError(f"layout {layout!r} cannot store a tensor of shape {tuple(q.shape)}: {reason}")
    packed = q if isinstance(q, PackedTensor) else q.pack()
    tensors = {spec.codes: packed.packed, spec.scales: packed.scales}
    if spec.global_scale and q.global_scale is not None:
        tensors[spec.global_scale] = _stored_global(q.global_scale, spec)
    if input_global_scale is not None:
        if spec.input_scale is None:
            raise ValueError(f"layout {layout!r} has no input scale: MXFP4 needs none")
        tensors[spec.input_scale] = _stored_global(_number(input_global_scale), spec)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def from_layout(
    tensors: dict[str, Tensor], layout: str, *, dtype: torch.dtype = torch.bfloat16, name: str | None = None
) -> QuantizedTensor:
    """Read the tensors of one layer, as :func:`to_layout` or the layout's own library wrote them.

    ``dtype`` is what ``dequantize()`` returns by default. An input scale is no part of the weight and is ignored here;
    see :func:`input_global_scale`. Raises ValueError for missing tensors, wrong types, shapes that do not belong
    together, and scales that are NaN or negative; ``name`` is the layer's name in the message.
    """
    spec = _spec(layout)
    label = f"{name or 'layer'} in layout {layout!r}"
    wanted = [spec.codes, spec.scales] + ([spec.global_scale] if spec.global_scale else [])
    if missing := [key for key in wanted if key not in tensors]:
        raise ValueError(f"{label}: missing {', '.join(missing)}; found {', '.join(sorted(tensors)) or 'nothing'}")
    packed, scales = tensors[spec.codes], tensors[spec.scales]
    for key, dtype_wanted in ((spec.codes, torch.uint8), (spec.scales, spec.scale_dtype)):
        if tensors[key].dtype != dtype_wanted:
            raise ValueError(f"{label}: {key} is {tensors[key].dtype}, expected {dtype_wanted}")
    block = spec.format.block
    assert block is not None
    shape = torch.Size((*packed.shape[:-1], packed.shape[-1] * 2))
    if shape[-1] % block or scales.shape != (*shape[:-1], shape[-1] // block):
        raise ValueError(
            f"{label}: {spec.codes} {tuple(packed.shape)} and {spec.scales} {tuple(scales.shape)} do not belong "
            f"together: two elements a byte, {block} elements a scale"
        )
    bad = scales == 255 if spec.scale_dtype == torch.uint8 else ~(scales.float() >= 0)
    if bool(bad.any()):
        raise ValueError(f"{label}: {spec.scales} holds {int(bad.sum())} NaN or negative scales; the file is damaged")
    g = _read_global(tensors[spec.global_scale], spec, label, spec.global_scale) if spec.global_scale else None
    codes = unpack_codes(packed, shape[-1])
    try:
        return QuantizedTensor(codes, scales, g, spec.format, len(shape) - 1, shape, dtype)
    except ValueError as error:  # -0.0 among the scales, a global scale out of range
        raise ValueError(f"{label}: {error}") from error


def input_global_scale(tensors: dict[str, Tensor], layout: str, *, name: str | None = None) -> Tensor | None:
    """The stored global scale of the layer's inputs as a divisor (float32 scalar), or None if there is none."""
    spec = _spec(layout)
    if spec.input_scale is None or spec.input_scale not in tensors:
        return None
    return _read_global(tensors[spec.input_scale], spec, f"{name or 'layer'} in layout {layout!r}", spec.input_scale)


def quantization_config(layout: str, *, activations: bool, ignore: tuple[str, ...] = ("lm_head",)) -> dict[str, Any]:
    """The ``quantization_config`` of a ``config.json`` that transformers with compressed-tensors loads.

    ``activations``: whether inputs are quantized as well (W4A4; NVFP4 then needs ``input_global_scale`` in every
    layer) or weights only (W4A16). There is no field for a 4-bit KV cache: keep that in a file of your own. Raises
    ValueError for ``modelopt``, which keeps its configuration elsewhere.
    """
    _spec(layout)
    if layout == "modelopt":
        raise ValueError("modelopt's layout is not configured through compressed-tensors; use one of " + _COMPRESSED)
    nvfp4 = layout == "nvfp4-pack-quantized"
    scale_dtype = "torch.float8_e4m3fn" if nvfp4 else "torch.uint8"

    def arguments(dynamic: bool | str) -> dict[str, Any]:
        return {
            "num_bits": 4,
            "type": "float",
            "strategy": "tensor_group" if nvfp4 else "group",
            "group_size": 16 if nvfp4 else 32,
            "symmetric": True,
            "dynamic": dynamic,
            "scale_dtype": scale_dtype,
            "zp_dtype": scale_dtype,
        }

    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": layout,
                "weights": arguments(False),
                "input_activations": arguments("local" if nvfp4 else True) if activations else None,
                "output_activations": None,
            }
        },
    }


_COMPRESSED = "nvfp4-pack-quantized, mxfp4-pack-quantized"


def _spec(layout: str) -> _Layout:
    if layout not in _LAYOUTS:
        raise ValueError(unknown_text("layout", layout, _LAYOUTS))
    return _LAYOUTS[layout]


def _number(g: Tensor | float) -> Tensor:
    return g if isinstance(g, Tensor) else torch.tensor(g, dtype=torch.float32, device="cpu")


def _stored_global(g: Tensor, spec: _Layout) -> Tensor:
    g = g.detach().to(torch.float32).reshape(())
    return 1.0 / g if spec.multiplier else g.reshape(1)


def _read_global(stored: Tensor, spec: _Layout, label: str, key: str) -> Tensor:
    if stored.numel() != 1 or not bool(torch.isfinite(stored.float()).all()) or float(stored) <= 0:
        raise ValueError(f"{label}: {key} must be one positive finite number, got {stored.flatten()[:4].tolist()}")
    g = stored.detach().to(torch.float32).reshape(())
    return 1.0 / g if spec.multiplier else g
