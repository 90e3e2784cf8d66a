"""Save a model so that the folder is whole or not there.

Everything is written into a temporary folder beside the target, which is renamed at the end; a full disk, Ctrl-C or a
kill leaves no half checkpoint under the target's name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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
    with whole_folder(folder, _KIND, "model", overwrite=overwrite, inputs=source_of(model)) as partial:
        write_pretrained(model, partial, dtype=dtype)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
    return folder


def source_of(model: PreTrainedModel) -> list[Path]:
    """The folder that ``model`` was loaded from, if it is one."""
    source = str(getattr(model, "name_or_path", "") or "")
    return [Path(source)] if source and Path(source).is_dir() else []


@contextmanager
def whole_folder(
    folder: Path, kind: str, what: str, *, overwrite: bool = False, inputs: Iterable[Path] = ()
) -> Iterator[Path]:
    """An empty folder to write a model into; if the body succeeds it is renamed to ``folder``, with a list of its files
    by which it is known as a ``kind`` of ours (``what`` for people).

    Raises ReqatError if something is there that may not be replaced, or naming ``folder`` where the system refuses to
    write; nothing is left behind then.
    """
    with making(folder, listed(kind, what), replace=overwrite, inputs=inputs) as partial:
        try:
            with quiet():
                yield partial
            share_files(partial)
            write_list(partial, kind)
        except Exception as error:
            about_files = isinstance(error, OSError | SafetensorError) or os_error(error) is not None
            if isinstance(error, ReqatError) or not about_files:
                raise
            reason = str(explain(error, folder)).replace(str(partial), str(folder))
            raise ReqatError(
                f"cannot save the {what} to {folder}: {reason} Free disk space or choose another folder, then run it "
                "again (nothing was left half-written)."
            ) from error


def share_files(folder: Path) -> None:
    """Let the files of ``folder`` be readable as its mode says: safetensors writes files that only their owner can
    read. Flushes them to disk."""
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)
            flush(file)
