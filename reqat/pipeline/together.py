"""A command in several processes: the first does all of it, and the others help with its trainings.

Locks, records, files and progress are the first process's alone. When it comes to a training it tells the others which
one, and all of them load the same model and traces and train together (:mod:`reqat.training.distributed`).
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import reqat_kernels
from reqat.config.stage import Stage
from reqat.training import distributed
from reqat_kernels.native import instruction_set


@contextlib.contextmanager
def together(device: distributed.Device, *, offload: bool = False) -> Iterator[bool]:
    """Whether this process is to do the command. The others have done their part when the block begins.

    Raises `ReqatError` where the processes differ in command line, code or versions, or another one is gone.
    """
    with distributed.joined(device, offload=offload) as ranks:
        if ranks.size > 1:
            with ranks.contact("at the start"):
                ranks.agree(_alike())
        if not ranks.first:
            from reqat.pipeline.stages import train_with

            while (asked := ranks.asked()) is not None:
                stage = Stage.model_validate(asked["stage"])
                inputs = {role: Path(folder) for role, folder in asked["inputs"].items()}
                train_with(stage, inputs, Path(asked["checkpoints"]))
            yield False
            return
        try:
            yield True
        finally:
            ranks.end()


def _alike() -> Mapping[str, str]:
    code = hashlib.sha256()
    for package in (Path(__file__).parents[1], Path(str(reqat_kernels.__file__)).parent):
        for file in sorted(package.rglob("*.py")):
            code.update(file.read_bytes())
    return {
        "command line": " ".join(sys.argv[1:]),
        "version of reqat's code": code.hexdigest(),
        "native library": "none" if instruction_set() == "torch" else "there",
        **distributed.environment(),
    }
