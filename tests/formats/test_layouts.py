"""Packing, and checkpoints: our files read by the libraries' own code, theirs read by ours."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from reqat.formats import (
    LAYOUT_NAMES,
    Format,
    from_layout,
    get_format,
    input_global_scale,
    pack_codes,
    quantization_config,
    quantize,
    to_layout,
    unpack_codes,
)

SameBits = Callable[[Tensor, Tensor], None]
FORMAT_OF = {
    "nvfp4-pack-quantized": get_format("NVFP4"),
    "mxfp4-pack-quantized": get_format("MXFP4", scale_rule="even"),
    "modelopt": get_format("NVFP4", scale_rule="reciprocal"),
}


def weight(rows: int = 24, columns: int = 96, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.exp(torch.randn(rows, 1, generator=generator))


# --- packing ----------------------------------------------------------------------------------------------------------


@given(shape=st.lists(st.integers(0, 7), min_size=1, max_size=4), seed=st.integers(0, 1000), data=st.data())
def test_codes_survive_packing_along_any_axis(shape: list[int], seed: int, data: st.DataObject):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    codes = torch.randint(16, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack_codes(codes, axis)
    assert packed.shape[axis] == (codes.shape[axis] + 1) // 2
    assert torch.equal(unpack_codes(packed, codes.shape[axis], axis), codes)


def test_low_nibble_is_the_even_index():
    codes = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 15]], dtype=torch.uint8)
    assert pack_codes(codes).tolist() == [[0x21, 0x43], [0x65, 0xF7]]
    assert pack_codes(codes, axis=0).tolist() == [[0x51, 0x62, 0x73, 0xF4]]
    assert pack_codes(codes[:, :3]).tolist() == [[0x21, 0x03], [0x65, 0x07]]


def test_every_byte_unpacks_and_packs_again():
    packed = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    assert torch.equal(pack_codes(unpack_codes(packed, 512)), packed)


def test_a_packed_tensor_gives_everything_back(fmt: Format, same_bits: SameBits):
    q = quantize(torch.randn(3, 256), fmt)
    packed = q.pack()
    again = packed.unpack()
    same_bits(again.codes, q.codes)
    assert (again.format, again.axis, again.shape, again.dtype) == (q.format, q.axis, q.shape, q.dtype)
    same_bits(again.dequantize(), q.dequantize())
    same_bits(packed.dequantize(torch.float64), q.dequantize(torch.float64))
    assert packed.packed.nbytes * {2: 4, 3: 2, 4: 2, 8: 1}[fmt.bits] == q.codes.nbytes
    assert q.nbytes == packed.nbytes


def test_codes_of_two_bits_are_packed_four_a_byte_from_the_low_bits_up():
    codes = torch.tensor([[1, 2, 3, 0, 3]], dtype=torch.uint8)
    packed = pack_codes(codes, per_byte=4)
    assert packed.tolist() == [[0b00111001, 0b11]]
    assert torch.equal(unpack_codes(packed, 5, per_byte=4), codes)
    assert torch.equal(pack_codes(codes, per_byte=1), codes)


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_a_layout_round_trips_through_a_file(layout: str, tmp_path, same_bits: SameBits):
    q = quantize(weight(), FORMAT_OF[layout])
    tensors = to_layout(q, layout)
    save_file(tensors, tmp_path / "layer.safetensors")
    read = from_layout(load_file(tmp_path / "layer.safetensors"), layout, dtype=torch.float32)
    same_bits(read.codes, q.codes)
    same_bits(read.scales, q.scales)
    if (
        layout == "modelopt"
    ):  # the file holds 1/g, so g comes back to the last bit or its neighbour; the numbers are equal
        assert torch.allclose(read.block_scales(), q.block_scales(), rtol=2**-23, atol=0)
    else:
        same_bits(read.dequantize(), q.dequantize())
    again = to_layout(from_layout(tensors, layout), layout)
    for key, tensor in tensors.items():
        if not key.endswith("scale_2"):
            same_bits(again[key], tensor)


def test_names_types_and_shapes():
    tensors = to_layout(quantize(weight(), "NVFP4"), "nvfp4-pack-quantized", input_global_scale=100.0)
    described = {key: (value.dtype, tuple(value.shape)) for key, value in tensors.items()}
    assert described == {
        "weight_packed": (torch.uint8, (24, 48)),
        "weight_scale": (torch.float8_e4m3fn, (24, 6)),
        "weight_global_scale": (torch.float32, (1,)),
        "input_global_scale": (torch.float32, (1,)),
    }
    tensors = to_layout(quantize(weight(), "MXFP4"), "mxfp4-pack-quantized")
    described = {key: (value.dtype, tuple(value.shape)) for key, value in tensors.items()}
    assert described == {"weight_packed": (torch.uint8, (24, 48)), "weight_scale": (torch.uint8, (24, 3))}
    tensors = to_layout(quantize(weight(), "NVFP4"), "modelopt", input_global_scale=100.0)
    described = {key: (value.dtype, tuple(value.shape)) for key, value in tensors.items()}
    assert described == {
        "weight": (torch.uint8, (24, 48)),
        "weight_scale": (torch.float8_e4m3fn, (24, 6)),
        "weight_scale_2": (torch.float32, ()),
        "input_scale": (torch.float32, ()),
    }
    amax = weight().abs().amax()
    assert float(tensors["weight_scale_2"]) == pytest.approx(float(amax) / 2688, rel=2**-22)
    assert float(tensors["input_scale"]) == pytest.approx(0.01)
    for layout, scale in (("modelopt", 100.0), ("nvfp4-pack-quantized", 100.0)):
        stored = input_global_scale(to_layout(quantize(weight(), "NVFP4"), layout, input_global_scale=scale), layout)
        assert stored is not None and float(stored) == pytest.approx(scale, rel=2**-22)
        assert input_global_scale(to_layout(quantize(weight(), "NVFP4"), layout), layout) is None


@pytest.mark.parametrize("name", ["NVFP4", "NVFP4-4/6", "MXFP4"])
@pytest.mark.parametrize("seed", range(3))
def test_compressed_tensors_decompresses_our_files(name: str, seed: int, same_bits: SameBits):
    """Its own decompressor, its own configuration class; it computes in bfloat16, hence the type of the comparison."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationConfig

    layout = "mxfp4-pack-quantized" if name == "MXFP4" else "nvfp4-pack-quantized"
    compressor = MXFP4PackedCompressor if name == "MXFP4" else NVFP4PackedCompressor
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = QuantizationConfig.model_validate(quantization_config(layout, activations=True))
        scheme = config.config_groups["group_0"]
        for rule in ("ceil", "floor", "even") if name == "MXFP4" else (None,):
            q = quantize(weight(seed=seed), name, scale_rule=rule)
            tensors = to_layout(q, layout, input_global_scale=None if name == "MXFP4" else 1.0)
            theirs = compressor.decompress(tensors, scheme)["weight"]
            # It multiplies in bfloat16 (both factors rounded), we in float32: equal where S is a bfloat16.
            if name == "MXFP4":
                same_bits(q.dequantize(torch.bfloat16), theirs + 0.0)
            else:
                ours, theirs = q.dequantize(torch.bfloat16).float(), theirs.float()
                assert ((ours - theirs).abs() <= 2.0**-8 * ours.abs()).all()


