"""Runs a function in several processes that see themselves as torchrun's, forked from the test's own (no imports)."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from reqat.config.errors import ReqatError
from reqat.training import distributed

LIMIT_S = 600.0


def together(
    size: int, folder: Path, function: Callable[[distributed.Ranks], Any], *, offload: bool = False,
    timeout_s: float = 60.0,
) -> list[dict[str, Any]]:  # fmt: skip
    """What each of ``size`` processes came to: ``code`` (exit code; negative: a signal), and ``result`` (a JSON value
    that ``function`` returned) or ``error`` (of the ReqatError that it raised). All have ended then."""
    if torch.cuda.is_available():
        pytest.skip("autograd has threads for GPUs, which a forked process would lack")
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = [folder / f"said-by-{rank}.json" for rank in range(size)]
    context = multiprocessing.get_context("fork")

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            with distributed.joined("cpu", offload=offload, timeout_s=timeout_s) as ranks:
                said = {"result": function(ranks)}
        except ReqatError as error:
            said = {"error": str(error)}
        except BaseException:
            said = {"defect": traceback.format_exc()}
        out[rank].write_text(json.dumps(said))
        os._exit(0)  # no teardown of the test's own process

    processes = [context.Process(target=run, args=(rank,)) for rank in range(size)]
    for process in processes:
        process.start()
    found = []
    try:
        for process, file in zip(processes, out, strict=True):
            process.join(LIMIT_S)
            assert process.exitcode is not None, "a process hangs"
            said = json.loads(file.read_text()) if file.exists() else {}
            assert "defect" not in said, said["defect"]
            found.append({"code": process.exitcode, **said})
    finally:
        for process, file in zip(processes, out, strict=True):
            with suppress(ProcessLookupError):
                if process.exitcode is None and process.pid is not None:
                    os.kill(process.pid, signal.SIGKILL)
            file.unlink(missing_ok=True)
    return found
