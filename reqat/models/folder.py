"""What a Hugging Face folder must hold before transformers reads it.

transformers trusts a folder: a key of the wrong type ends in a traceback from its depths, a weight index may name any
file of the machine, and of weights that were quantized by another tool it makes something else than the model. Here
the configuration, the index and the headers of the weight files are read first, and what is wrong is one
:class:`~reqat.config.errors.ReqatError` that names the file, the key and the remedy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING
from transformers.activations import ACT2CLS

from reqat.config.errors import MissingFileError, ReqatError, unknown
from reqat.config.files import explain, read_json
from reqat.formats.described import is_ours
from reqat.formats.stored import JSON

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_CONFIG, TOKENIZER = "tokenizer_config.json", "tokenizer.json"
REMEDY = "correct it, or copy the checkpoint again"
READ = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "additional_chat_templates/*.jinja")
"""All that loading reads of a folder: weights and their index, configurations, sidecar, tokenizer, chat templates."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Files that quantizing tools put beside config.json, and whose they are.
_QUANTIZED_BY = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "quanto_qmap.json": "quanto",
    "qmodel.pt": "hqq",
}
_POSITIVE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
_TRUTHS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_DTYPES = ("float32", "float16", "bfloat16", "float64")
# Types of weights in a safetensors header, by what they mean.
_FLOATS = ("F64", "F32", "F16", "BF16")
_SHOWN = 3


class CheckpointNotFoundError(MissingFileError):
    """There is no model where one was expected."""


def files_read(folder: Path) -> list[Path]:
    """The files of a folder that loading its model and tokenizer may read (`READ`), in the order of their names."""
    return sorted(path for pattern in READ for path in folder.glob(pattern) if path.is_file())


