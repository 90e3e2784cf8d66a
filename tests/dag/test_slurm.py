"""The profile for Slurm, with commands that stand in for Slurm's: what each kind of job asks the cluster for."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from reqat.config import Paths, load
from reqat.config.resources import need
from tests.dag import slurm
from tests.dag.checkout import command, workflow_in

pytestmark = [pytest.mark.slow, pytest.mark.long]

# As `paper-mini`, with a model and GPUs of such sizes that a training needs several GPUs and an evaluation one.
GPU_MEMORY_GIB = 0.12
TIER = {
    "extends": "paper-mini",
    "title": "a tier for a cluster",
    "resources": {
        "device": "cuda",
        "gpu_memory_gib": GPU_MEMORY_GIB,
        "train_memory_mb": 4100,
        "evaluate_memory_mb": 2300,
        "runtime_minutes": 77,
        "processes": 1,  # the stand-in for reqat is no program for torchrun
        "threads": 2,
    },
    "models": {"mini-Qwen2": {"shape": {"hidden_size": 256, "layers": 8, "mlp": 1024}}},
    "evaluation": {"decoding": {"batch_rows": 1}},
}


def test_time_memory_and_gpus_of_each_job_reach_sbatch(tmp_path: Path) -> None:
    folder = workflow_in(tmp_path / "clone")
    (folder / "config" / "tiers" / "cluster.yaml").write_text(yaml.safe_dump(TIER))
    (folder / "models" / "paper-mini").mkdir(parents=True)
    (folder / "data").mkdir()
    for file in ("models/paper-mini/config.json", "data/paper-mini.jsonl", "data/paper-mini-traces.jsonl"):
        (folder / file).write_text("{}")
    plan = load("cluster", Paths(root=folder))
    gpus = need(plan, "training").gpus
    assert gpus > 1 and need(plan, "evaluating").gpus == 1
    trained = next(e for e in plan.evaluations.values() if e.stage.startswith("finetune-"))
    # Base and traces are there: what is to be seen is a training, an evaluation in two parts, and what joins them.
    for id, stage in plan.stages.items():
        if stage.kind in ("base", "data"):
            out = folder / "build" / ("data" if stage.kind == "data" else "stages") / id
            out.mkdir(parents=True)
            (out / "record.json").write_text(id)
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    commands = slurm.install(tmp_path / "bin")
    given = ["slurm_account=lab", "slurm_partition=gpus", "mem_mb=2000", "runtime=60"]
    words = command(
        *("--profile", "profiles/slurm", "--default-resources", *given),
        *("--latency-wait", "5", "--slurm-init-seconds-before-status-checks", "1"),
        f"build/evaluations/{trained.id}/record.json",
        tier="cluster",
    )
    environment = os.environ | {"PATH": f"{commands}:{os.environ['PATH']}", "JOBS_OF_STAND_IN": str(jobs)}
    done = subprocess.run(
        words,
        cwd=folder,
        env=environment | {"PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    logs = "".join(log.read_text() for log in folder.rglob("*.log"))
    assert done.returncode == 0, done.stdout + logs
    asked = {}
    for file in jobs.glob("*.json"):
        options = json.loads(file.read_text())
        assert (options["account"], options["partition"]) == ("lab", "gpus")
        asked[options["comment"].rpartition("wildcards_")[2]] = options
    parts = list(plan.shards(trained.id))
    assert set(asked) == {trained.stage, trained.id, *parts}
    keys = ("mem", "time", "cpus_per_task", "gpus")
    wanted = {trained.stage: ("4100", "77", "2", str(gpus)), trained.id: ("2000", "77", "2", None)}
    wanted |= dict.fromkeys(parts, ("2300", "77", "2", "1"))
    assert {name: tuple(options[key] for key in keys) for name, options in asked.items()} == wanted
