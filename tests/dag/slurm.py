"""Stands in for Slurm's commands: `sbatch` notes its options and runs the job here, `sacct` says how jobs ended.

Called as `slurm.py COMMAND ARGUMENTS...`; jobs are files in the folder that JOBS_OF_STAND_IN names.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

COMMANDS = ("sbatch", "srun", "sacct", "sacctmgr", "sinfo", "scontrol", "squeue", "scancel")
ACCOUNT = "lab"


def install(folder: Path) -> Path:
    """A folder for PATH with all commands."""
    folder.mkdir()
    for name in COMMANDS:
        file = folder / name
        file.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{Path(__file__).resolve()}" {name} "$@"\n')
        file.chmod(0o755)
    return folder


def sbatch(arguments: list[str], jobs: Path) -> None:
    """Start a job, with its options noted; those that Slurm does not know are refused."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for option in ("--job-name", "--output", "--export", "--comment", "--mem", "--cpus-per-task", "--gpus", "--ntasks"):
        parser.add_argument(option)
    parser.add_argument("--parsable", action="store_true")
    parser.add_argument("-A", dest="account")
    parser.add_argument("-p", dest="partition")
    parser.add_argument("-t", dest="time")
    parser.add_argument("-D", dest="workdir")
    parser.add_argument("--wrap", required=True)
    options = parser.parse_args(arguments)
    id = str(len(list(jobs.glob("*.json"))) + 1)
    (jobs / f"{id}.json").write_text(json.dumps(vars(options)))
    log = Path(options.output.replace("%j", id))
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"SLURM_JOB_ID": id, "SLURM_CPUS_PER_TASK": options.cpus_per_task}
    script = f'({options.wrap}) > "{log}" 2>&1; echo $? > "{jobs / id}.code"'
    subprocess.Popen(
        ["sh", "-c", script],
        cwd=options.workdir,
        env=environment,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    print(id)


def srun(arguments: list[str], jobs: Path) -> None:
    """Run the command behind the options, here."""
    while arguments[0].startswith("-"):  # -n1 and --cpu-bind=q, and whatever has a value of its own
        arguments = arguments[1:]
    os.execvp(arguments[0], arguments)


def sacct(arguments: list[str], jobs: Path) -> None:
    """Id and state of each job."""
    for file in jobs.glob("*.json"):
        code = file.with_suffix(".code")
        said = code.read_text().strip() if code.exists() else ""
        print(f"{file.stem}|{'RUNNING' if not said else 'COMPLETED' if said == '0' else 'FAILED'}")


def main() -> None:
    """Do what the command of this name does."""
    name, *arguments = sys.argv[1:]
    jobs = Path(os.environ["JOBS_OF_STAND_IN"])
    if name in ("sbatch", "srun", "sacct"):
        {"sbatch": sbatch, "srun": srun, "sacct": sacct}[name](arguments, jobs)
    print({"sacctmgr": ACCOUNT, "sinfo": "gpus", "scontrol": "MinJobAge = 300 sec"}.get(name, ""), end="")


if __name__ == "__main__":
    main()
