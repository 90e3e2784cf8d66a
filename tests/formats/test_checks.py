"""Parts of a quantized tensor that do not belong together, or hold what is no number, are refused at construction."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from reqat.formats import FORMATS, Format, PackedTensor, QuantizedTensor, get_format, quantize
from reqat.formats.checks import check_parts

#: Bits of each scale type that stand for NaN, infinity, a negative number or -0.0.
BAD_BITS = {
    "E8M0": (255,),
    "E4M3": (0x7F, 0xFF, 0x80, 0x81),
    "E5M2": (0x7C, 0x7F, 0xFC, 0x80, 0x81),
    "FP16": (0x7C00, 0x7E00, 0xFC00, 0x8000, 0x8001),
    "FP32": (0x7F800000, 0x7FC00000, 0xFF800000, 0x80000000, 0x80000001),
}


def quantized(fmt: Format) -> QuantizedTensor:
    g = 100.0 if fmt.global_scale == "static" else None
    return quantize(torch.randn(4, 6, 256, generator=torch.Generator().manual_seed(0)), fmt, global_scale=g)


def with_bits(scales: Tensor, bits: int) -> Tensor:
    integer, size = {1: (torch.uint8, 8), 2: (torch.int16, 16), 4: (torch.int32, 32)}[scales.element_size()]
    signed = bits - (1 << size) if integer != torch.uint8 and bits >= 1 << (size - 1) else bits
    raw = scales.clone().view(integer)
    raw.view(-1)[3] = signed
    return raw.view(scales.dtype)


@pytest.mark.parametrize("kind", [QuantizedTensor, PackedTensor])
def test_scales_that_are_no_number_are_refused(fmt: Format, kind: type) -> None:
    q = quantized(fmt) if kind is QuantizedTensor else quantized(fmt).pack()
    for bits in BAD_BITS[fmt.scale]:
        with pytest.raises(ValueError, match="scales of tensor.*1 of"):
            dataclasses.replace(q, scales=with_bits(q.scales, bits))


CHANGES: dict[str, Callable[[QuantizedTensor], dict[str, Any]]] = {
    "fewer blocks": lambda q: {"scales": q.scales[:, :, :0]},
    "one row of scales": lambda q: {"scales": q.scales[:1]},
    "a flat scale": lambda q: {"scales": q.scales.reshape(-1)},
    "scales of another type": lambda q: {"scales": q.scales.to(torch.float64)},
    "codes of another type": lambda q: {"codes": q.codes.to(torch.int8)},
    "short codes": lambda q: {"codes": q.codes[..., :-1]},
    "another shape": lambda q: {"shape": torch.Size((4, 7, 256))},
    "another rank": lambda q: {"shape": torch.Size((24, 256))},
    "a negative size": lambda q: {"shape": (4, -6, 256)},
    "another axis": lambda q: {"axis": 1},
    "no axis": lambda q: {"axis": 3},
    "a negative axis": lambda q: {"axis": -1},
    "scales on another device": lambda q: {"scales": q.scales.to("meta")},
    "a list": lambda q: {"scales": q.scales.float().tolist()},
    "no codes": lambda q: {"codes": None},
    "an integer dtype": lambda q: {"dtype": torch.int32},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", FORMATS)
def test_parts_that_do_not_belong_together_are_refused(name: str, change: str) -> None:
    q = quantized(get_format(name))
    with pytest.raises((ValueError, TypeError), match="of tensor"):
        dataclasses.replace(q, **CHANGES[change](q))


def test_global_scales(fmt: Format) -> None:
    q = quantized(fmt)
    if not fmt.has_global_scale:
        with pytest.raises(ValueError, match="has no global scale"):
            dataclasses.replace(q, global_scale=torch.tensor(1.0))
        return
    for bad in (0.0, -1.0, torch.nan, torch.inf, 1e-37):
        with pytest.raises(ValueError, match="global_scale of tensor.*finite"):
            dataclasses.replace(q, global_scale=torch.tensor(bad))
    for shape in ((1,), (4, 6), (4, 6, 256), (3, 6, 1), (4, 6, 2), (1, 1, 1, 1), (4, 0, 1)):
        with pytest.raises(ValueError, match=r"scalar or of shape \[4, 6, 1\]"):
            dataclasses.replace(q, global_scale=torch.ones(shape))
    with pytest.raises(ValueError, match="float32"):
        dataclasses.replace(q, global_scale=torch.ones((), dtype=torch.float64))
    with pytest.raises(ValueError, match="needs a global scale"):
        dataclasses.replace(q, global_scale=None)
    for shape in ((), (4, 6, 1), (4, 1, 1)):
        dataclasses.replace(q, global_scale=torch.ones(shape))


def test_codes_beyond_four_bits_are_found_where_they_are_read() -> None:
    q = quantized(get_format("NVFP4"))
    codes = q.codes.clone()
    codes[1, 2, 3] = 16
    bad = dataclasses.replace(q, codes=codes)
    for read in (bad.check, bad.pack, bad.dequantize):
        with pytest.raises(ValueError, match="hold 16.*0 to 15"):
            read()


def test_what_quantize_makes_passes(fmt: Format) -> None:
    g = 100.0 if fmt.global_scale == "static" else None
    for shape, axis in (((3, 40), 1), ((40, 3), 0), ((0, 64), 1), ((3, 0), 1), ((7,), 0), ((2, 3, 1), 2)):
        q = quantize(torch.ones(shape), fmt, axis=axis, pad=True, global_scale=g)
        q.check()
        packed = q.pack()
        parts = (packed.packed, packed.scales, packed.global_scale)
        check_parts(*parts, fmt, axis, shape, packed=True, name="layer")
        assert torch.equal(packed.unpack().codes, q.codes)
