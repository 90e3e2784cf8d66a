"""What the format tests share: comparison of bits, hard inputs, and a naive twin that searches where reqat computes."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from reqat.formats import Format, get_format

torch.set_num_threads(1)

#: Every family, with the options that change its arithmetic.
FORMATS: dict[str, Format] = {
    label: get_format(name, **options)
    for label, (name, options) in {
        "MXFP4 ceil": ("MXFP4", {}),
        "MXFP4 floor": ("MXFP4", {"scale_rule": "floor"}),
        "MXFP4 even": ("MXFP4", {"scale_rule": "even"}),
        "MXFP4 E1M2": ("MXFP4", {"element": "E1M2"}),
        "MXFP4 away": ("MXFP4", {"rounding": "away"}),
        "MXFP4-4/3": ("MXFP4-4/3", {}),
        "NVFP4": ("NVFP4", {}),
        "NVFP4 E1M2": ("NVFP4", {"element": "E1M2"}),
        "NVFP4 row": ("NVFP4", {"global_scale": "row"}),
        "NVFP4 multiply": ("NVFP4", {"scale_rule": "multiply"}),
        "NVFP4 reciprocal": ("NVFP4", {"scale_rule": "reciprocal"}),
        "NVFP4 away": ("NVFP4", {"rounding": "away"}),
        "NVFP4-4/6": ("NVFP4-4/6", {}),
        "NVFP4-4/6 row": ("NVFP4-4/6", {"global_scale": "row"}),
        "AMXFP4": ("AMXFP4", {}),
        "AMXFP4 E4M3": ("AMXFP4", {"scale": "E4M3"}),
        "AMXFP4 FP16": ("AMXFP4", {"scale": "FP16"}),
        "AMXFP4 PO2 floor": ("AMXFP4", {"scale": "PO2"}),
        "AMXFP4 PO2 even": ("AMXFP4", {"scale": "PO2", "scale_rule": "even"}),
        "AMXFP4 even E1M2": ("AMXFP4", {"rounding": "even", "element": "E1M2"}),
        "INT4-g128": ("INT4-g128", {}),
        "INT4-row": ("INT4-row", {}),
        "INT4-row FP16 away": ("INT4-row", {"scale": "FP16", "rounding": "away"}),
        "INT4-g32": ("INT4-g32", {}),
        "INT4-g32 PO2 even": ("INT4-g32", {"scale": "PO2", "scale_rule": "even"}),
        "FP4-g32 E4M3": ("FP4-g32", {"scale": "E4M3"}),
        "AINT4-g32": ("AINT4-g32", {}),
        "AINT4-g32 PO2": ("AINT4-g32", {"scale": "PO2"}),
        "AINT4-g32 PO2 even": ("AINT4-g32", {"scale": "PO2", "scale_rule": "even"}),
        "AINT4-row FP16 away": ("AINT4-row", {"scale": "FP16", "rounding": "away"}),
        "INT2-g128": ("INT2-g128", {}),
        "INT3-row": ("INT3-row", {}),
        "INT8-g128 away": ("INT8-g128", {"rounding": "away"}),
        "INT8-tensor": ("INT8-tensor", {}),
        "FP8-row": ("FP8-row", {}),
        "FP8-tensor FP16": ("FP8-tensor", {"scale": "FP16"}),
        "AINT2-tensor": ("AINT2-tensor", {}),
        "SAWB2-tensor": ("SAWB2-tensor", {}),
        "SAWB3-tensor INT3": ("SAWB3-tensor", {"element": "INT3"}),
        "SAWB4-tensor FP16": ("SAWB4-tensor", {"scale": "FP16"}),
        "TERNARY-row": ("TERNARY-row", {}),
        "TERNARY-tensor FP16": ("TERNARY-tensor", {"scale": "FP16"}),
    }.items()
}


@pytest.fixture(params=FORMATS, ids=lambda label: label.replace(" ", "-"))
def fmt(request: pytest.FixtureRequest) -> Format:
    return FORMATS[request.param]


@pytest.fixture(scope="session")
def bf16_values() -> Tensor:
    """Every finite bfloat16, as float32: both zeros, subnormals, up to 3.4e38."""
    values = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()
    return values[torch.isfinite(values)]


@pytest.fixture(scope="session")
def same_bits() -> Callable[[Tensor, Tensor], None]:
    """Assert that two tensors hold the same bits, signs of zeros included; the message names the first difference."""

    def check(a: Tensor, b: Tensor) -> None:
        assert a.dtype == b.dtype and a.shape == b.shape, (
            f"{a.dtype} {tuple(a.shape)} against {b.dtype} {tuple(b.shape)}"
        )
        ints = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        different = a.contiguous().view(ints) != b.contiguous().view(ints)
        if bool(different.any()):
            where = tuple(different.nonzero()[0].tolist())
            raise AssertionError(
                f"{int(different.sum())} of {a.numel()} differ, first at {where}: {a[where]} {b[where]}"
            )

    return check


def adversarial(length: int) -> dict[str, Tensor]:
    """Hard rows [*, length] in float32; length is a multiple of 128."""
    generator = torch.Generator().manual_seed(7)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    one = torch.zeros(4, length)
    one[0, 3], one[1, 0], one[2, -1], one[3, 17] = 1.0, -3e-5, 7e30, -1e-38
    ties = torch.tensor([6, 5, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25, -5, -3.5, -2.5, -1.75, -1.25, -0.75, -0.25, -0.0])
    exponents = torch.linspace(-126, 127, length).floor()
    return {
        "zeros": torch.zeros(3, length),
        "negative zeros": torch.full((2, length), -0.0),
        "one element": one,
        "zero blocks among others": torch.where(torch.arange(length) % 64 < 32, 0.0, randn(3, length)),
        "ties": torch.stack([ties.repeat(length // 16) * 2.0**k for k in range(-40, 41)]),
        "E1M2 ties": torch.stack([(torch.arange(length) % 15 - 7) * 0.5 * 2.0**k + 0.25 * 2.0**k for k in (-9, 0, 5)]),
        "subnormal": randn(3, length) * 1e-39,
        "smallest": torch.full((2, length), 1e-45),
        "tiny": randn(3, length) * 1e-37,
        "huge": (randn(3, length) * 1e38).clamp(-3.4028234e38, 3.4028234e38),
        "largest": torch.full((2, length), torch.finfo(torch.float32).max),
        "all binades": 2.0 ** exponents.repeat(2, 1) * torch.tensor([[1.0], [-1.75]]),
        "wide range": randn(8, length) * torch.exp(8 * randn(8, length)),
        "wide rows": randn(16, length) * torch.exp(6 * randn(16, 1)),
        "gaussian": randn(16, length),
        "equal": torch.full((2, length), 0.1),
        "one sign": -randn(4, length).abs(),
    }


@pytest.fixture(scope="session")
def hard_blocks() -> dict[str, Tensor]:
    return adversarial(256)


# --- the naive twin ---------------------------------------------------------------------------------------------------
# numpy, float32 arithmetic one operation at a time, rounding by looking for the nearest value in the full list.

_f32 = np.float32
_MAGNITUDES = {
    "E2M1": np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6]),
    "E1M2": np.array([0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]),
    **{name: np.arange(float(2 ** (bits - 1))) for name, bits in (("INT2", 2), ("INT3", 3), ("INT4", 4), ("INT8", 8))},
    "E4M3": np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64),
}
_SCALE_VALUES = {
    "E4M3": np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64),
    "E5M2": np.arange(124, dtype=np.uint8).view(ml_dtypes.float8_e5m2).astype(np.float64),
    "FP16": np.arange(31744, dtype=np.uint16).view(np.float16).astype(np.float64),
}


def nearest(values: np.ndarray, t: np.ndarray, rounding: str) -> np.ndarray:
    """Index into ascending ``values`` of the one nearest to each non-negative ``t``; a tie to the even index, or up."""
    t = np.minimum(t.astype(np.float64), values[-1])
    above = np.searchsorted(values, t, side="left").clip(1, len(values) - 1)
    below = above - 1
    up, down = values[above] - t, t - values[below]
    tie = above if rounding == "away" else np.where(above % 2 == 0, above, below)
    return np.where(up < down, above, np.where(down < up, below, tie))


def _power_of_two(amax: np.ndarray, fmt: Format) -> np.ndarray:
    emax = _MAGNITUDES[fmt.element][-1]
    scales = []
    for a in amax.astype(np.float64):
        if a == 0:
            scales.append(2.0**-127)
            continue
        if fmt.scale_rule == "rceil":
            mantissa, exponent = np.frexp(np.float64(_f32(a) / _f32(emax)))
            k = exponent - 1 if mantissa == 0.5 else exponent
        else:
            mantissa, exponent = np.frexp(a)  # mantissa in [0.5, 1)
            carry = {"E2M1": 1.75, "E1M2": 1.875, "INT4": 1.875}[fmt.element] if fmt.scale_rule == "even" else 2.0
            k = exponent - 1 + (2 * mantissa >= carry) - int(np.floor(np.log2(emax)))
        scales.append(2.0 ** max(-127, int(k)))
    more = 4 / 3 if fmt.scale_rule == "four_thirds" else 1
    return np.array(scales, dtype=_f32) * _f32(more)


def _ternary(x: np.ndarray, fmt: Format) -> np.ndarray:
    """Ternary weight networks by their definition, row by row or (``per_tensor``) for all numbers."""
    groups = [x] if fmt.per_tensor else list(x)
    out = []
    for numbers in groups:
        magnitude = np.abs(numbers.astype(np.float64))
        delta = _f32(0.7 * magnitude.mean())
        kept = magnitude > delta
        alpha = _f32(magnitude[kept].mean()) if kept.any() else _f32(0)
        if fmt.scale == "FP16":
            alpha = _f32(min(alpha, _f32(65504)).astype(np.float16))
        if alpha == 0:
            alpha = _f32(1)
        out.append(np.where(kept, np.copysign(alpha, numbers), _f32(0)))
    return np.concatenate(out).reshape(x.shape).astype(_f32)


def _sawb(x: np.ndarray, fmt: Format) -> np.ndarray:
    """SAWB by its definition: the range [-a, a] cut into equal steps, the nearest of their ends, a tie to the even."""
    bits = fmt.bits
    c1, c2 = {2: (3.12, -2.064), 3: (7.509, -6.892), 4: (12.68, -12.80)}[bits]
    w = x.astype(np.float64)
    absolute = np.abs(w).mean()
    a = max(c1 * np.sqrt((w**2).mean()) + c2 * absolute, absolute)
    steps = 2**bits - 1 if fmt.element.startswith("MID") else 2**bits - 2
    emax = _f32(steps / 2)
    s = _f32(min(a / float(emax), float(np.finfo(_f32).max)))
    if fmt.scale == "FP16":
        s = _f32(min(s, _f32(65504)).astype(np.float16))
    s = _f32(2**-24) if s == 0 else s
    levels = np.arange(steps + 1) - steps / 2
    thresholds = np.append((levels[1:] + levels[:-1]) / 2, np.inf)
    y = (x / s).astype(np.float64)
    below = np.searchsorted(thresholds[:-1], y)
    even = np.floor(levels) % 2 == 0
    up = (y == thresholds[below]) & ~even[below]
    return _times(levels[below + up], s)


def _times(values: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Saturating, without a negative zero."""
    with np.errstate(over="ignore"):
        return (values.astype(_f32) * s + _f32(0)).clip(-np.finfo(_f32).max, np.finfo(_f32).max)


