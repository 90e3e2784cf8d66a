"""A new method, objective term or task is one new file: nothing else changes, and configuration takes its name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PTQ = """
from reqat.methods.ptq._method import Method
from reqat.methods.ptq.rtn import rtn

METHOD = Method(rtn, options={"alpha": 0.5})
"""
USE_PTQ = """
from reqat.config.stage import PTQSettings
from reqat.methods import ptq
from tests.methods.conftest import FAMILIES, SHAPE

assert PTQSettings(method="toy").method == "toy"
_, metrics = ptq.quantize("toy", FAMILIES["llama"](SHAPE), "NVFP4-W4A4", alpha=0.2)
assert metrics["method"] == "toy"
"""
TERM = """
from dataclasses import dataclass

from torch import Tensor

from reqat.training.objective import TermContext


@dataclass(frozen=True)
class Margin:
    weight: float = 1.0
    power: float = 2.0
    name: str = "toy"
    needs_teacher: bool = False

    def __call__(self, ctx: TermContext) -> Tensor:
        return ctx.logits.float().abs().pow(self.power).sum()


TERM = Margin
"""
USE_TERM = """
import torch
from reqat.config.stage import Training
from reqat.pipeline.stages import objective
from reqat.training import TermContext

training = Training(objective=[{"name": "nll"}, {"name": "toy", "weight": 0.5, "power": 3.0}])
found = objective(training)
logits, labels = torch.randn(4, 7), torch.zeros(4, dtype=torch.int64)
_, sums = found(TermContext(logits, labels))
torch.testing.assert_close(sums["toy"], float(logits.abs().pow(3).sum()))
try:
    objective(Training(objective=[{"name": "toy", "powr": 3.0}]))
except ValueError as error:
    assert "toy" in str(error) and "powr" in str(error), error
else:
    raise AssertionError("a setting that the term does not have was accepted")
"""
TASK = """
from reqat.tasks.family import Family


class Toy(Family):
    name = "basic_arithmetic"

    def prompt(self, problem):
        return problem.question + "\\n"

    def trace(self, problem, rng):
        return f"The answer is {problem.answer}."


FAMILY = Toy()
"""
USE_TASK = """
from reqat.tasks import FAMILIES, problems, verify, write_trace
import random

assert "basic_arithmetic" in FAMILIES
for problem in problems({"basic_arithmetic": {}}, "train", 5, 0):
    assert verify(problem, write_trace(problem, random.Random(0)))
"""
CASES = {
    "methods/ptq/toy.py": (PTQ, USE_PTQ),
    "methods/terms/toy.py": (TERM, USE_TERM),
    "tasks/families/basic_arithmetic.py": (TASK, USE_TASK),
}


@pytest.mark.parametrize("file", sorted(CASES))
def test_one_file_is_enough(tmp_path: Path, file: str) -> None:
    code, use = CASES[file]
    for folder in ("reqat", "tests/methods"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "reqat" / file).write_text(code)
    kernels = str(ROOT / "kernels")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), kernels])}
    where = f"import reqat; assert reqat.__file__.startswith({str(tmp_path)!r}), reqat.__file__\n"
    done = subprocess.run(
        [sys.executable, "-c", where + use], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
