"""Save a model so that the folder is whole or not there.

Everything is written into a temporary folder beside the target, which is renamed at the end; a full disk, Ctrl-C or a
kill leaves no half checkpoint under the target's name.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reqat.config.errors import ReqatError
from reqat.models.loading import quiet
from reqat.models.pretrained import check_savable, write_pretrained


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write model, tokenizer and sidecar to ``folder`` in the Hugging Face layout; replaces what was there.

    Args:
        model: plain or prepared, frozen or not. The folder loads in plain transformers either way; a frozen model's
            codes are in the sidecar, from which ``load_model`` and ``prepare`` bring them back exactly.
        tokenizer: saved along, or None.
        folder: the target; its parent is made if need be.
        dtype: of the stored weights; the model's own if None.

    ``model.save_pretrained`` of a prepared model writes the same files (:mod:`reqat.models.pretrained`), in place.

    Raises ReqatError if the disk is full or not writable, naming the folder, or for what cannot be saved (a packed
    model, a frozen weight that was changed, adapters); nothing is left behind then.
    """
    folder = Path(folder)
    check_savable(model, folder)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    old = folder.with_name(f"{folder.name}.{os.getpid()}.old.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        with quiet():
            write_pretrained(model, partial, dtype=dtype)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
        for file in partial.iterdir():
            shutil.copymode(partial / "config.json", file)  # safetensors writes files that only their owner can read
            _sync(file)
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        _sync(folder.parent)
    except (OSError, SafetensorError) as error:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        raise ReqatError(
            f"cannot save the model to {folder}: {error}; free disk space or choose another folder, then run it again "
            "(nothing was left half-written)"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
    return folder


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
