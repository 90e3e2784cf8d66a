"""A process that has imported everything that jobs need, and forks itself for each job of a run.

Importing torch, transformers, pandas and this library takes some six seconds of every job, which is most of a small
one. Snakemake's main process starts one server for a run on this machine and names its socket in the environment
variable REQAT_WARM; the command line hands a job over to it, with its arguments, environment, working folder and
outputs. The server forks, and the fork is the job: a process of its own, with the same code as without a server.
Signals go through; if the command is killed, so is its job. Where there is no server, it does not answer, or a source
file has changed since it started (a record names the code that ran), the command runs the job itself.

The benchmark is not handed over: what it measures should stand on nothing that was there before.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import hashlib
import importlib.util
import json
import os
import pkgutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

VARIABLE = "REQAT_WARM"
VERBS = ("data", "stage", "evaluate", "study", "source", "companion", "report")
_PACKAGES = ("reqat", "reqat_kernels", "analysis")
# Plugins of vLLM and of lm-eval: no job imports them.
_GUESTS = ("reqat.vllm", "reqat.lm_eval")
# Imported by functions, so that importing a module of ours stays quick; of transformers, those that it imports by name.
_LATER = (
    "reasoning_gym",
    "sklearn.datasets",
    "sklearn.ensemble",
    "transformers.models.auto.modeling_auto",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
)
# Libraries that start threads as they are imported: of pyarrow, the one that gives memory back.
ONE_THREAD = {
    **{f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")},
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}
_HEADER = struct.Struct("!I")
_STREAMS = 3
_BOUND_S = 5.0
_ANSWER_S = 120.0  # the server answers once it has imported what jobs need
_ACCEPTED = b"\x01"
_PR_SET_PDEATHSIG = 1


def handed_over(arguments: list[str]) -> int | None:
    """Exit code of the job that ``arguments`` (of `reqat`) ask for, run by the server that the environment names; None
    if there is none, if it does not take the job, or if the verb is not one of :data:`VERBS`."""
    path = os.environ.get(VARIABLE)
    if not path or "WORLD_SIZE" in os.environ or not _may_be_handed_over(arguments):  # torchrun watches its processes
        return None
    request = {
        "arguments": arguments,
        "folder": os.getcwd(),
        "environment": {key: value for key, value in os.environ.items() if key != VARIABLE},
        "sources": sources(),
    }
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(path)
            connection.settimeout(_ANSWER_S)
            text, streams = json.dumps(request).encode(), array.array("i", [0, 1, 2])
            connection.sendmsg([_HEADER.pack(len(text))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
            connection.sendall(text)
            if _receive(connection, 1) != _ACCEPTED:
                return None
            connection.settimeout(None)
        except OSError:
            return None

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


def _may_be_handed_over(arguments: list[str]) -> bool:
    """Whether a job asks for a verb of :data:`VERBS`, and for nothing that is decided before torch is imported."""
    if not any(verb in arguments for verb in VERBS) or "bench" in arguments:
        return False
    threads = [after for before, after in zip(arguments, arguments[1:], strict=False) if before == "--threads"]
    as_environment = "0" in threads or "--threads=0" in arguments
    return not as_environment and sys.getfilesystemencoding().lower() == "utf-8"


def sources() -> str:
    """Digest of path, size and time of every Python file that a job may import from this project."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        found = importlib.util.find_spec(package)
        for folder in (found.submodule_search_locations or []) if found is not None else []:
            for file in sorted(Path(folder).rglob("*.py")):
                state = file.stat()
                digest.update(f"{file}|{state.st_size}|{state.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def start(command: list[str], folder: Path, log: Path) -> subprocess.Popen[bytes] | None:
    """Start a server with ``command`` (an interpreter that has reqat) in the checkout ``folder`` and name it in this
    process's environment. What it says goes to ``log``. It ends with this process. None where the system is no Linux,
    has a GPU, which a forked process could not use, or lets no temporary folder be made."""
    if sys.platform != "linux" or Path("/dev/nvidiactl").exists():
        return None
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        path = Path(tempfile.mkdtemp(prefix="reqat-")) / "warm"
    except OSError:
        return None
    with log.open("wb") as said:
        server = subprocess.Popen(
            [*command, "-m", "reqat.cli.warm", str(path), str(os.getpid())],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
            env={**os.environ, **ONE_THREAD},
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
    """Import what jobs need, then answer until process ``parent`` is gone. Only processes of this user can connect.

    Ends if the imports left threads behind, which a fork would not have: jobs are not handed over then.
    """
    _end_with(parent)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        _serve(path, sources())
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
            path.parent.rmdir()


def _serve(path: Path, started_with: str) -> None:
    sys.modules.setdefault("torchao", None)  # type: ignore[arg-type]  # as reqat.cli.app.start_computing does
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    os.chmod(path, 0o600)
    listener.listen(64)  # who comes before the imports are done waits for them, no longer than they take by themselves
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: meant for the commands, which pass it on
    import_everything()
    if (threads := len(os.listdir("/proc/self/task"))) > 1:
        sys.exit(f"{threads} threads after the imports: a fork would lack them, so jobs run by themselves")
    while True:
        connection, _ = listener.accept()
        # No thread runs while the process forks: each job gets a process that watches over it.
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            listener.close()
            _watch(connection, started_with)
        connection.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def import_everything() -> None:
    """Import this library, but what other programs load of it, and what its functions import when they are called.

    What is not installed is left out: a job that needs it says so itself."""
    for package in _PACKAGES:
        top = importlib.import_module(package)
        for module in pkgutil.walk_packages(top.__path__, f"{package}.", onerror=lambda _: None):
            if not module.name.startswith(_GUESTS) and not module.name.endswith("__main__"):
                with contextlib.suppress(ImportError):
                    importlib.import_module(module.name)
    for library in _LATER:
        with contextlib.suppress(ImportError):
            importlib.import_module(library)


def _watch(connection: socket.socket, started_with: str) -> NoReturn:
    """Fork the job, pass on signals to it, and answer with its exit code. A job of other sources is not accepted."""
    header, ancillary, _, _ = connection.recvmsg(_HEADER.size, socket.CMSG_SPACE(_STREAMS * array.array("i").itemsize))
    streams = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            streams.frombytes(data)
    if len(header) != _HEADER.size or len(streams) != _STREAMS:
        os._exit(1)
    request = json.loads(_receive(connection, _HEADER.unpack(header)[0]))
    if request["sources"] != started_with:
        os._exit(0)
    with contextlib.suppress(OSError):
        connection.sendall(_ACCEPTED)
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
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    code: Any = 1
    try:
        from reqat.cli.main import main

        main()
    except SystemExit as end:
        code = end.code
    except BaseException:  # with --debug
        traceback.print_exc()
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
