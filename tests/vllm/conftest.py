"""What vLLM answers, in the environment that ``python tools/vllm_cpu.py create DIR`` made and REQAT_VLLM names."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.models.conftest import _one_thread, family, ids, tiny  # noqa: F401

ROOT = Path(__file__).parents[2]
# Absolute: programs run in folders of their own.
VLLM = os.path.abspath(found) if (found := os.environ.get("REQAT_VLLM")) else None

Answer = Callable[..., list[list[dict[str, Any]]]]


def with_ours(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for programs of vLLM's, with reqat as it is here."""
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", **environment}


def run(arguments: Sequence[str | Path], cwd: Path, environment: Mapping[str, str]) -> str:
    """What a program in vLLM's environment printed, with reqat as it is here."""
    done = subprocess.run(
        [f"{VLLM}/bin/python", *arguments], cwd=cwd, env=with_ours(environment), capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.fixture
def answer(tmp_path: Path) -> Answer:
    """``answer(folder, calls, environment, **arguments of LLM)``: one engine's answers, of tools/vllm_cpu.py."""

    def ask(
        folder: Path, calls: Sequence[Mapping[str, Any]], environment: Mapping[str, str] | None = None, **engine: Any
    ) -> list[list[dict[str, Any]]]:
        asked, out = tmp_path / "asked.json", tmp_path / "answers.json"
        asked.write_text(json.dumps({"engine": {"max_model_len": 64, "max_num_seqs": 8, **engine}, "calls": calls}))
        run([ROOT / "tools" / "vllm_cpu.py", "answer", folder, asked, out], tmp_path, environment or {})
        found: list[list[dict[str, Any]]] = json.loads(out.read_text())
        return found

    return ask
