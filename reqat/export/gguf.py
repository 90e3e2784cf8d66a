"""GGUF for llama.cpp: ``model.gguf`` with NVFP4 (ggml type 40) or MXFP4 (type 39) matrices.

Rows of a matrix are blocks. MXFP4: 32 columns in 17 bytes, the E8M0 scale, then codes j and j + 16 of the block in byte
j, low half first. NVFP4: 64 columns in 36 bytes, four scales (E4M3 without its sign), then for each 16 columns eight
bytes of codes j and j + 8; the reciprocal of the global scale is a tensor of its own, ``blk.N.NAME.scale`` float32 [1],
and that of the inputs ``.input_scale``.

Llama's rotary embedding turns neighbouring channels in ggml and halves of a head in transformers, so the rows of its
queries and keys, scales and biases with them, are in another order there. Everything else goes by names:
``gguf.get_tensor_name_map``. Matrices that are not quantized are bfloat16, vectors float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.export._exporter import OURS, Exporter, Frozen, Layer, left_out
from reqat.export._vocabulary import write_vocabulary
from reqat.formats import QuantizedTensor
from reqat.models import quant_linears
from reqat.models.adapters import cached_attentions
from reqat.models.pretrained import plain_state
from reqat.quant import Precision

NAME = "gguf"
FILE = "model.gguf"
_TYPES = {"NVFP4": "NVFP4", "NVFP4-4/6": "NVFP4", "MXFP4": "MXFP4"}
_FILE_TYPES = {"NVFP4": "MOSTLY_NVFP4", "MXFP4": "MOSTLY_MXFP4_MOE"}
_SUPERBLOCK = 64  # columns of a block of ggml's NVFP4
# model_type -> llama.cpp's architecture, and whether rows of queries and keys are reordered there.
_ARCHITECTURES = {"llama": ("LLAMA", True), "qwen2": ("QWEN2", False), "qwen3": ("QWEN3", False)}


def check(model: PreTrainedModel, precision: Precision) -> None:
    """Raise ReqatError for an architecture, a rotary embedding or a layer that is not written here."""
    config: Any = model.config
    if config.model_type not in _ARCHITECTURES:
        raise ReqatError(
            f"model type {config.model_type!r}: {NAME} is written for {', '.join(_ARCHITECTURES)}; {OURS}, or take "
            "--format compressed-tensors."
        )
    rope = _rope_type(config)
    if rope not in ("default", "llama3", "linear"):
        raise ReqatError(f"rope_type {rope!r}: {NAME} is written for default, linear and llama3 here; {OURS}.")
    heads = cached_attentions(model)[0][1].heads
    if config.model_type == "qwen2" and heads.query_heads * heads.head_dim != config.hidden_size:
        raise ReqatError(
            f"hidden_size {config.hidden_size}: llama.cpp takes Qwen2's heads to be as wide together, and these are "
            f"{heads.query_heads} of {heads.head_dim}; {OURS}."
        )
    if getattr(config, "use_sliding_window", False):
        raise ReqatError(f"use_sliding_window: llama.cpp attends to everything in {config.model_type} models; {OURS}.")
    if precision.weights is not None and _TYPES[precision.weights.name] == "NVFP4":
        unscaled = [name for name in quant_linears(model) if ".mlp." in name and config.model_type == "qwen2"]
        if unscaled:
            raise ReqatError(
                f"{unscaled[0]}.weight: llama.cpp leaves out the global scale of NVFP4 in the MLP of qwen2 models "
                "(llama-cpp-python 0.3.36), and its logits are NaN then; take MXFP4, --skip '*.mlp.*' or "
                "--format compressed-tensors."
            )
        for name, layer in quant_linears(model).items():
            if layer.in_features % _SUPERBLOCK:
                raise ReqatError(
                    f"{name}.weight: its {layer.in_features} columns are not divisible by {_SUPERBLOCK}, the block of "
                    f"GGUF's NVFP4; skip it (--skip {name}), or take MXFP4 or --format compressed-tensors."
                )


def _rope_type(config: Any) -> str:
    return str((getattr(config, "rope_parameters", None) or {}).get("rope_type", "default"))


def write(frozen: Frozen, folder: Path) -> None:
    """Write ``model.gguf``."""
    model, precision = frozen.model, frozen.precision
    config: Any = model.config
    architecture, reordered = _ARCHITECTURES[config.model_type]
    assert precision.weights is not None
    kind = _TYPES[precision.weights.name]
    writer = gguf.GGUFWriter(folder / FILE, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[architecture]])
    _describe(writer, frozen, kind)
    frozen.notes += left_out(model, precision, NAME, EXPORTER, cache=False)
    frozen.notes.append(
        "inputs: llama.cpp rounds the inputs of quantized matrices to 8 bits of its own, whatever is asked"
    )
    frozen.notes += write_vocabulary(writer, frozen.tokenizer, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], config.num_hidden_layers)
    heads = _rows_of_heads(model) if reordered else {}

    def ordered(name: str, values: np.ndarray) -> np.ndarray:
        return interleaved(values, heads[name]) if name in heads else values

    for name, tensor in plain_state(model).items():
        layer_name, _, part = name.rpartition(".")
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ReqatError(f"{name}: GGUF has no name for it in {config.model_type} models; {OURS}.")
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp takes the embedding then
        if part == "weight" and layer_name in frozen.layers:
            _add_codes(writer, target, frozen.layers[layer_name], kind, heads.get(layer_name))
        else:
            _add_dense(writer, target, ordered(layer_name, tensor.detach().float().cpu().numpy()))
    if (factors := _rope_factors(model)) is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, frozen: Frozen, kind: str) -> None:
    """Shape, rotary embedding and type, as llama.cpp's own converter writes them."""
    config: Any = frozen.model.config
    heads = cached_attentions(frozen.model)[0][1].heads
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads.query_heads)
    writer.add_head_count_kv(heads.kv_heads)
    writer.add_key_length(heads.head_dim)
    writer.add_value_length(heads.head_dim)
    writer.add_rope_dimension_count(heads.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = getattr(config, "rope_parameters", None) or {}
    writer.add_rope_freq_base(float(rope.get("rope_theta", getattr(config, "rope_theta", 10000.0))))
    if _rope_type(config) == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _rows_of_heads(model: PreTrainedModel) -> dict[str, int]:
    """Name of each layer that makes queries or keys -> its heads."""
    found = {}
    for _, attention in cached_attentions(model):
        query, key, _ = attention.projections
        found[f"{attention.name}.{query}"] = attention.heads.query_heads
        found[f"{attention.name}.{key}"] = attention.heads.kv_heads
    return found


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """``rows`` [heads * D, ...] with channels j and j + D/2 of each head beside each other, as ggml rotates them."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def _rope_factors(model: PreTrainedModel) -> np.ndarray | None:
    """By what llama.cpp divides each frequency ([D / 2] float32), where scaling depends on the frequency."""
    if _rope_type(model.config) != "llama3":
        return None
    rotary: Any = model.get_submodule("model.rotary_emb")
    scaled = rotary.inv_freq.double().cpu()
    exponents = torch.arange(len(scaled), dtype=torch.float64) / len(scaled)
    theta = float(model.config.rope_parameters["rope_theta"])
    return (theta**-exponents / scaled).float().numpy()


def _add_codes(writer: Any, target: str, layer: Layer, kind: str, heads: int | None) -> None:
    codes, scales = _arrays(layer.quantized)
    if heads is not None:
        codes, scales = interleaved(codes, heads), interleaved(scales, heads)
    blocks = (nvfp4_blocks if kind == "NVFP4" else mxfp4_blocks)(codes, scales)
    writer.add_tensor(target, blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
    if kind == "NVFP4":
        stem = target.removesuffix(".weight")
        _add_scale(writer, f"{stem}.scale", layer.quantized.global_scale)
        _add_scale(writer, f"{stem}.input_scale", layer.input_global_scale)


def _add_scale(writer: Any, target: str, g: Tensor | None) -> None:
    if g is not None:
        writer.add_tensor(target, (1.0 / g.float().cpu()).reshape(1).numpy())


def _arrays(q: QuantizedTensor) -> tuple[np.ndarray, np.ndarray]:
    """Codes [N, K] and bytes of the block scales [N, blocks]."""
    return q.codes.cpu().numpy(), q.scales.cpu().contiguous().view(torch.uint8).numpy()


def mxfp4_blocks(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Bytes [N, K/32 * 17] of codes [N, K] and E8M0 scales [N, K/32]."""
    rows, columns = codes.shape
    halves = codes.reshape(rows, columns // 32, 2, 16)
    packed = halves[:, :, 0] | halves[:, :, 1] << 4
    return np.concatenate([scales[..., None], packed], -1, dtype=np.uint8).reshape(rows, -1)


def nvfp4_blocks(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Bytes [N, K/64 * 36] of codes [N, K] and E4M3 scales [N, K/16] (their bytes; none is negative)."""
    rows, columns = codes.shape
    halves = codes.reshape(rows, columns // 64, 4, 2, 8)
    packed = (halves[..., 0, :] | halves[..., 1, :] << 4).reshape(rows, -1, 32)
    return np.concatenate([scales.reshape(rows, -1, 4), packed], -1, dtype=np.uint8).reshape(rows, -1)


def _add_dense(writer: Any, target: str, values: np.ndarray) -> None:
    if values.ndim < 2:
        writer.add_tensor(target, values)
        return
    kind = gguf.GGMLQuantizationType.BF16
    writer.add_tensor(target, gguf.quantize(values, kind), raw_dtype=kind)


EXPORTER = Exporter(write, families=tuple(_TYPES), fuses=False, static_inputs=False, check=check)
