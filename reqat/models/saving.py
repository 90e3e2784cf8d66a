"""Save a model so that the folder is whole or not there.

Everything is written into a temporary folder beside the target, which is renamed at the end; a full disk, Ctrl-C or a
kill leaves no half checkpoint under the target's name.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reqat.config.errors import ReqatError
from reqat.config.files import explain, flush, os_error
from reqat.config.targets import listed, making, write_list
from reqat.models.linear import QuantLinear
from reqat.models.loading import quiet
from reqat.models.sidecar import Sidecar

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

    Raises ReqatError if something is there, another process is writing it, or the disk is full or not writable, naming
    the folder; nothing is left behind then.
    """
    folder = Path(folder)
    if getattr(model, "_reqat_packed", False):
        raise ReqatError(
            "a packed model has no dense weights to save: save the frozen model before pack(), and pack it again after "
            "loading"
        )
    source = str(getattr(model, "name_or_path", "") or "")
    inputs = [Path(source)] if source and Path(source).is_dir() else []
    with making(folder, listed(_KIND, "model"), replace=overwrite, inputs=inputs) as partial:
        try:
            with quiet():
                model.save_pretrained(partial, state_dict=_plain_state(model, dtype))
                if tokenizer is not None:
                    tokenizer.save_pretrained(partial)
            _fix_config(partial / "config.json", dtype)
            if sidecar := Sidecar.collect(model):
                sidecar.write(partial)
            for file in partial.iterdir():
                shutil.copymode(
                    partial / "config.json", file
                )  # safetensors writes files that only their owner can read
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


def _plain_state(model: PreTrainedModel, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The state dict with weights as a plain model would use them (rotated back where they are stored rotated)."""
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear) and module.frozen:
            state[f"{name}.weight"] = module.plain_weight()
    if dtype is not None:
        # Tied tensors are told by their storage, so cast each storage once.
        cast: dict[tuple[int, int], Tensor] = {}
        for name, tensor in state.items():
            if tensor.is_floating_point():
                state[name] = cast.setdefault((tensor.data_ptr(), tensor.numel()), tensor.to(dtype))
    return state


def _fix_config(file: Path, dtype: torch.dtype | None) -> None:
    """config.json describes the stored weights, and names no attention function or path that others do not have."""
    config = json.loads(file.read_text())
    if dtype is not None:
        config["dtype"] = str(dtype).removeprefix("torch.")
    for key in ("_attn_implementation", "attn_implementation", "_name_or_path"):
        config.pop(key, None)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
