"""Side by side with the public libraries; every known disagreement is pinned by a test of its own.

torchao and compressed-tensors are dependencies of the tests. modelopt, auto-round and fouroversix clash with other
pins, so they are optional: their tests run where the package can be imported.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from reqat.formats import get_format, global_scale_for, pack_codes, quantize, quantize_dequantize, unpack_codes

SameBits = Callable[[Tensor, Tensor], None]
DTYPES = [torch.float32, torch.bfloat16]
SPREADS = [0.0, 1.0, 2.0]  # standard deviation of the logarithm of a row's size


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def optional(module: str) -> Any:
    """Import, or skip: these packages fail in more ways than by being absent."""
    try:
        return importlib.import_module(module)
    except Exception as error:
        pytest.skip(f"{module}: {error}")


def weights(dtype: torch.dtype, spread: float, seed: int = 0, rows: int = 256, columns: int = 512) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(spread * torch.randn(rows, 1, generator=generator))
    return (torch.randn(rows, columns, generator=generator) * size).to(dtype)


def hard_cases(hard_blocks: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Hard blocks, without the ends of float32, which each library handles (or not) in a way of its own."""
    for name, x in hard_blocks.items():
        if name not in ("subnormal", "smallest", "tiny", "largest", "all binades", "one element", "wide range"):
            yield name, x


def near_a_tie(x: Tensor, S: Tensor) -> Tensor:
    """Whether x / S lies within float32's last bits of the middle between two E2M1 magnitudes."""
    y = x.double().unflatten(-1, (-1, 16)).abs() / S.double()[..., None]
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)
    return ((y[..., None] / ties - 1).abs() < 2.0**-21).any(-1).flatten(-2)


def differing(packed: Tensor, codes: Tensor) -> Tensor:
    """Where the codes packed in ``packed`` are not ``codes``."""
    return unpack_codes(packed, codes.shape[-1]) != codes


# --- torchao ----------------------------------------------------------------------------------------------------------

torchao_nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
torchao_mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")