def check_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a dense decoder, as it stands there.

    Raises ReqatError for a source that another tool has quantized (naming the method), for a model type that this
    version of transformers does not have (code that comes with a checkpoint is never run), and for a key of the wrong
    type or range.
    """
    file = folder / CONFIG
    config = read_json(file, "model configuration", REMEDY)
    check_unquantized(folder, config)
    _check_type(file, config)
    for key in _POSITIVE:
        value = config.get(key)
        if value is not None and (type(value) is not int or not 0 < value < 2**31):
            raise _wrong(file, key, value, "a number of 1 or more")
    for key in _TRUTHS:
        if config.get(key) is not None and type(config[key]) is not bool:
            raise _wrong(file, key, config[key], "true or false")
    for key in _TOKEN_IDS:
        _check_ids(file, key, config.get(key))
    pad, vocabulary = config.get("pad_token_id"), config.get("vocab_size")
    if type(pad) is int and vocabulary is not None and pad >= vocabulary:
        raise _wrong(file, "pad_token_id", pad, f"an id below vocab_size {vocabulary}")
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise _wrong(file, "architectures", names, "a list of class names")
    for key in ("hidden_act", "hidden_activation"):
        value = config.get(key)
        if value is not None and (not isinstance(value, str) or value not in ACT2CLS):
            raise unknown("activation", value, ACT2CLS, f"{file}: {key}")
    for key in ("dtype", "torch_dtype"):
        value = config.get(key)
        if value is not None and (not isinstance(value, str) or value.removeprefix("torch.") not in (*_DTYPES, "auto")):
            raise unknown("dtype", value, _DTYPES, f"{file}: {key}")
    return config


def _check_ids(file: Path, key: str, value: object) -> None:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    # Some published configurations say -1 where they mean none.
    if any(type(id) is not int or not -1 <= id < 2**31 for id in ids):
        raise _wrong(file, key, value, "a token id")


def _wrong(file: Path, key: str, value: object, wanted: str) -> ReqatError:
    return ReqatError(f"{file}: {key} is {value!r}, where {wanted} is needed; {REMEDY}.")


def _check_type(file: Path, config: dict[str, Any]) -> None:
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        return
    if config.get("auto_map"):
        raise ReqatError(
            f"{file}: model_type {kind!r} comes with its own code (auto_map), which is never run; take a checkpoint of "
            "a model that transformers has."
        )
    if not isinstance(kind, str) or not kind:
        raise _wrong(file, "model_type", kind, "the name of a model that transformers has, such as 'llama' or 'qwen3',")
    raise unknown("model_type", kind, ("llama", "qwen2", "qwen3", "mistral"), str(file))


def check_unquantized(folder: Path, config: dict[str, Any]) -> None:
    """Raise ReqatError, naming the method, for a checkpoint that another tool has quantized. Ours are dense beside
    their codes (:mod:`reqat.formats.described`)."""
    inner = config.get("text_config")
    for place in (config, inner if isinstance(inner, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if place.get(key) and not is_ours(place[key]):
                raise _quantized(folder, f"{folder / CONFIG} ({key})", _method(place[key]))
    for name, method in _QUANTIZED_BY.items():
        if (folder / name).is_file():
            raise _quantized(folder, str(folder / name), method)


def _method(described: Any) -> str:
    """What a ``quantization_config`` calls its method."""
    if not isinstance(described, dict):
        return repr(described)
    method = str(described.get("quant_method") or "")
    if not method and (described.get("load_in_4bit") or described.get("load_in_8bit")):
        method = "bitsandbytes"
    more = described.get("format") or described.get("quant_algo") or described.get("fmt")
    return f"{method or 'an unnamed method'}{f' ({more})' if isinstance(more, str) else ''}"


def _quantized(folder: Path, where: str, method: str) -> ReqatError:
    if (folder / JSON).is_file():
        return ReqatError(
            f"{where}: the checkpoint is quantized already, with {method}, and {JSON} lies beside it, as beside what "
            "`reqat export` writes for engines. Give the folder that it was exported from."
        )
    return ReqatError(
        f"{where}: the checkpoint is quantized already, with {method}; quantizing what was quantized gives another "
        "model than either. Give the dense checkpoint (float32, bfloat16 or float16) that it was made from."
    )


class Header(NamedTuple):
    """Where a tensor of a checkpoint lies, and its shape."""

    file: Path
    shape: tuple[int, ...]


def weight_headers(folder: Path) -> dict[str, Header]:
    """The tensors of a checkpoint: their files are there, inside the folder and whole; all are floats, each once.

    Raises CheckpointNotFoundError for a missing file, ReqatError for everything else.
    """
    index, single = folder / INDEX, folder / WEIGHTS
    if single.is_file():  # transformers prefers it to an index
        named = None
        files = [single]
    elif index.is_file():
        about = read_json(index, "weight index", "copy the checkpoint again")
        named = _named(index, about.get("weight_map"))
        files = [folder / name for name in sorted(set(named.values()))]
    else:
        pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
        if pickles:
            raise ReqatError(
                f"{folder} holds only pickled weights ({', '.join(pickles[:_SHOWN])}), which can execute code when "
                "read: convert them to safetensors first"
            )
        raise CheckpointNotFoundError(f"{folder} has no {WEIGHTS}")
    found: dict[str, Header] = {}
    for file in files:
        if not file.is_file():
            raise CheckpointNotFoundError(f"{file} is missing, but {index.name} names it; copy the checkpoint again")
        for name, shape in weight_shapes(file).items():
            if name in found:
                raise ReqatError(f"{name} is both in {found[name].file} and in {file.name}; copy the checkpoint again")
            found[name] = Header(file, shape)
    for name, file_name in (named or {}).items():
        if name not in found or found[name].file != folder / file_name:
            raise ReqatError(f"{index} names {name} in {file_name}, which does not hold it; copy the checkpoint again")
    if named is not None and not isinstance(about.get("metadata"), dict):
        raise ReqatError(f'{index} has no metadata, without which transformers does not read it; add "metadata": {{}}.')
    return found


def _named(index: Path, named: Any) -> dict[str, str]:
    """An index's ``weight_map``, tensor -> file name. A name may lead into the folder, and nowhere else."""
    if not isinstance(named, dict) or not named:
        raise _wrong(index, "weight_map", named, "an object of tensors and file names")
    for name, file in named.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise _wrong(index, f"weight_map.{name}", file, "the name of a safetensors file")
        path = PurePosixPath(file)
        if path.is_absolute() or ".." in path.parts or "\\" in file or "\0" in file:
            raise _wrong(index, f"weight_map.{name}", file, "a file inside the folder")
    return named


