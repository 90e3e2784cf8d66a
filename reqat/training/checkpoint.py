"""Checkpoints from which a killed run goes on to bit-identical weights.

One safetensors file holds the parameters, running statistics of batch norms, the optimizer's moments (and AdamW's step
counts) and the random state; its metadata holds
what run it is of, the position in the data and the metrics so far, and a digest of all of it. It is written beside the
old one and renamed over it, so at any moment there is one whole checkpoint. It is read whole and checked before
anything is changed, and taken up only by the run that wrote it: same traces, same weights at the start, same
precision, objective and settings.

Several processes write a folder instead, each its own part (:mod:`reqat.training.sharded`). Any number of processes
goes on from either.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from reqat.config.errors import ReqatError
from reqat.config.files import explain, flush, parse_json
from reqat.formats.digests import tensors_digest
from reqat.training import distributed, sharded

FILE = "checkpoint.safetensors"
FORMAT = "2"
_REMEDY = "delete that folder to start the stage anew"


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, position: Mapping[str, Any]) -> None:
    """Write the state atomically. ``position`` is JSON: ``run``, what the run is made of (text by name), and what else
    the loop needs to go on.

    Raises `ReqatError` naming the folder where the disk is full or refuses; the previous checkpoint then still stands.
    """
    if distributed.current().sharded:
        sharded.save(folder, model, optimizer, position)
        (folder / FILE).unlink(missing_ok=True)
        return
    trained = _trained(model)
    tensors: dict[str, Tensor] = {f"model.{n}": p.detach() for n, p in trained.items()}
    for name, parameter in trained.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value.detach()
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(position)
    temporary = folder / f"{FILE}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, {"format": FORMAT, "position": text, "digest": _digest(text, tensors)})
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, folder / FILE)
        flush(folder)
        sharded.remove(folder)
    except (OSError, SafetensorError) as e:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ReqatError(
            f"cannot write the checkpoint in {folder} ({explain(e, folder)}) Free some space there, or make it "
            "writable; the run goes on from the last one."
        ) from e


def _digest(position: str, tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(f"{FORMAT} {position} {tensors_digest(tensors)}".encode()).hexdigest()


def newest(folder: Path) -> Path | None:
    """The file or folder of the last whole checkpoint; None where there is none.

    There are two after a run that went on with another number of processes was killed between writing one and removing
    the other.
    """
    file, parts = folder / FILE, sharded.newest(folder)
    if not file.is_file():
        return parts
    if parts is None or _steps(file) >= sharded.steps(parts):
        return file
    return parts


def _steps(file: Path) -> int:
    """The steps that the checkpoint in ``file`` had done; 0 for a damaged one, about which reading it will speak."""
    try:
        with safe_open(file, "pt") as f:
            return int(json.loads((f.metadata() or {})["position"])["result"]["steps"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return 0


def load(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, run: Mapping[str, str]
) -> dict[str, Any] | None:
    """Restore the state in place and return ``position``, or None where no checkpoint was written.

    Raises ``ReqatError`` for a damaged checkpoint, one of another model, and one whose ``run`` differs, naming in what;
    model, optimizer and random state are then as they were.
    """
    path = newest(folder)
    ranks = distributed.current()
    ranks.agree({"checkpoint": path.name if path is not None else "none"})
    if path is None:
        return None
    parameters = _trained(model)
    if path.name == FILE:
        with ranks.alike():
            tensors, position = _read(path)
            _check_model(path, {n: (t.shape, t.dtype) for n, t in tensors.items()}, parameters)
            _check_run(path, position, run)
        tensors = {name: _divided(name, tensor, parameters) for name, tensor in tensors.items()}
    else:
        with ranks.alike():
            described, position = sharded.describe(path)
            _check_model(path, described, parameters)
            _check_run(path, position, run)
        tensors = sharded.read(path, described, position, parameters)
    kept = ("momentum_buffer",) if isinstance(optimizer, torch.optim.SGD) else ("step", "exp_avg", "exp_avg_sq")
    with ranks.alike():
        states = {name: _moments(path, name, parameters[name], tensors, kept) for name in parameters}
        for name in parameters:
            if not bool(torch.isfinite(distributed.local(tensors[f"model.{name}"])).all()):
                raise ReqatError(f"checkpoint {path}: {name} holds NaN or infinity; {_REMEDY}")
        random = tensors.get("random.cpu")
        now = torch.get_rng_state()
        if path.name == FILE and (random is None or (random.dtype, random.shape) != (now.dtype, now.shape)):
            raise ReqatError(f"checkpoint {path} is damaged: it has no valid random state; {_REMEDY}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"model.{name}"])
    for name, parameter in parameters.items():
        if states[name]:
            optimizer.state[parameter] = states[name]
    if random is not None and not ranks.sharded:  # several processes draw theirs anew at each step
        torch.set_rng_state(random)
        if "random.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random.cuda"])
    return position


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """What a training changes of a model: parameters, and the running statistics of batch norms."""
    found: dict[str, Tensor] = dict(model.named_parameters())
    for prefix, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            found |= dict(module.named_buffers(prefix, recurse=False))
    return found


def _check_model(
    path: Path, stored: Mapping[str, tuple[torch.Size, torch.dtype]], parameters: Mapping[str, Tensor]
) -> None:
    there = {n.removeprefix("model."): about for n, about in stored.items() if n.startswith("model.")}
    wrong = [
        n
        for n in parameters.keys() | there.keys()
        if n not in there or n not in parameters or there[n] != (parameters[n].shape, parameters[n].dtype)
    ]
    if wrong:
        raise ReqatError(f"checkpoint {path} is of another model: {sorted(wrong)[:3]} differ; {_REMEDY}")


def _check_run(path: Path, position: Mapping[str, Any], run: Mapping[str, str]) -> None:
    then = position.get("run")
    if not isinstance(then, dict):
        raise ReqatError(f"checkpoint {path} is damaged: it does not say of which run it is; {_REMEDY}")
    different = [name for name in {**run, **then} if run.get(name) != then.get(name)]
    if different:
        what = "; ".join(f"another {name}{_values(then.get(name), run.get(name))}" for name in different)
        raise ReqatError(
            f"checkpoint {path} belongs to another run: {what}. Run with what it was begun with, or {_REMEDY}"
        )


def _divided(key: str, tensor: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """A tensor of the file as this process holds it: divided as the parameter is that it belongs to."""
    parameter = parameters.get(sharded.parameter_of(key))
    return tensor if parameter is None or tensor.ndim == 0 else distributed.divided_like(tensor, parameter)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every tensor and the position, after comparing the digest."""
    try:
        with safe_open(path, "pt") as f:
            about = f.metadata() or {}
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except SafetensorError as e:
        raise ReqatError(f"checkpoint {path} is damaged ({e}); {_REMEDY}") from e
    except OSError as e:
        raise explain(e, path) from e
    if about.get("format") != FORMAT:
        raise ReqatError(
            f"checkpoint {path} has format {about.get('format')!r}, this version of reqat reads {FORMAT!r}: finish "
            f"the run with the version that began it, or {_REMEDY}"
        )
    text = about.get("position", "")
    if about.get("digest") != _digest(text, tensors):
        raise ReqatError(f"checkpoint {path} is damaged: its content is not what was written; {_REMEDY}")
    position = parse_json(text, f"checkpoint {path}", "position", _REMEDY)
    if not isinstance(position, dict):
        raise ReqatError(f"checkpoint {path} is damaged: its position is {position!r}; {_REMEDY}")
    return tensors, position