def torchao_nvfp4_of(x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(scales, packed codes, dequantized float32) for the per-tensor scale ``kept``, a multiplier."""
    scales, packed = torchao_nvfp4.nvfp4_quantize(x.contiguous(), per_tensor_scale=kept)
    tensor = torchao_nvfp4.NVFP4Tensor(packed, scales, 16, x.dtype, kept)
    return scales, packed, tensor.dequantize(torch.float32)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reciprocal_nvfp4_is_torchaos_bit_for_bit(dtype: torch.dtype, spread: float, same_bits: SameBits):
    for seed in range(3):
        x = weights(dtype, spread, seed)
        q = quantize(x, "NVFP4", scale_rule="reciprocal")
        assert q.global_scale is not None
        scales, packed, values = torchao_nvfp4_of(x, torchao_nvfp4.per_tensor_amax_to_scale(x.abs().amax()))
        same_bits(q.scales, scales.view_as(q.scales))
        same_bits(q.pack().packed, packed)
        # torchao multiplies by the amax / 2688 it kept, we by the reciprocal of g: equal for equal multipliers.
        _, packed, values = torchao_nvfp4_of(x, 1 / q.global_scale)
        same_bits(q.pack().packed, packed)
        same_bits(q.dequantize(torch.float32), values + 0.0)


def test_reciprocal_nvfp4_is_torchaos_on_hard_blocks(hard_blocks: dict[str, Tensor], same_bits: SameBits):
    for name, x in hard_cases(hard_blocks):
        if name in ("zeros", "negative zeros"):
            continue  # torchao has no finite scale for a tensor of zeros
        q = quantize(x, "NVFP4", scale_rule="reciprocal")
        assert q.global_scale is not None
        scales, packed, values = torchao_nvfp4_of(x, 1 / q.global_scale)
        same_bits(q.scales, scales.view_as(q.scales))
        same_bits(q.pack().packed, packed)
        same_bits(q.dequantize(torch.float32), values + 0.0)


def test_default_nvfp4_differs_from_torchao_only_in_scales_below_2_to_minus_6():
    """Disagreement: torchao raises E4M3 scales to the smallest normal one; the default keeps subnormal ones."""
    x = weights(torch.float32, 2.0)
    q = quantize(x, "NVFP4")
    assert q.global_scale is not None
    scales, packed, _ = torchao_nvfp4_of(x, 1 / q.global_scale)
    theirs, ours = scales.float().view_as(q.scales), q.scales.float()
    assert torch.equal(theirs, ours.clamp(min=2.0**-6).where(ours != 0.125, theirs))
    small = (ours < 2.0**-6) | (ours == 0.125)
    assert small.any() and (theirs[small] <= 2.0**-6).logical_or(ours[small] == 0.125).all()
    agree = ~small.repeat_interleave(8, -1)
    # The other rounding of the quotient, x * ((1/p)/s) against x / (s/g), moves none of these codes.
    assert torch.equal(packed[agree], q.pack().packed[agree])


def test_dividing_and_multiplying_by_the_reciprocal_break_ties_differently():
    """Disagreement: bfloat16 data hit ties exactly, and the last bit of the quotient then decides the code."""
    # Numbers of eight bits, as bfloat16 has them; the tensor's maximum is 192, each row's block maximum another.
    largest = torch.arange(128, 193).float()[:, None]
    numbers = torch.arange(-255, 257).float().unflatten(0, (-1, 16))
    x = torch.cat(
        [numbers.clamp(-m, m).index_fill(1, torch.tensor([0]), m).flatten()[None] for m in largest[:, 0].tolist()]
    )
    assert torch.equal(x, x.bfloat16().float())
    divide, reciprocal = quantize(x, "NVFP4"), quantize(x, "NVFP4", scale_rule="reciprocal")
    differ = divide.codes != reciprocal.codes
    assert 0 < differ.sum() < 0.01 * x.numel()
    assert near_a_tie(x, divide.block_scales())[differ].all()
    x = weights(torch.float32, 0.0)
    assert torch.equal(quantize(x, "NVFP4").codes, quantize(x, "NVFP4", scale_rule="reciprocal").codes)


def test_amax_over_six_times_g_and_amax_times_g_over_six_differ():
    """Disagreement: the order of two float32 operations moves E4M3 scales that lie on a tie, and so the codes."""
    amax = torch.arange(128, 256).float()[:, None]
    x = torch.cat((amax, torch.zeros(128, 15)), 1)
    total = 0
    for largest in (176.0, 184.0, 196.0, 204.0, 224.0):
        g = global_scale_for(torch.tensor([largest]), "NVFP4")
        divide, multiply = (quantize(x, "NVFP4", global_scale=g, scale_rule=rule) for rule in ("divide", "multiply"))
        a, b = divide.scales.double()[:, 0], multiply.scales.double()[:, 0]
        exact = amax[:, 0].double() * 448 / largest
        differ = a != b
        total += int(differ.sum())
        assert torch.allclose(exact[differ], (a + b)[differ] / 2, rtol=1e-6)  # each of them is a tie
    assert total > 0


MODES = {"floor": "FLOOR", "ceil": "RCEIL", "even": "EVEN"}


@pytest.mark.parametrize("rule", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mxfp4_is_torchaos_to_mx_bit_for_bit(
    rule: str, dtype: torch.dtype, hard_blocks: dict[str, Tensor], same_bits: SameBits
):
    mode = getattr(importlib.import_module("torchao.prototype.mx_formats.config").ScaleCalculationMode, MODES[rule])
    cases = [weights(dtype, spread, seed) for seed in range(3) for spread in SPREADS]
    cases += [x.to(dtype) for _, x in hard_cases(hard_blocks)]
    for x in cases:
        scales, packed = torchao_mx.to_mx(x.contiguous(), torch.float4_e2m1fn_x2, 32, mode)
        q = quantize(x, "MXFP4", scale_rule=rule)
        same_bits(q.scales, scales.view(torch.uint8))
        zero_scale = q.scales == 0
        same_bits(q.pack().packed, packed)
        tensor = torchao_mx.MXTensor(
            packed, scales, torch.float4_e2m1fn_x2, 32, torch.float32, None, None, is_swizzled_scales=False
        )
        same = tensor.dequantize(torch.float32).unflatten(-1, (-1, 32))[~zero_scale]
        # At the end of float32 4 * 2^126 is infinite there; ours saturates.
        same = same.clamp(-torch.finfo(torch.float32).max, torch.finfo(torch.float32).max)
        same_bits(q.dequantize(torch.float32).unflatten(-1, (-1, 32))[~zero_scale], same + 0.0)


def test_torchaos_logarithm_is_off_just_above_powers_of_two():
    """Disagreement: on a CPU torchao's RCEIL takes ceil(log2(x)) in float32, too small by one at 2^k (1 + 2^-23).

    A block's maximum then lies just above 6 and is cut off; reading the exponent from the bits does not err.
    """
    mode = importlib.import_module("torchao.prototype.mx_formats.config").ScaleCalculationMode.RCEIL
    amax = torch.nextafter(6 * 2.0 ** torch.arange(-40, 41).float(), torch.tensor(torch.inf))
    x = torch.cat((amax[:, None], torch.zeros(81, 31)), 1)
    theirs = torchao_mx.to_mx(x, torch.float4_e2m1fn_x2, 32, mode)[0].view(torch.uint8)[:, 0].int()
    ours = quantize(x, "MXFP4").scales[:, 0].int()
    assert torch.equal(ours, torch.arange(-40, 41, dtype=torch.int32) + 128)
    assert set((ours - theirs).tolist()) == {0, 1}


@pytest.mark.parametrize("rule", MODES)
def test_torchao_flushes_the_smallest_exponent(rule: str):
    """Disagreement: torchao stores byte 0 (2^-127) but divides by 2^-126 or 1. Ours divides by what it stores."""
    mode = getattr(importlib.import_module("torchao.prototype.mx_formats.config").ScaleCalculationMode, MODES[rule])
    x = torch.zeros(1, 32)
    x[0, 0] = 4 * 2.0**-127
    theirs = torchao_mx.to_mx(x, torch.float4_e2m1fn_x2, 32, mode)
    q = quantize(x, "MXFP4", scale_rule=rule)
    assert theirs[0].view(torch.uint8).tolist() == q.scales.tolist() == [[0]]
    assert torch.equal(q.dequantize(), x) and q.codes[0, 0] == 6
    assert theirs[1][0, 0] < 6


# --- compressed-tensors -----------------------------------------------------------------------------------------------

ct_quantization = pytest.importorskip("compressed_tensors.quantization")


def compressed(x: Tensor, kind: str) -> tuple[dict[str, Tensor], Any, Any]:
    """What compressed-tensors makes of a weight: its observer's scales, its compressor; with class and scheme."""
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    nvfp4 = kind == "NVFP4"
    scale_dtype = torch.float8_e4m3fn if nvfp4 else torch.uint8
    block = 16 if nvfp4 else 32
    arguments = ct_quantization.QuantizationArgs(
        num_bits=4,
        type="float",
        strategy="tensor_group" if nvfp4 else "group",
        group_size=block,
        symmetric=True,
        dynamic=False,
        scale_dtype=scale_dtype,
        zp_dtype=scale_dtype,
    )
    scheme = ct_quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    blocks = x.unflatten(-1, (-1, block))
    state = {"weight": x}
    g = generate_gparam(x.amin(), x.amax()) if nvfp4 else None
    if g is not None:
        state["weight_global_scale"] = g
    state["weight_scale"], _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), arguments, global_scale=g)
    compressor = NVFP4PackedCompressor if nvfp4 else MXFP4PackedCompressor
    return compressor.compress(state, scheme), compressor, scheme


