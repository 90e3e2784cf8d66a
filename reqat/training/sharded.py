"""The checkpoint of several processes: a folder in which each writes the parts of weights and moments that it holds.

torch.distributed.checkpoint writes and reads it, in safetensors (each file says where its parts belong), so that any
number of processes, or one, goes on from it: each reads what it needs. ``position.json`` holds what the single file's
metadata does (:mod:`reqat.training.checkpoint`), the optimizer's step counts, and the sha256 of every file. The folder
is written under another name and renamed when it is whole; only then the one before is removed. Machines that train
together need a file system that all of them see.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from reqat.config.base import digest
from reqat.config.errors import ReqatError
from reqat.config.files import explain, flush, os_error, read_json, write_file
from reqat.training import distributed

FILE = "position.json"
FORMAT = "1"
_NAME = re.compile(r"sharded-(\d{8})")
_REMEDY = "delete that folder to start the stage anew"


def newest(folder: Path) -> Path | None:
    """The whole checkpoint of the most steps in ``folder``; None where there is none."""
    return max((path for path in _all(folder) if (path / FILE).is_file()), key=steps, default=None)


def steps(path: Path) -> int:
    """The optimizer steps that a checkpoint had done, by its name."""
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found else 0


def remove(folder: Path, but: Path | None = None) -> None:
    """Remove the checkpoints in ``folder``, and what a killed run left of one, except ``but``."""
    for path in _all(folder):
        if path != but:
            shutil.rmtree(path, ignore_errors=True)


def _all(folder: Path) -> list[Path]:
    return [path for path in folder.glob("sharded-*") if path.is_dir()]


def parameter_of(key: str) -> str:
    """The parameter that a stored tensor belongs to: of ``model.NAME`` and ``optimizer.MOMENT.NAME``, NAME."""
    kind, _, rest = key.partition(".")
    return rest.partition(".")[2] if kind == "optimizer" else rest


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, position: Mapping[str, Any]) -> None:
    """Write the state; every process calls it. ``position`` as for one process, with ``result``'s ``steps``.

    Raises `ReqatError`, on every process, where the disk of one is full or refuses; the previous checkpoint then still
    stands.
    """
    from torch.distributed import checkpoint as dcp

    ranks = distributed.current()
    target = folder / f"sharded-{position['result']['steps']:08d}"
    partial = target.with_name(f"{target.name}.tmp")
    tensors: dict[str, Tensor] = {}
    counts: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            if key == "step":
                counts[name] = float(value)
            else:
                tensors[f"optimizer.{key}.{name}"] = value.detach()
    with ranks.alike(), _explained(folder):
        if ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    writer = dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True)
    with _explained(folder):
        dcp.save(tensors, storage_writer=writer, process_group=ranks.waiting)
    with ranks.alike(), _explained(folder):
        own = {path.name: _sha256(path) for path in sorted(partial.glob("*.safetensors"))[ranks.rank :: ranks.size]}
        for name in own:
            flush(partial / name)
    files = {name: sha256 for found in ranks.everyone(own) for name, sha256 in found.items()}
    with ranks.alike(), _explained(folder):
        if ranks.first:
            said = {"format": FORMAT, "position": json.loads(json.dumps(position)), "counts": counts, "files": files}
            write_file(partial / FILE, json.dumps({**said, "digest": digest(said)}))
            shutil.rmtree(target, ignore_errors=True)
            os.replace(partial, target)
            flush(folder)
            remove(folder, but=target)


@contextlib.contextmanager
def _explained(folder: Path) -> Any:
    """What the system refuses, of this process or another (torch's CheckpointException), as a ReqatError."""
    from torch.distributed.checkpoint.api import CheckpointException  # of dcp.save: what failed in which process

    try:
        yield
    except (OSError, SafetensorError, CheckpointException) as error:
        failures = list(error.failures.values()) if isinstance(error, CheckpointException) else []
        causes = [found for failure in failures if (found := os_error(failure[0])) is not None]
        cause: BaseException = causes[0] if causes else error
        text = explain(cause, folder) if isinstance(cause, Exception) else " ".join(str(cause).split())[:300]
        raise ReqatError(
            f"cannot write the checkpoint in {folder} ({text}) Free some space there, or make it writable; the run "
            "goes on from the last one."
        ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(path: Path) -> tuple[dict[str, tuple[torch.Size, torch.dtype]], dict[str, Any]]:
    """Shape and type of every tensor in a checkpoint, and its position; in ``position["counts"]`` the optimizer's step
    counts by parameter. Each process compares the digests of its share of the files.

    Raises ReqatError for a checkpoint that is damaged or of another format.
    """
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    ranks = distributed.current()
    said = read_json(path / FILE, "position of a checkpoint", _REMEDY)
    if said.get("format") != FORMAT:
        raise ReqatError(
            f"checkpoint {path} has format {said.get('format')!r}, this version of reqat reads {FORMAT!r}: finish the "
            f"run with the version that began it, or {_REMEDY}"
        )
    stated = said.pop("digest", None)
    if stated != digest(said):
        raise ReqatError(f"checkpoint {path} is damaged: {FILE} is not what was written; {_REMEDY}")
    there = {file.name for file in path.glob("*.safetensors")}
    for name in sorted(said["files"].keys() ^ there):
        raise ReqatError(
            f"checkpoint {path} is damaged: {name} is {'extra' if name in there else 'missing'}; {_REMEDY}"
        )
    for name in sorted(there)[ranks.rank :: ranks.size]:
        if _sha256(path / name) != said["files"][name]:
            raise ReqatError(f"checkpoint {path} is damaged: {name} is not what was written; {_REMEDY}")
    found = dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    described = {
        name: (about.size, about.properties.dtype)
        for name, about in found.items()
        if isinstance(about, TensorStorageMetadata)
    }
    return described, {**said["position"], "counts": said["counts"]}


def read(
    path: Path, described: Mapping[str, tuple[torch.Size, torch.dtype]], position: Mapping[str, Any],
    parameters: Mapping[str, Tensor],
) -> dict[str, Tensor]:  # fmt: skip
    """The stored tensors that belong to ``parameters``, each divided as its parameter is (or whole, where that is),
    under the names that the single file has."""
    from torch.distributed import checkpoint as dcp

    ranks = distributed.current()
    tensors = {
        name: torch.empty_like(parameters[parameter_of(name)], dtype=dtype, requires_grad=False)
        for name, (shape, dtype) in described.items()
        if parameter_of(name) in parameters and shape == parameters[parameter_of(name)].shape
    }
    dcp.load(
        tensors,
        storage_reader=dcp.HuggingFaceStorageReader(str(path)),
        process_group=ranks.waiting,
        no_dist=not ranks.sharded,
    )
    counts = {f"optimizer.step.{name}": torch.tensor(float(n)) for name, n in position["counts"].items()}
    return tensors | counts
