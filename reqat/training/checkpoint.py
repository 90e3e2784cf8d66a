"""Checkpoints from which a killed run goes on to bit-identical weights.

One safetensors file holds the parameters, AdamW's moments and step counts and the random state; its metadata holds
the position in the data and the metrics so far. It is written beside the old one and renamed over it, so at any
moment there is one whole checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from reqat.config.errors import ReqatError
from reqat.config.files import explain, flush

FILE = "checkpoint.safetensors"


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, position: dict[str, Any]) -> None:
    """Write the state atomically. ``position`` is JSON: what else the loop needs to go on.

    Raises `ReqatError` naming the folder where the disk is full or refuses; the previous checkpoint then still stands.
    """
    tensors: dict[str, Tensor] = {f"model.{n}": p.detach() for n, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value.detach()
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    temporary = folder / f"{FILE}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({n: t.contiguous() for n, t in tensors.items()}, temporary, {"position": json.dumps(position)})
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, folder / FILE)
        flush(folder)
    except (OSError, SafetensorError) as e:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ReqatError(
            f"cannot write the checkpoint in {folder} ({explain(e, folder)}) Free some space there, or make it "
            "writable; the run goes on from the last one."
        ) from e


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Restore the state in place and return ``position``, or None where no checkpoint was written.

    Raises ``ValueError`` for a damaged checkpoint or one of another model.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as f:
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (safe_open is no mapping)
            position = json.loads(f.metadata()["position"])
    except (SafetensorError, KeyError, json.JSONDecodeError) as e:
        raise ValueError(f"checkpoint {path} is damaged ({e}); delete it to start the stage again") from e
    parameters = dict(model.named_parameters())
    stored = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    wrong = [
        n
        for n in parameters.keys() | stored.keys()
        if n not in stored or n not in parameters or stored[n].shape != parameters[n].shape
    ]
    if wrong:
        raise ValueError(
            f"checkpoint {path} is of another model: {sorted(wrong)[:3]} differ; delete it to start the stage again"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(stored[name])
    for name, parameter in parameters.items():
        state = {}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if (value := tensors.get(f"optimizer.{key}.{name}")) is not None:
                state[key] = value if key == "step" else value.to(parameter.device)
        if state:
            optimizer.state[parameter] = state
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    return position
