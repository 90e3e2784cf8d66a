"""Model folders: quantized by others, damaged, or leading elsewhere; each is one error with file and remedy."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from reqat.config.errors import MissingFileError, ReqatError
from reqat.data import build_tokenizer
from reqat.formats import quantization_config, quantize, to_layout
from reqat.models import load_model, load_tokenizer, save_model

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=32,
        )
    )
    return save_model(model, build_tokenizer(["What is 1 + 2 ?", "It is 3 ."]), tmp_path_factory.mktemp("dense") / "m")


@pytest.fixture
def folder(dense: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dense, tmp_path / "m"))


def change_json(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


# Configurations as the tools' own documentation and published checkpoints have them.
QUANTIZED: dict[str, dict[str, Any]] = {
    "compressed-tensors": quantization_config("nvfp4-pack-quantized", activations=False),
    "compressed-tensors (mxfp4-pack-quantized)": quantization_config("mxfp4-pack-quantized", activations=True),
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
    "bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp8": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    "fbgemm_fp8": {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
    "modelopt (NVFP4)": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "torchao": {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}},
    "quanto": {"quant_method": "quanto", "weights": "int8"},
    "hqq": {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}},
    "aqlm": {"quant_method": "aqlm", "in_group_size": 8},
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    "an unnamed method": {"bits": 4},
}


@pytest.mark.parametrize("method", QUANTIZED)
def test_a_source_that_is_quantized_already_is_refused_with_its_method(method: str, folder: Path) -> None:
    for config in (
        {"quantization_config": QUANTIZED[method]},
        {"compression_config": QUANTIZED[method]},
        {"text_config": {"quantization_config": QUANTIZED[method]}},
    ):
        change_json(folder / "config.json", quantization_config=..., compression_config=..., text_config=...)
        load_model(folder)
        change_json(folder / "config.json", **config)
        with pytest.raises(ReqatError) as caught:
            load_model(folder)
        assert method in str(caught.value) and "config.json" in str(caught.value) and "dense" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "method"),
    [("hf_quant_config.json", "modelopt"), ("quantize_config.json", "gptq"), ("quant_config.json", "awq")],
)
def test_a_quantizing_tools_own_file_is_enough(name: str, method: str, folder: Path) -> None:
    (folder / name).write_text("{}")
    with pytest.raises(ReqatError, match=rf"{name}: .*{method}.*dense"):
        load_model(folder)


def test_quantized_weights_without_a_word_in_the_configuration(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    weight = state.pop(UP)
    for tensors in (
        {UP.replace("weight", key): value for key, value in to_layout(quantize(weight, "NVFP4"), layout).items()}
        for layout in ("nvfp4-pack-quantized", "modelopt")
    ):
        save_file({**state, **tensors}, folder / WEIGHTS, {"format": "pt"})
        with pytest.raises(ReqatError, match=rf"{WEIGHTS}: .*(F8_E4M3|U8).*dense"):
            load_model(folder)
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
        save_file({**state, UP: weight.to(kind), f"{UP}_scale_inv": torch.ones(1)}, folder / WEIGHTS, {"format": "pt"})
        with pytest.raises(ReqatError, match=rf"{WEIGHTS}: {UP} is F8_.*FP8.*dense"):
            load_model(folder)


@pytest.mark.parametrize("kind", ["I32", "U32", "I64x", "BOOL", "F8_E5M2"])
def test_the_header_of_the_weights_must_say_float(kind: str, folder: Path) -> None:
    """A header that calls a float32 tensor another type of that many bytes."""
    whole = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    header[UP]["dtype"] = kind
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
    with pytest.raises(ReqatError, match=f"{WEIGHTS}.*(copy|dense)"):
        load_model(folder)


CONFIG: dict[str, dict[str, Any]] = {
    "hidden_size": {"hidden_size": "32"},
    "hidden_size negative": {"hidden_size": -32},
    "hidden_size float": {"hidden_size": 32.5},
    "hidden_size huge": {"hidden_size": 2**30},
    "intermediate_size huge": {"intermediate_size": 2**30},
    "vocab_size huge": {"vocab_size": 2**30},
    "vocab_size beyond": {"vocab_size": 2**40},
    "num_hidden_layers huge": {"num_hidden_layers": 10**9},
    "num_hidden_layers true": {"num_hidden_layers": True},
    "num_attention_heads zero": {"num_attention_heads": 0},
    "num_key_value_heads list": {"num_key_value_heads": [1]},
    "head_dim zero": {"head_dim": 0},
    "max_position_embeddings text": {"max_position_embeddings": "many"},
    "hidden_act unknown": {"hidden_act": "gelou"},
    "hidden_act number": {"hidden_act": 3},
    "dtype unknown": {"dtype": "float12"},
    "dtype an attribute of torch": {"dtype": "nn"},
    "torch_dtype int": {"torch_dtype": "int8", "dtype": ...},
    "model_type unknown": {"model_type": "lama"},
    "model_type missing": {"model_type": ...},
    "model_type with its own code": {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}},
    "tie_word_embeddings text": {"tie_word_embeddings": "no"},
    "eos_token_id text": {"eos_token_id": "</s>"},
    "pad_token_id beyond": {"pad_token_id": 64},
    "rope_parameters a number": {"rope_parameters": 3},
    "rope type unknown": {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}},
    "rms_norm_eps text": {"rms_norm_eps": "small"},
    "architectures text": {"architectures": "LlamaForCausalLM", "num_attention_heads": 3},
}


@pytest.mark.parametrize("what", CONFIG)
def test_a_damaged_configuration_names_file_and_key(what: str, folder: Path) -> None:
    change_json(folder / "config.json", **CONFIG[what])
    key = next(iter(CONFIG[what]))
    with pytest.raises(ReqatError) as caught:
        load_model(folder)
    text = str(caught.value)
    assert "config.json" in text and "\n" not in text
    if "huge" not in what and key not in ("architectures", "rope_parameters"):
        assert key in text


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"model_type": "llama", "model_type": "llama"}', "\ufeff["])
def test_json_that_is_none(text: str, folder: Path) -> None:
    for name, load in (
        ("config.json", load_model),
        ("config.json", load_tokenizer),
        ("generation_config.json", load_model),
        ("tokenizer_config.json", load_tokenizer),
        ("tokenizer.json", load_tokenizer),
    ):
        kept = (folder / name).read_bytes()
        (folder / name).write_text(text)
        with pytest.raises(ReqatError, match=f"{name}.*copy the checkpoint again"):
            load(folder)
        (folder / name).write_bytes(kept)
    load_tokenizer(folder)


TOKENIZERS: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "no model": ("tokenizer.json", lambda t: t.pop("model")),
    "nothing": ("tokenizer.json", lambda t: t.clear()),
    "a model that is a text": ("tokenizer.json", lambda t: t.update(model="BPE")),
    "an unknown model": ("tokenizer.json", lambda t: t["model"].update(type="Nonsense")),
    "no vocabulary": ("tokenizer.json", lambda t: t["model"].update(vocab={})),
    "a negative id": ("tokenizer.json", lambda t: t["model"]["vocab"].update(word=-1)),
    "an id beyond all": ("tokenizer.json", lambda t: t["model"]["vocab"].update(word=2**70)),
    "an id that is a text": ("tokenizer.json", lambda t: t["model"]["vocab"].update(word="7")),
    "an added token without an id": ("tokenizer.json", lambda t: t["added_tokens"][0].pop("id")),
    "added tokens that are no list": ("tokenizer.json", lambda t: t.update(added_tokens={"a": 1})),
    "an unknown pre-tokenizer": ("tokenizer.json", lambda t: t.update(pre_tokenizer={"type": "Nonsense"})),
    "a limit that is a text": ("tokenizer_config.json", lambda t: t.update(model_max_length="long")),
    "an unknown class with its own code": (
        "tokenizer_config.json",
        lambda t: t.update(tokenizer_class="OwnTokenizer", auto_map={"AutoTokenizer": ["own.OwnTokenizer", None]}),
    ),
}


@pytest.mark.parametrize("what", TOKENIZERS)
def test_a_damaged_tokenizer_names_its_file(what: str, folder: Path) -> None:
    name, change = TOKENIZERS[what]
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(ReqatError, match=rf"tokenizer(_config)?\.json.*{'' if 'code' in what else 'copy'}"):
        load_tokenizer(folder)


def sharded(folder: Path) -> dict[str, Any]:
    """Put the weights into two files with an index; returns the index."""
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(state)
    for number in (0, 1):
        save_file({name: state[name] for name in names[number::2]}, folder / f"part-{number}.safetensors",
                  {"format": "pt"})  # fmt: skip
    weight_map = {name: f"part-{at % 2}.safetensors" for at, name in enumerate(names)}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    return index


INDEXES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a number as a file": lambda i: i["weight_map"].update({UP: 7}),
    "no file": lambda i: i["weight_map"].update({UP: None}),
    "a file outside": lambda i: i["weight_map"].update({UP: "../outside.safetensors"}),
    "a way out and back": lambda i: i["weight_map"].update({UP: "../m/part-0.safetensors"}),
    "an absolute path": lambda i: i["weight_map"].update({UP: "/etc/passwd.safetensors"}),
    "a pickle": lambda i: i["weight_map"].update({UP: "part-0.bin"}),
    "a file that is missing": lambda i: i["weight_map"].update({UP: "part-2.safetensors"}),
    "a tensor that is missing": lambda i: i["weight_map"].update({"model.extra.weight": "part-0.safetensors"}),
    "the other file": lambda i: i["weight_map"].update({name: "part-0.safetensors" for name in i["weight_map"]}),
    "no map": lambda i: i.pop("weight_map"),
    "an empty map": lambda i: i.update(weight_map={}),
    "a list": lambda i: i.update(weight_map=[UP]),
    "no metadata": lambda i: i.pop("metadata"),
}


@pytest.mark.parametrize("what", INDEXES)
def test_a_damaged_index_is_refused_and_leads_nowhere_else(what: str, folder: Path) -> None:
    index = sharded(folder)
    shutil.copy(folder / "part-0.safetensors", folder.parent / "outside.safetensors")
    load_model(folder)
    INDEXES[what](index)
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ReqatError, match=INDEX):
        load_model(folder)


def test_a_tensor_in_two_files_and_links_to_files_elsewhere(folder: Path) -> None:
    sharded(folder)
    outside = folder.parent / "blob"
    os.rename(folder / "part-0.safetensors", outside)
    (folder / "part-0.safetensors").symlink_to(outside)  # as the cache of the Hugging Face hub does
    load_model(folder)
    state = load_file(folder / "part-1.safetensors")
    name = next(iter(load_file(outside)))
    save_file({**state, name: torch.ones(2)}, folder / "part-1.safetensors", {"format": "pt"})
    with pytest.raises(ReqatError, match=f"{name} is both in"):
        load_model(folder)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_named(bad: float, folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    state[UP][3, 4] = bad
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(ReqatError, match=rf"m: .*{UP} holds NaN or infinity"):
        load_model(folder)


@contextmanager
def unreadable(file: Path) -> Iterator[None]:
    """Nobody but the superuser may read it, and we are not that one."""
    file.chmod(0)
    root = os.geteuid() == 0
    if root:
        for parent in (file, *file.parents)[1:4]:
            parent.chmod(0o755)
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        file.chmod(0o644)


def test_a_file_that_may_not_be_read_says_so(dense: Path) -> None:
    load_model(dense), load_tokenizer(dense)  # what they import is imported
    with tempfile_copy(dense) as folder:
        for name, load in (("config.json", load_model), (WEIGHTS, load_model), ("tokenizer.json", load_tokenizer)):
            with unreadable(folder / name), pytest.raises(ReqatError, match=f"{name}: no permission"):
                load(folder)


@contextmanager
def tempfile_copy(folder: Path) -> Iterator[Path]:
    """A copy where another user can get at (pytest's own folders are closed to others)."""
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        yield Path(shutil.copytree(folder, Path(place) / "m"))


def test_what_is_not_there_is_a_missing_file(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    for load, path in ((load_model, folder), (load_model, folder / "none"), (load_tokenizer, folder / "none")):
        with pytest.raises(MissingFileError):
            load(path)


def test_loading_draws_no_random_numbers(folder: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    load_model(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_folders_within_a_saved_model_stay_open(dense: Path, tmp_path: Path) -> None:
    """A tokenizer of several chat templates writes a folder of them."""
    tokenizer = load_tokenizer(dense)
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    folder = save_model(load_model(dense), tokenizer, tmp_path / "saved")
    inner = [path for path in folder.rglob("*") if path.is_dir()]
    assert inner and all(path.stat().st_mode & 0o700 == 0o700 for path in inner)
    assert all(path.stat().st_mode & 0o111 == 0 for path in folder.rglob("*") if path.is_file())