def ct_cases(hard_blocks: dict[str, Tensor]) -> Iterator[Tensor]:
    for seed in range(3):
        for spread in SPREADS:
            yield weights(torch.float32, spread, seed)
            yield weights(torch.bfloat16, spread, seed).float()
    for name, x in hard_cases(hard_blocks):
        if name not in ("zeros", "negative zeros", "huge"):  # their logarithm of a maximum near 2^128 overflows
            yield x


def test_default_nvfp4_is_compressed_tensors_bit_for_bit(hard_blocks: dict[str, Tensor], same_bits: SameBits):
    for x in ct_cases(hard_blocks):
        state, compressor, scheme = compressed(x, "NVFP4")
        q = quantize(x, "NVFP4")
        assert q.global_scale is not None
        same_bits(q.global_scale.reshape(1), state["weight_global_scale"])
        same_bits(q.scales, state["weight_scale"])
        # -0.0 is the one exception: x / scale keeps its sign there, sign(-0.0) drops it here.
        same_bits(q.pack().packed, pack_codes(q.codes))
        ours, theirs = q.pack().packed, state["weight_packed"]
        zeros = pack_codes(torch.where((x == 0) & torch.signbit(x), 8, 0).to(torch.uint8))
        same_bits(ours & ~zeros, theirs & ~zeros)
        same_bits(q.dequantize(torch.bfloat16), compressor.decompress(state, scheme)["weight"] + 0.0)


