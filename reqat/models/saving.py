"""Save a model so that the folder is whole or not there.

Everything is written into a temporary folder beside the target, which is renamed at the end; a full disk, Ctrl-C or a
kill leaves no half checkpoint under the target's name.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reqat.config.errors import ReqatError
from reqat.config.files import explain, flush, os_error
from reqat.config.targets import listed, making, write_list
from reqat.models.loading import quiet
from reqat.models.pretrained import check_savable, write_pretrained

_KIND = "model"


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write model, tokenizer and sidecar to ``folder`` in the Hugging Face layout.

    Args:
        model: plain or prepared, frozen or not. The folder loads in plain transformers either way; a frozen model's
            codes are in the sidecar, from which ``load_model`` and ``prepare`` bring them back exactly.
        tokenizer: saved along, or None.
        folder: the target, absent or empty; its parent is made if need be.
        dtype: of the stored weights; the model's own if None.
        overwrite: replace a model that this function saved there, but for the one that ``model`` was loaded from. Files
            of others in that folder, or a model of others, are never replaced.

    ``model.save_pretrained`` of a prepared model writes the same files (:mod:`reqat.models.pretrained`), in place.

    Raises ReqatError if something is there, another process is writing it, or the disk is full or not writable, naming
    the folder, or for what cannot be saved (a packed model, a frozen weight that was changed, adapters); nothing is
    left behind then.
    """
    folder = Path(folder)
    if not isinstance(model, PreTrainedModel):
        raise ReqatError(f"save_model writes a transformers model, not {type(model).__name__} ({model!r:.60})")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        raise ReqatError(f"dtype {dtype!r}: weights are stored in torch.float32, torch.bfloat16 or torch.float16")
    check_savable(model, folder)
    source = str(getattr(model, "name_or_path", "") or "")
    inputs = [Path(source)] if source and Path(source).is_dir() else []
    with making(folder, listed(_KIND, "model"), replace=overwrite, inputs=inputs) as partial:
        try:
            with quiet():
                write_pretrained(model, partial, dtype=dtype)
                if tokenizer is not None:
                    tokenizer.save_pretrained(partial)
            for file in partial.iterdir():
                # safetensors writes files that only their owner can read.
                shutil.copymode(partial / "config.json", file)
                flush(file)
            write_list(partial, _KIND)
        except Exception as error:
            about_files = isinstance(error, OSError | SafetensorError) or os_error(error) is not None
            if isinstance(error, ReqatError) or not about_files:
                raise
            reason = str(explain(error, folder)).replace(str(partial), str(folder))
            raise ReqatError(
                f"cannot save the model to {folder}: {reason} Free disk space or choose another folder, then run it "
                "again (nothing was left half-written)."
            ) from error
    return folder