def weight_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file. Raises ReqatError where it cannot be read, or holds what is no float."""
    try:
        with file.open("rb"):  # safetensors says "No such file" of a file that it may not read
            pass
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118  (a file handle)
            types = {name: str(part.get_dtype()) for name, part in slices.items()}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    except SafetensorError as error:
        raise ReqatError(
            f"{file} is truncated or not a safetensors file ({error}); copy or make the checkpoint again"
        ) from error
    except OSError as error:
        raise explain(error, file) from error
    # An integer without axes counts something (the batches that a batch norm saw), and is no weight.
    wrong = [name for name, kind in types.items() if kind not in _FLOATS and (kind != "I64" or shapes[name])]
    if wrong:
        name = wrong[0]
        kind = types[name]
        fp8 = kind.startswith("F8")
        raise ReqatError(
            f"{file}: {name} is {kind}, where one of {', '.join(_FLOATS)} is needed ({len(wrong)} such tensors). The "
            f"checkpoint is {'quantized to FP8' if fp8 else 'quantized already, or damaged'}: give the dense one that "
            "it was made from."
        )
    return shapes


def check_finite(folder: Path | str, parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raise ReqatError naming the first of these tensors that holds NaN or infinity."""
    for name, tensor in parameters:
        # NaN wins both; no copy of the tensor is made.
        if tensor.numel() and not all(torch.isfinite(end) for end in torch.aminmax(tensor.detach())):
            raise ReqatError(
                f"{folder}: parameter {name} holds NaN or infinity (as {tensor.dtype}); the checkpoint is damaged or "
                "its training diverged"
            )


def check_layers(folder: Path, config: Mapping[str, Any], tensors: Iterable[str]) -> None:
    """Raise ReqatError where ``config`` asks for far more layers than have tensors: building them takes long."""
    layers = config.get("num_hidden_layers") or 0
    numbers = {int(number) for name in tensors for number in re.findall(r"\blayers?\.(\d{1,9})\.", name)}
    if numbers and layers > 2 * (max(numbers) + 1) + 64:
        raise ReqatError(
            f"{folder / CONFIG}: num_hidden_layers is {layers}, the weights have {max(numbers) + 1} layers; {REMEDY}."
        )


def check_generation(folder: Path) -> None:
    """Raise ReqatError if ``generation_config.json``, where there is one, is damaged: transformers would ignore it, and
    generate beyond the end of the answer."""
    file = folder / GENERATION
    if not file.is_file():
        return
    config = read_json(file, "generation configuration", REMEDY)
    for key in _TOKEN_IDS:
        _check_ids(file, key, config.get(key))


def check_tokenizer(folder: Path) -> None:
    """Raise ReqatError if ``tokenizer_config.json`` or ``tokenizer.json`` of a folder is not what its name says."""
    config = read_json(folder / TOKENIZER_CONFIG, "tokenizer configuration", REMEDY)
    limit = config.get("model_max_length")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float) or limit <= 0):
        raise _wrong(folder / TOKENIZER_CONFIG, "model_max_length", limit, "a number of tokens")
    file = folder / TOKENIZER
    if not file.is_file():
        return
    described = read_json(file, "tokenizer", REMEDY)
    model = described.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list) or not model["vocab"]:
        raise _wrong(file, "model", "an object" if isinstance(model, dict) else model, "an object with a vocab")
    vocabulary = model["vocab"]
    ids = vocabulary.values() if isinstance(vocabulary, dict) else ()
    added = described.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise _wrong(file, "added_tokens", added, "a list of objects")
    for id in (*ids, *(token.get("id") for token in added)):
        if type(id) is not int or not 0 <= id < 2**31:
            raise _wrong(file, "a token's id", id, "a number of 0 or more")