def _affine(x: np.ndarray, fmt: Format) -> np.ndarray:
    """Affine integers by their definition: of the whole numbers -z to emax - z the one nearest to x / s."""
    zero = np.zeros((len(x), 1), dtype=_f32)
    lo, hi = (extreme(np.concatenate([x, zero], 1), 1) for extreme in (np.min, np.max))
    if fmt.per_tensor:
        lo, hi = np.full_like(lo, lo.min()), np.full_like(hi, hi.max())
    emax = 2**fmt.bits - 1
    s = (hi / _f32(2) - lo / _f32(2)) / _f32(emax / 2)
    if fmt.scale == "FP16":
        s = np.minimum(s, _f32(65504)).astype(np.float16).astype(_f32)
    if fmt.scale in ("E4M3", "E5M2"):
        values = _SCALE_VALUES[fmt.scale]
        s = values[nearest(values, s, "even")].astype(_f32)
    if fmt.scale == "E8M0":
        exponents = np.log2(np.maximum(s.astype(np.float64), 2.0**-127))
        s = (2.0 ** (np.rint(exponents) if fmt.scale_rule == "even" else np.floor(exponents))).astype(_f32)
    s = np.where(s == 0, _f32(1), s)[:, None]
    z = np.minimum(np.rint(-lo[:, None] / s), emax)
    y = np.clip((x / s).astype(np.float64), -1000, 1000)  # far outside, where distances are still told apart
    best, chosen = np.full(x.shape, np.inf), np.zeros(x.shape)
    for v in range(-emax, emax + 1):
        distance = np.where((v >= -z) & (v <= emax - z), np.abs(y - v), np.inf)
        wins_tie = v % 2 == 0 if fmt.rounding == "even" else abs(v) > np.abs(chosen)
        better = (distance < best) | ((distance == best) & np.isfinite(distance) & wins_tie)
        best, chosen = np.where(better, distance, best), np.where(better, v, chosen)
    return _times(chosen, s)


