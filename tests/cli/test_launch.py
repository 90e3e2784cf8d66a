"""Trainings started as users and rules start them: by torchrun, and the command for srun."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reqat.cli.launch import launcher
from reqat.config.errors import ReqatError
from reqat.data import build_tokenizer
from reqat.models import load_model, save_model
from reqat.records import record

ROOT = Path(__file__).parents[2]


def stand_in(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(text)
    # Not its own first line: the path of the interpreter may hold a space.
    (folder / name).write_text(
        f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(folder / name))}.py "$@"\n'
    )
    (folder / name).chmod(0o755)


def test_several_machines_meet_on_the_first_of_the_slurm_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What srun would be given, with a stand-in for scontrol."""
    stand_in(
        tmp_path / "bin",
        "scontrol",
        "import sys\nassert sys.argv[1:] == ['show', 'hostnames', 'n[1-2]']\nprint('n1\\nn2')",
    )
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    environment = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_PER_TASK": "16"}
    words = launcher(2, 8, ["reqat", "stage", "a b"], environment)
    assert words[0] == "srun" and "--ntasks=2" in words and "--ntasks-per-node=1" in words
    torchrun = words[words.index("-m") + 1 :]
    assert torchrun[0] == "torch.distributed.run" and torchrun[-3:] == ["reqat", "stage", "a b"]
    assert {"--nnodes=2", "--nproc-per-node=8", "--rdzv-id=7", "--no-python"} <= set(torchrun)
    (endpoint,) = [word for word in torchrun if word.startswith("--rdzv-endpoint=")]
    assert endpoint.startswith("--rdzv-endpoint=n1:")
    assert "--cpus-per-task=16" in words[: words.index("-m")]
    other = launcher(2, 8, ["reqat"], environment | {"SLURM_JOB_ID": "8"})
    assert endpoint not in other, "jobs that share a machine do not meet"
    with pytest.raises(ReqatError, match="no Slurm job"):
        launcher(2, 8, ["reqat"], {})
    stand_in(tmp_path / "bin", "scontrol", "raise SystemExit(1)")
    with pytest.raises(ReqatError, match="scontrol"):
        launcher(2, 8, ["reqat"], environment)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    data = [{"prompt": f"{a} + {b} =", "response": f"{a + b}"} for a in range(4) for b in range(5)]
    (folder / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    tokenizer = build_tokenizer(row[key] for row in data for key in row)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    save_model(LlamaForCausalLM(config), tokenizer, folder / "model")
    return folder


def reqat(folder: Path, *arguments: str, processes: int) -> subprocess.CompletedProcess[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "reqat"]
    own = ["-m", "reqat"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *(torchrun if processes > 1 else own), *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.long
def test_torchrun_trains_as_one_process_does(given: Path) -> None:
    """A whole recipe: Q-FIT by the first process alone, two trainings by both, one folder, one record, one voice."""
    arguments = [
        "train", "--recipe", "reqat-tqs", "--model", "model", "--data", "traces.jsonl", "--precision", "NVFP4-W4A4KV4",
        "--lr", "1e-3", "--accumulation", "2", "--device", "cpu", "--autocast", "none",
    ]  # fmt: skip
    for processes, out in ((1, "one"), (2, "two")):
        ran = reqat(given, *arguments, "--out", out, processes=processes)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.count("written:") == 1
    about = [record.verify(given / out) for out in ("one", "two")]
    losses = [
        [stage["metrics"]["final_loss"] for stage in each["metrics"]["stages"] if stage["kind"] != "qfit"]
        for each in about
    ]
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], abs=1e-5)
    weights = [load_model(given / out).state_dict() for out in ("one", "two")]
    for name, tensor in weights[0].items():  # a weight on the edge between two codes may round to either
        assert ((weights[1][name] - tensor).abs() > 1e-5).float().mean() < 0.01, name
    assert not (given / "two.unfinished").exists()
    refused = reqat(given, "doctor", processes=2)
    assert refused.returncode != 0 and "doctor runs in one process" in refused.stderr
