"""``save_pretrained`` of a prepared model: a checkpoint that transformers loads to the same function, and a sidecar.

Trainer, accelerate, ``push_to_hub`` and scripts all call ``model.save_pretrained``, so :func:`reqat.models.prepare`
puts :func:`write_pretrained` in its place, on the model and not on its class; :func:`reqat.models.save_model` calls it,
too.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.config.files import explaining, write_file
from reqat.formats.described import described, is_ours
from reqat.formats.stored import CODES
from reqat.models.adapters import blocks_of
from reqat.models.experts import Experts
from reqat.models.folder import INDEX, WEIGHTS, weight_shapes
from reqat.models.linear import QuantLinear, stands_for
from reqat.models.peft import peft_modules
from reqat.models.report import Report
from reqat.models.sidecar import JSON, TENSORS, Sidecar
from reqat.quant import GradientRule, MeasuredState


def hook_saving(model: PreTrainedModel) -> None:
    """Let ``model.save_pretrained`` be :func:`write_pretrained`; copies and pickles of the model take that along."""
    model.save_pretrained = functools.partial(write_pretrained, model)  # type: ignore[method-assign]


def write_pretrained(
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    *,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> None:
    """What ``PreTrainedModel.save_pretrained`` does, with plain weights, the sidecar and a configuration for everyone.

    Args:
        model: plain or prepared, frozen or not.
        save_directory: the folder, written in place; a sidecar and an index in it are replaced or removed.
        state_dict: of this model, gathered by the caller (accelerate); what plain transformers does not know is left
            out of the checkpoint.
        dtype: of the stored weights; those of the model if None.
        kwargs: of ``PreTrainedModel.save_pretrained``.

    Raises ReqatError, before anything is written, for a packed model, for a frozen layer whose weight was changed, with
    adapters in the model (unless transformers' own integration saves them alone), and for what would leave the sidecar
    behind: ``push_to_hub=True`` (call ``model.push_to_hub``) and ``distributed_checkpoint=True``.
    """
    folder = Path(save_directory)
    check_savable(model, folder, **kwargs)
    own: Any = functools.partial(_save, model, folder, is_main_process=is_main_process, **kwargs)
    if getattr(model, "_hf_peft_config_loaded", False):  # transformers saves the adapter, and nothing of the model
        own(state_dict=state_dict)
        return
    sidecar = Sidecar.collect(model)
    state = plain_state(model, state_dict)
    if dtype is not None:
        state = _cast(state, dtype)
    if not is_main_process:
        own(state_dict=state)
        return
    for name in (JSON, TENSORS, INDEX):  # never one of other weights beside these, wherever this is interrupted
        with explaining(folder / name):
            (folder / name).unlink(missing_ok=True)
    own(state_dict=state)
    fix_config(folder / "config.json", dtype, getattr(model, "_reqat_report", None))
    if sidecar:
        _list_weights(folder)
        sidecar.write(folder)


def _list_weights(folder: Path) -> None:
    """An index of the only file of weights, as there is one of several: without it vLLM and SGLang take every
    safetensors file of a folder for weights, and the sidecar is one."""
    file = folder / WEIGHTS
    if file.is_file():
        header = 8 + int.from_bytes(file.open("rb").read(8), "little")  # its length, and what says what lies where
        index = {
            "metadata": {"total_size": file.stat().st_size - header},
            "weight_map": dict.fromkeys(sorted(weight_shapes(file)), WEIGHTS),
        }
        write_file(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _save(model: PreTrainedModel, folder: Path, **kwargs: Any) -> None:
    """transformers' own ``save_pretrained``. Where it finds a quantizer it would ask that for a state dict, and drop
    the one that it is given."""
    quantizer = model.__dict__.pop("hf_quantizer", None)
    try:
        type(model).save_pretrained(model, folder, **kwargs)
    finally:
        if quantizer is not None:
            model.hf_quantizer = quantizer


def plain_state(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of ``model``'s state dict that an ordinary checkpoint has, with weights as a plain model uses them.

    ``state`` is a state dict of ``model`` that is at hand, perhaps on another device. Raises ReqatError if a weight in
    it is not that of a frozen layer's codes.
    """
    ours: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        if isinstance(module, MeasuredState):
            ours |= {f"{prefix}{buffer}" for buffer in module.measured()}
        elif isinstance(module, GradientRule):
            ours |= {f"{prefix}{key}" for key in module.state_dict()}
        elif isinstance(module, QuantLinear):
            ours |= {f"{prefix}{codes}" for codes in CODES}
            given = state.get(f"{prefix}weight") if state is not None else None
            if given is None or module.quantized is None:
                continue
            given = module.as_rows(given.to(module.weight.device))
            if not stands_for(given, module.quantized, module.rotation, module.basis):
                raise ReqatError(
                    f"{prefix}weight: the layer is frozen, and the state_dict to save has another weight than its "
                    "codes stand for: save the model with its own state_dict, or before freeze()"
                )
    plain = {name: tensor for name, tensor in (state or model.state_dict()).items() if name not in ours}
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            module.fuse(plain, f"{name}.")
    return plain


def check_savable(model: PreTrainedModel, folder: Path, **kwargs: Any) -> None:
    """Raise ReqatError for what :func:`write_pretrained` refuses before it looks at a weight."""
    if getattr(model, "_reqat_packed", False):
        raise ReqatError(
            "a packed model has no dense weights to save: save the frozen model before pack(), and pack it again after "
            "loading"
        )
    if folder.exists() and not folder.is_dir():
        raise ReqatError(f"{folder} is a file, not a folder; choose another place for the model")
    if kwargs.get("push_to_hub"):
        raise ReqatError(
            "save_pretrained(push_to_hub=True) would leave the sidecar behind: call model.push_to_hub(repository)"
        )
    if kwargs.get("distributed_checkpoint"):
        raise ReqatError("distributed_checkpoint=True has no place for the sidecar: save without it")
    prepared = getattr(model, "_reqat_report", None) is not None
    if prepared and not getattr(model, "_hf_peft_config_loaded", False):
        held = [block.name for block in blocks_of(model) if peft_modules(block.module)]
        if held:
            raise ReqatError(
                f"{held[0]} holds adapters (LoRA), which a checkpoint of the model cannot hold: save them with the "
                "PEFT model's save_pretrained, or merge them first (merge_and_unload)"
            )


def _cast(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    # Tied tensors are told by their storage, so cast each storage once.
    cast: dict[tuple[int, int], Tensor] = {}
    return {
        name: cast.setdefault((tensor.data_ptr(), tensor.numel()), tensor.to(dtype))
        if tensor.is_floating_point()
        else tensor
        for name, tensor in state.items()
    }


def fix_config(file: Path, dtype: torch.dtype | None, report: Report | None = None) -> None:
    """config.json describes the stored weights and the precision, and names no attention function or path that others
    do not have."""
    config = json.loads(file.read_text())
    if report is not None and is_ours(config.get("quantization_config")):
        config["quantization_config"] = described(report.precision, report.skip)
    if dtype is not None:
        config["dtype"] = str(dtype).removeprefix("torch.")
    for key in ("_attn_implementation", "attn_implementation", "_name_or_path"):
        config.pop(key, None)
    write_file(file, json.dumps(config, indent=2, sort_keys=True) + "\n")