def test_compressed_tensors_files_are_read_by_us(same_bits: SameBits):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationConfig

    q = quantize(weight(), "NVFP4")
    assert q.global_scale is not None
    config = QuantizationConfig.model_validate(quantization_config("nvfp4-pack-quantized", activations=False))
    state = {
        "weight": weight(),
        "weight_scale": q.scales.float(),
        "weight_global_scale": q.global_scale.reshape(1),
    }
    written = NVFP4PackedCompressor.compress(state, config.config_groups["group_0"])
    read = from_layout(written, "nvfp4-pack-quantized", dtype=torch.float32)
    same_bits(read.codes, q.codes)
    same_bits(read.dequantize(), q.dequantize())


def test_modelopts_convention_is_the_one_of_compressed_tensors_converter(same_bits: SameBits):
    """compressed-tensors' own converter turns our modelopt file into the file that we would have written."""
    converters = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.modelopt_nvfp4")
    q = quantize(weight(), "NVFP4")
    files = {f"layer.{key}": value for key, value in to_layout(q, "modelopt", input_global_scale=8.0).items()}
    converted = converters.ModelOptNvfp4Converter(targets=["re:.*layer$"]).process(files)
    ours = to_layout(q, "nvfp4-pack-quantized", input_global_scale=8.0)
    for key in ("weight_packed", "weight_scale"):
        same_bits(converted[f"layer.{key}"], ours[key])
    for key in ("weight_global_scale", "input_global_scale"):
        assert float(converted[f"layer.{key}"]) == pytest.approx(float(ours[key]), rel=2**-22)


def test_the_configuration_is_the_documented_one():
    config = quantization_config("nvfp4-pack-quantized", activations=True)
    group = config["config_groups"]["group_0"]
    assert config["format"] == group["format"] == "nvfp4-pack-quantized" and config["ignore"] == ["lm_head"]
    assert group["weights"]["strategy"] == "tensor_group" and group["weights"]["group_size"] == 16
    assert group["input_activations"]["dynamic"] == "local"
    config = quantization_config("mxfp4-pack-quantized", activations=True, ignore=("lm_head", "re:.*gate$"))
    group = config["config_groups"]["group_0"]
    assert group["weights"]["strategy"] == "group" and group["weights"]["scale_dtype"] == "torch.uint8"
    assert group["input_activations"]["dynamic"] is True and config["ignore"][1] == "re:.*gate$"
    weight_only = quantization_config("mxfp4-pack-quantized", activations=False)
    assert weight_only["config_groups"]["group_0"]["input_activations"] is None


