"""Tier `paper-mini` from nothing to Table 1 and an export: the rules of tier `paper`, with real jobs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from reqat.config import Paths, load
from reqat.config.paths import made
from reqat.records import record
from tests.dag.checkout import ROOT, workflow_in

pytestmark = [pytest.mark.slow, pytest.mark.long]


def run(folder: Path, *words: str) -> str:
    """What a module says that is run in the checkout. It must succeed."""
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def snakemake(folder: Path, *words: str) -> str:
    """The same of the workflow."""
    return run(folder, "-m", "snakemake", "--cores", "2", *words, "--config", "tier=paper-mini", "--", "figures/")


def jobs(said: str) -> dict[str, int]:
    """Rule -> jobs, of what a dry run says."""
    return {name: int(n) for name, n in re.findall(r"^(\w+) +(\d+)$", said, re.MULTILINE)}


def test_the_papers_pipeline_runs_in_small(tmp_path: Path) -> None:
    folder = workflow_in(tmp_path / "clone")
    run(folder, str(ROOT / "tools" / "paper_mini.py"), "--models", "models", "--data", "data")
    snakemake(folder)

    plan = load("paper-mini", Paths(root=folder))
    paths = Paths(root=folder)
    kinds = {stage.kind: record.verify(paths.stage(stage), id=id) for id, stage in plan.needed.items() if made(stage)}
    assert set(kinds) == {"data", "base", "finetune", "qfit", "qat"}
    assert "sem" in kinds["qat"]["metrics"]["curve"][0], "the last stage minimizes entropy"
    for id, evaluation in plan.evaluations.items():
        about = record.verify(paths.evaluation(evaluation), id=id)
        assert about["inputs"]["problems"]["sha256"] == record.sha256(folder / "data" / "paper-mini.jsonl")
        assert sorted(about["metrics"]["parts"]) == sorted(plan.shards(id)) and len(plan.shards(id)) == 2
        assert about["metrics"]["responses"] == evaluation.problems.n * 2
    table = pd.read_csv(folder / "figures" / "table1.csv")
    measured = table[table["source"] == "measured"]
    assert {"Baseline", "FT", "PTQ", "ReQAT-TQS"} == set(measured["method"])
    assert set(measured["n_problems"]) == {4} and set(measured["n_sampling_seeds"]) == {2}

    # Other problems: graded anew, by the same models.
    assert "Nothing to be done" in snakemake(folder)
    problems = folder / "data" / "paper-mini.jsonl"
    problems.write_text("".join(reversed(problems.read_text().splitlines(keepends=True))))
    again = jobs(snakemake(folder, "--dry-run"))
    assert again["evaluate"] == 3 * len(plan.evaluations) and not {"train", "qfit", "data", "base_model"} & set(again)

    (last,) = (paths.model(stage) for stage in plan.needed.values() if stage.kind == "qat")
    words = ["--precision", "NVFP4-W4A16", "--format", "compressed-tensors", "--out", "build/exported"]
    said = run(folder, "-m", "reqat.cli", "export", "--model", str(last), *words)
    assert "14 layers at NVFP4-W4A16" in said
    written = json.loads((folder / "build" / "exported" / "config.json").read_text())
    assert written["quantization_config"]["quant_method"] == "compressed-tensors" and written["model_type"] == "qwen2"