def _values(then: object, now: object) -> str:
    """Both values where they are short enough to be read; digests say nothing to people."""
    shown = [str(value) for value in (then, now)]
    digests = any(len(value) == 64 and " " not in value for value in shown)
    return "" if digests or None in (then, now) else f" ({shown[0]}, now {shown[1]})"


def _moments(
    path: Path, name: str, parameter: Tensor, tensors: Mapping[str, Tensor], kept: tuple[str, ...]
) -> dict[str, Tensor]:
    """The optimizer's state of one parameter, ``kept`` of it; empty where it had none."""
    found = {key: tensors[f"optimizer.{key}.{name}"] for key in kept if f"optimizer.{key}.{name}" in tensors}
    if not found:
        return {}
    if len(found) != len(kept):
        raise ReqatError(f"checkpoint {path} is damaged: moments of {name} are missing; {_REMEDY}")
    for key, value in found.items():
        if value.shape != (torch.Size([]) if key == "step" else parameter.shape) or not value.is_floating_point():
            raise ReqatError(f"checkpoint {path} is damaged: {key} of {name} has shape {tuple(value.shape)}; {_REMEDY}")
        held = distributed.local(value)
        if not bool(torch.isfinite(held).all()) or (key in ("step", "exp_avg_sq") and bool((held < 0).any())):
            raise ReqatError(f"checkpoint {path}: {key} of {name} is not finite, or negative; {_REMEDY}")
    return {key: value.to(parameter.device) for key, value in found.items()}
