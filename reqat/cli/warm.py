"""A process that has torch and transformers imported already, and forks itself for each job of a run.

Importing them takes some six seconds of every job, which is most of a small one. Snakemake's main process starts one
server for a run on this machine and names its socket in the environment variable REQAT_WARM; the command line hands a
job over to it, with its arguments, environment, working folder and outputs. The server forks, and the fork is the job:
a process of its own, with the same code as without a server. Signals go through; if the command is killed, so is its
job. Where there is no server, or it does not answer, the command runs the job itself.

The benchmark is not handed over: what it measures should stand on nothing that was there before.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

VARIABLE = "REQAT_WARM"
VERBS = ("data", "stage", "evaluate", "study", "report")
_HEADER = struct.Struct("!I")
_STREAMS = 3
_BOUND_S = 5.0
_PR_SET_PDEATHSIG = 1


def handed_over(arguments: list[str]) -> int | None:
    """Exit code of the job that ``arguments`` (of `reqat`) ask for, run by the server that the environment names; None
    if there is none, or the verb is not one of :data:`VERBS`."""
    path = os.environ.get(VARIABLE)
    if not path or not any(verb in arguments for verb in VERBS) or sys.getfilesystemencoding().lower() != "utf-8":
        return None
    try:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
    except OSError:
        return None
    with connection:
        environment = {key: value for key, value in os.environ.items() if key != VARIABLE}
        request = json.dumps({"arguments": arguments, "folder": os.getcwd(), "environment": environment}).encode()
        streams = array.array("i", [0, 1, 2])
        connection.sendmsg([_HEADER.pack(len(request))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
        connection.sendall(request)

        def forward(number: int, _frame: FrameType | None) -> None:
            with contextlib.suppress(OSError):
                connection.sendall(bytes([number]))

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, forward)
        answer = _receive(connection, 1)
    if not answer:
        print("reqat: error: the process that ran this job is gone; run the same command again.", file=sys.stderr)
        return 1
    return answer[0]


def start(command: list[str], folder: Path) -> subprocess.Popen[bytes] | None:
    """Start a server with ``command`` (an interpreter that has reqat) in the checkout ``folder`` and name it in this
    process's environment; None where the system has no Unix sockets. It ends with this process."""
    if not hasattr(socket, "AF_UNIX"):
        return None
    place = Path(tempfile.mkdtemp(prefix="reqat-"))
    path = place / "warm"
    server = subprocess.Popen(
        [*command, "-m", "reqat.cli.warm", str(path), str(os.getpid())],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    os.environ[VARIABLE] = str(path)
    end = time.monotonic() + _BOUND_S
    while not path.exists() and server.poll() is None and time.monotonic() < end:
        time.sleep(0.02)  # until it listens; it answers when it has imported what jobs need
    return server


def stop(server: subprocess.Popen[bytes] | None) -> None:
    """End a server that :func:`start` gave; jobs that still run go on."""
    path = os.environ.pop(VARIABLE, None)
    if server is not None:
        server.terminate()
        server.wait()
    if path is not None:
        with contextlib.suppress(OSError):
            Path(path).unlink()
        with contextlib.suppress(OSError):
            Path(path).parent.rmdir()


def serve(path: Path, parent: int) -> None:
    """Import what jobs need, then answer until process ``parent`` is gone. Only processes of this user can connect."""
    _end_with(parent)
    sys.modules.setdefault("torchao", None)  # type: ignore[arg-type]  # as reqat.cli.app.start_computing does
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    os.chmod(path, 0o600)
    listener.listen(64)  # who comes before the imports are done waits for them, no longer than they take by themselves
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: meant for the commands, which pass it on
    import transformers.models.auto.modeling_auto  # noqa: F401

    import reqat.cli.main
    import reqat.pipeline.jobs  # noqa: F401

    while True:
        connection, _ = listener.accept()
        # No thread runs while the process forks: each job gets a process that watches over it.
        if os.fork() == 0:
            listener.close()
            _watch(connection)
        connection.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _watch(connection: socket.socket) -> NoReturn:
    """Fork the job, pass on signals to it, and answer with its exit code."""
    header, ancillary, _, _ = connection.recvmsg(_HEADER.size, socket.CMSG_SPACE(_STREAMS * array.array("i").itemsize))
    streams = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            streams.frombytes(data)
    if len(header) != _HEADER.size or len(streams) != _STREAMS:
        os._exit(1)
    request = json.loads(_receive(connection, _HEADER.unpack(header)[0]))
    job = os.fork()
    if job == 0:
        connection.close()
        _work(request, list(streams))
    for stream in streams:
        os.close(stream)

    def listen() -> None:
        while True:
            said = _receive(connection, 1)
            with contextlib.suppress(OSError):
                os.kill(job, said[0] if said else signal.SIGTERM)  # nothing more to come: the command was killed
            if not said:
                return

    threading.Thread(target=listen, daemon=True).start()
    _, status = os.waitpid(job, 0)
    code = os.waitstatus_to_exitcode(status)
    with contextlib.suppress(OSError):
        connection.sendall(bytes([code if code >= 0 else 128 - code]))
    os._exit(0)


def _work(request: dict[str, Any], streams: list[int]) -> NoReturn:
    """Be the job: its streams, folder and environment, then the command line."""
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = ["reqat", *request["arguments"]]
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode, closefd=False) for n, mode in enumerate("rww"))
    code: Any = 1
    try:
        from reqat.cli.main import main

        main()
    except SystemExit as end:
        code = end.code
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _receive(connection: socket.socket, size: int) -> bytes:
    """``size`` bytes; fewer where the other side has ended."""
    data = b""
    while len(data) < size:
        try:
            part = connection.recv(size - len(data))
        except ConnectionError:
            break
        if not part:
            break
        data += part
    return data


def _end_with(parent: int) -> None:
    """Let the kernel end this process when its parent ends."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(0)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