def test_even_mxfp4_is_compressed_tensors_bit_for_bit(hard_blocks: dict[str, Tensor], same_bits: SameBits):
    for x in ct_cases(hard_blocks):
        state, compressor, scheme = compressed(x, "MXFP4")
        q = quantize(x, "MXFP4", scale_rule="even")
        same_bits(q.scales, state["weight_scale"])
        zeros = pack_codes(torch.where((x == 0) & torch.signbit(x), 8, 0).to(torch.uint8))
        same_bits(q.pack().packed & ~zeros, state["weight_packed"] & ~zeros)
        same_bits(q.dequantize(torch.bfloat16), compressor.decompress(state, scheme)["weight"] + 0.0)


def test_blocks_of_zeros_are_stored_differently_and_mean_the_same():
    """Disagreement: the scale of all-zero blocks: torchao 2^-6, compressed-tensors and ours 0.125."""
    x = weights(torch.float32, 0.0)
    x[:, :64] = 0
    q = quantize(x, "NVFP4")
    assert q.global_scale is not None
    assert (torchao_nvfp4_of(x, 1 / q.global_scale)[0].float()[:, :4] == 2.0**-6).all()
    state, compressor, scheme = compressed(x, "NVFP4")
    assert (state["weight_scale"].float()[:, :4] == 0.125).all() and (q.scales.float()[:, :4] == 0.125).all()
    assert not compressed(x, "MXFP4")[0]["weight_scale"][:, :2].any()
    assert not quantize(x, "MXFP4", scale_rule="even").scales[:, :2].any()
    assert not compressor.decompress(state, scheme)["weight"][:, :64].any() and not q.dequantize()[:, :64].any()


def test_even_and_floor_differ_in_a_fifth_of_gaussian_blocks():
    """Disagreement: the default scale rules of the public codebases. log2(2 / 1.75) = 0.193 of maxima round up."""
    x = weights(torch.float32, 2.0, rows=4096)
    even, floor, ceil = (quantize(x, "MXFP4", scale_rule=rule).scales.int() for rule in ("even", "floor", "ceil"))
    assert (even != floor).float().mean() == pytest.approx(0.193, abs=0.01)
    assert ((ceil - floor) >= (even - floor)).all() and (ceil - floor <= 1).all()
    assert (ceil != even).any()


def test_compressed_tensors_computes_g_in_the_weights_own_type():
    """Disagreement: of a bfloat16 weight it rounds g to bfloat16; ours is float32. Its value can be passed in."""
    from compressed_tensors.quantization.utils import generate_gparam

    x = weights(torch.bfloat16, 0.0)
    theirs = generate_gparam(x.amin(), x.amax())
    ours = global_scale_for(x, "NVFP4")
    assert theirs.item() != ours.item() and theirs.item() == pytest.approx(ours.item(), rel=2**-7)
    assert quantize(x, "NVFP4", global_scale=theirs).global_scale == theirs