# --- what cannot be stored, and damaged files -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("q", "layout", "message"),
    [
        (lambda: quantize(weight(), "MXFP4"), "nvfp4-pack-quantized", "not MXFP4"),
        (lambda: quantize(weight(), "NVFP4"), "mxfp4-pack-quantized", "not NVFP4"),
        (lambda: quantize(weight(), "AMXFP4"), "mxfp4-pack-quantized", "not AMXFP4"),
        (lambda: quantize(weight(), "NVFP4", element="E1M2"), "modelopt", "E1M2"),
        (lambda: quantize(weight(32, 96), "NVFP4", axis=0), "nvfp4-pack-quantized", "transpose"),
        (lambda: quantize(weight(4, 100), "NVFP4", pad=True), "nvfp4-pack-quantized", "100.*multiple of 16"),
        (lambda: quantize(weight(), "NVFP4", global_scale="row"), "modelopt", "one global scale"),
        (lambda: quantize(weight(), "NVFP4"), "gguf", "modelopt, mxfp4-pack-quantized, nvfp4-pack-quantized"),
    ],
)
def test_what_a_layout_cannot_express_is_refused(q: Callable, layout: str, message: str):
    with pytest.raises(ValueError, match=message):
        to_layout(q(), layout)


def test_mxfp4_has_no_input_scale():
    with pytest.raises(ValueError, match="no input scale"):
        to_layout(quantize(weight(), "MXFP4"), "mxfp4-pack-quantized", input_global_scale=1.0)
    assert input_global_scale({}, "mxfp4-pack-quantized") is None
    with pytest.raises(ValueError, match="modelopt"):
        quantization_config("modelopt", activations=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_scale": None}, "missing weight_scale"),
        ({"weight_packed": None, "weight_global_scale": None}, "missing weight_packed, weight_global_scale"),
        ({"weight_packed": torch.zeros(24, 48)}, "weight_packed.*float32.*uint8"),
        ({"weight_scale": torch.zeros(24, 6, dtype=torch.uint8)}, "weight_scale.*float8_e4m3fn"),
        ({"weight_packed": torch.zeros(24, 40, dtype=torch.uint8)}, "do not belong together"),
        ({"weight_packed": torch.zeros(12, 48, dtype=torch.uint8)}, "do not belong together"),
        ({"weight_scale": torch.full((24, 6), torch.nan).to(torch.float8_e4m3fn)}, "144 NaN or negative"),
        ({"weight_scale": torch.full((24, 6), -1.0).to(torch.float8_e4m3fn)}, "144 NaN or negative"),
        ({"weight_global_scale": torch.tensor([0.0])}, "weight_global_scale.*positive"),
        ({"weight_global_scale": torch.tensor([torch.inf])}, "weight_global_scale.*positive"),
        ({"weight_global_scale": torch.tensor([1.0, 2.0])}, "weight_global_scale.*positive"),
    ],
)
def test_a_damaged_layer_names_itself_and_the_tensor(change: dict[str, Tensor | None], message: str):
    tensors = to_layout(quantize(weight(), "NVFP4"), "nvfp4-pack-quantized")
    tensors = {key: value for key, value in {**tensors, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message) as error:
        from_layout(tensors, "nvfp4-pack-quantized", name="model.layers.3.mlp.up_proj")
    assert "model.layers.3.mlp.up_proj" in str(error.value)


def test_a_nan_exponent_is_refused():
    tensors = to_layout(quantize(weight(), "MXFP4"), "mxfp4-pack-quantized")
    tensors["weight_scale"] = torch.full_like(tensors["weight_scale"], 255)
    with pytest.raises(ValueError, match="72 NaN"):
        from_layout(tensors, "mxfp4-pack-quantized")


def test_unpacking_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="10 elements.*uint8.*5 bytes"):
        unpack_codes(torch.zeros(4, dtype=torch.uint8), 10)
    with pytest.raises(ValueError, match="must be uint8"):
        unpack_codes(torch.zeros(5), 10)


@pytest.mark.parametrize("name", ["TERNARY-row", "INT3-row", "INT8-row", "FP8-tensor"])
def test_engines_layouts_say_which_format_they_do_not_hold(name: str):
    q = quantize(torch.randn(4, 64), name)
    for layout in LAYOUT_NAMES:
        with pytest.raises(ValueError, match=f"{name}.*save_model"):
            to_layout(q, layout)
