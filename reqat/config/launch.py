"""The processes that torchrun (or srun) started, as the environment names them; read before torch is imported."""

from __future__ import annotations

import os

from reqat.config.errors import ReqatError


def launched() -> tuple[int, int, int]:
    """This process's number, the number of processes, and this one's number among those of its machine.

    (0, 1, 0) where nothing says otherwise. Raises ReqatError for an environment that torchrun does not write.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        return 0, 1, 0
    values = [os.environ.get(name, "0") for name in names]
    if not all(value.isdecimal() for value in values) or not int(values[0]) < int(values[1]):
        shown = ", ".join(f"{name}={value!r}" for name, value in zip(names, values, strict=True))
        raise ReqatError(f"{shown}: torchrun sets these for the processes that it starts; start them by it, or unset.")
    rank, size, local = map(int, values)
    return rank, size, local