# --- optional: modelopt, auto-round, fouroversix ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nvfp4_is_modelopts_where_no_scale_underflows(dtype: torch.dtype, same_bits: SameBits):
    """Disagreement: scales that round to zero are raised to 2^-9 there, all-zero blocks store 1; ours store 0.125."""
    modelopt = optional("modelopt.torch.quantization.qtensor.nvfp4_tensor").NVFP4QTensor
    for spread in SPREADS:
        x = weights(dtype, spread)
        tensor, scales, kept = modelopt.quantize(x.clone(), 16)
        q = quantize(x, "NVFP4")
        normal = scales.float() >= 2.0**-6
        same_bits(q.scales[normal], scales[normal])
        differ = differing(tensor._quantized_data, q.codes) & normal.repeat_interleave(16, -1) & (x != 0)
        assert near_a_tie(x, q.block_scales())[differ].all()
        assert dtype != torch.float32 or not differ.any()
        assert float(kept) == pytest.approx(1 / float(q.global_scale), rel=2**-22)  # type: ignore[arg-type]


@pytest.mark.parametrize(("function", "rule"), [("quant_mx", "floor"), ("quant_mx_rceil", "ceil")])
def test_mxfp4_is_auto_rounds(function: str, rule: str, same_bits: SameBits):
    mxfp = optional("auto_round.data_type.mxfp")
    data_type = "mx_fp" if rule == "floor" else "mx_fp_rceil"
    for spread in SPREADS:
        x = weights(torch.float32, spread)
        theirs = getattr(mxfp, function)(x, 4, 32, data_type=data_type)[0]
        assert torch.equal(quantize_dequantize(x, "MXFP4", scale_rule=rule), theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_four_over_six_is_its_authors(dtype: torch.dtype):
    """Disagreement: they do not saturate, which shows at subnormal scales; last bits decide where errors tie."""
    reference = optional("fouroversix.quantize.pytorch.reference")
    for spread in SPREADS:
        x = weights(dtype, spread, rows=1024)
        packed, scales, _ = reference.quantize_to_fp4(x, use_blackwell_scale_layout=False)
        q = quantize(x, "NVFP4-4/6")
        theirs, ours = scales.float().view_as(q.scales), q.scales.float()
        normal = (theirs >= 2.0**-6) & (ours >= 2.0**-6)
        other_choice = (theirs != ours) & normal
        assert other_choice.sum() <= 1e-4 * other_choice.numel()
        differ = differing(packed, q.codes) & (normal & ~other_choice).repeat_interleave(16, -1)
        assert near_a_tie(x, q.block_scales())[differ].all()
        assert dtype != torch.float32 or not (other_choice.any() or differ.any())


def test_scale_rules_of_the_families_are_named():
    assert get_format("MXFP4").scale_rule == "rceil" and get_format("NVFP4").scale_rule == "divide"
    assert get_format("AMXFP4").rounding == "away" and get_format("NVFP4").rounding == "even"


@pytest.mark.parametrize("name", ["INT2-row", "INT3-g128", "INT4-g128", "INT8-row", "INT8-tensor"])
def test_integers_are_torchaos_symmetric_ones(name: str):
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    fmt = get_format(name)
    x = torch.randn(24, 256, generator=torch.Generator().manual_seed(0)) * 3
    most = 2 ** (fmt.bits - 1) - 1
    block = (24 if fmt.per_tensor else 1, fmt.block or 256)
    scale, zero = primitives.choose_qparams_affine(
        x, primitives.MappingType.SYMMETRIC, block, torch.int8, -most, most, scale_dtype=torch.float32
    )
    theirs = primitives.quantize_affine(x, block, scale, zero, torch.int8, -most, most)
    q = quantize(x, fmt)
    assert torch.equal(q.format.element_type.decode(q.codes), theirs.float())
    assert torch.equal(q.scales, scale.reshape(-1, q.scales.shape[1]).expand_as(q.scales))
    back = primitives.dequantize_affine(theirs, block, scale, zero, torch.int8, -most, most)
    assert torch.equal(q.dequantize(), back)
