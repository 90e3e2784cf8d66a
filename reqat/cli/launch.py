"""`python -m reqat.cli.launch --processes 8 [--nodes 2] -- COMMAND`: start COMMAND in processes that train together.

On one machine that is torchrun. On several, within a Slurm job that was given them, srun starts a torchrun on each, and
they meet on the first of them. The rules of the workflow call this; by hand, torchrun alone does the same.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from collections.abc import Mapping

from reqat.config.errors import ReqatError

PORT = 29400  # torchrun's own default, of the first of as many as there are jobs that may share a machine
PORTS = 1000


def launcher(nodes: int, processes: int, command: list[str], environment: Mapping[str, str] = os.environ) -> list[str]:
    """The command that starts ``command`` in ``processes`` processes on each of ``nodes`` machines.

    Raises ReqatError for several machines outside of a Slurm job, or where Slurm does not say which they are.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--no-python"]
    if nodes == 1:
        return [*torchrun, "--standalone", *command]
    job, named = environment.get("SLURM_JOB_ID"), environment.get("SLURM_JOB_NODELIST")
    if not job or not named:
        raise ReqatError(
            f"{nodes} machines are asked for (resources.nodes), and this is no Slurm job: run with --profile "
            "profiles/slurm, or start torchrun on each machine"
        )
    try:
        asked = subprocess.run(["scontrol", "show", "hostnames", named], capture_output=True, text=True, check=True)
        first = asked.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise ReqatError(
            f"scontrol does not say which machines {named!r} are ({error}); is Slurm whole here?"
        ) from error
    # Trainings of two jobs may share their first machine.
    port = PORT + (int(job) if job.isdecimal() else zlib.crc32(job.encode())) % PORTS
    cores = environment.get("SLURM_CPUS_PER_TASK")  # which srun no longer takes from the job by itself
    return [
        "srun", "--overlap", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1",
        *([f"--cpus-per-task={cores}"] if cores else []),
        *torchrun, f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-id={job}", f"--rdzv-endpoint={first}:{port}",
        *command,
    ]  # fmt: skip


def main(arguments: list[str]) -> None:
    """Become the launcher. Ends with 2 and one line for what a user can mend."""
    try:
        options, command = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
        given = dict(zip(options[::2], map(int, options[1::2]), strict=True))
        started = launcher(given.pop("--nodes", 1), given.pop("--processes"), command)
        if given or not command:
            raise ValueError
    except (ValueError, KeyError):
        sys.exit("reqat: error: reqat.cli.launch --processes N [--nodes N] -- COMMAND")
    except ReqatError as error:
        print(f"reqat: error: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        os.execvp(started[0], started)
    except OSError as error:
        print(f"reqat: error: {started[0]}: {error.strerror}; is it installed?", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