def naive(x: np.ndarray, fmt: Format, g: np.ndarray | None) -> np.ndarray:
    """``x^`` of float32 blocks ``x`` [N, B] for the global scale ``g`` ([N] or None), rule by rule."""
    if fmt.scale_rule == "twn":
        return _ternary(x, fmt)
    if fmt.element.startswith("UINT"):
        return _affine(x, fmt)
    if fmt.scale_rule == "sawb":
        return _sawb(x, fmt)
    magnitudes = _MAGNITUDES[fmt.element]
    emax = _f32(magnitudes[-1])

    def stored_scale(amax: np.ndarray, expand: float) -> np.ndarray:
        if fmt.scale == "E8M0":
            return _power_of_two(amax, fmt)
        if fmt.scale == "FP32":
            s = amax / emax
            return np.where(s == 0, _f32(1), s)
        if g is None:
            t = amax / emax
        elif fmt.scale_rule == "divide":
            t = amax / emax * g
        elif fmt.scale_rule == "multiply":
            t = amax * (g / emax)
        else:
            t = np.maximum(amax / emax / (_f32(1) / g), _f32(2**-6))
        values = _SCALE_VALUES[fmt.scale]
        s = values[nearest(values, t * _f32(expand), fmt.rounding if fmt.asymmetric else "even")].astype(_f32)
        return np.where(s == 0, _f32(1 if g is None else 0.125), s)

    def round_block(s: np.ndarray) -> np.ndarray:
        if g is None:
            divisor = multiplier = s
        elif fmt.scale_rule == "reciprocal":
            kept = _f32(1) / g
            multiplier = s * kept
            inverse = np.minimum(np.minimum(_f32(1) / kept, np.finfo(_f32).max) / s, np.finfo(_f32).max)
            y = x * inverse[:, None]
        else:
            divisor = multiplier = s / g
        if fmt.scale_rule != "reciprocal":
            y = x / divisor[:, None]
        v = magnitudes[nearest(magnitudes, np.abs(y), fmt.rounding)].astype(_f32)
        return np.copysign(v, x) * multiplier[:, None] + _f32(0)

    def quantized(values: np.ndarray, expand: float = 1.0) -> np.ndarray:
        amax = np.full(len(values), values.max()) if fmt.per_tensor else values.max(-1)
        return round_block(stored_scale(amax, expand))

    with np.errstate(over="ignore"):
        if fmt.asymmetric:
            positive, negative = quantized(np.maximum(x, 0)), quantized(np.maximum(-x, 0))
            out = np.where(x < 0, negative, positive)
        else:
            out = quantized(np.abs(x))
            if fmt.adaptive:
                four = quantized(np.abs(x), 1.5)
                errors = [np.square((y - x).astype(np.float64)).sum(-1) for y in (four, out)]
                better = errors[0] < errors[1]
                out = np.where(better[:, None], four, out)
    return np.clip(out, -np.finfo(_f32).max, np.finfo(_f32).max).astype(_f32)


@pytest.fixture(scope="session")
def naive_twin() -> Callable[..., np.ndarray]:
    return naive
