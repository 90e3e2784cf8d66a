"""A new method, transform, gradient rule, objective term, task, model adapter or export format is one new file and no
other change."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PTQ = """
from reqat.config.base import Strict
from reqat.methods.ptq._method import Method
from reqat.methods.ptq.rtn import rtn


class Options(Strict):
    alpha: float = 0.5


def solve(model, *, alpha=0.5):
    return {**rtn(model), "alpha": alpha}


METHOD = Method(solve, settings=Options)
"""
USE_PTQ = """
from reqat.config.errors import ReqatError
from reqat.config.stage import PTQSettings
from reqat.methods import ptq
from tests.methods.conftest import FAMILIES, SHAPE

assert PTQSettings(method="toy", options={"alpha": 0.2}).options == {"alpha": 0.2}
_, metrics = ptq.quantize("toy", FAMILIES["llama"](SHAPE), "NVFP4-W4A4", alpha=0.2)
assert metrics["method"] == "toy" and metrics["alpha"] == 0.2
try:
    ptq.quantize("toy", FAMILIES["llama"](SHAPE), "NVFP4-W4A4", beta=0.2)
except ReqatError as error:
    assert "beta" in str(error) and "alpha" in str(error)
else:
    raise AssertionError("an option that the method does not have was taken")
"""
TERM = """
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from reqat.training.objective import TermContext


@dataclass(frozen=True)
class Margin:
    weight: float = 1.0
    power: float = 2.0
    name: str = "toy"
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})

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
RULE = """
from reqat.quant.fake import fake_quantize
from reqat.quant.gradients._rule import GradientRule, Rounding


class Doubled(GradientRule):
    name = "toy"

    def __init__(self, factor=2.0):
        super().__init__()
        self.factor = factor

    def forward(self, x, at: Rounding):
        x = at.rotate(x)
        y = x * self.factor
        return y + (fake_quantize(x.detach(), at.fmt, global_scale=at.global_scale, name=at.name) - y).detach()


RULE = Doubled
"""
USE_RULE = """
import torch
from reqat.config.stage import Gradient
from reqat.models import prepare, quant_linears, set_gradient
from tests.methods.conftest import FAMILIES, SHAPE

gradient, ids = Gradient(rule="toy", factor=3.0), torch.arange(9)[None]
torch.manual_seed(0)
model = FAMILIES["llama"](SHAPE)
prepare(model, "NVFP4-W4A16")
weight = [*quant_linears(model).values()][-1].weight
model(ids, labels=ids).loss.backward()
straight, weight.grad = weight.grad, None
assert set_gradient(model, gradient.rule, roles=("weights",), **gradient.model_extra) == 14
model(ids, labels=ids).loss.backward()
torch.testing.assert_close(weight.grad, 3 * straight)
"""
TRANSFORM = """
from reqat.methods.transform import Transform


def flip(model, precision, input_ids, *, progress=True):
    mlp = model.get_decoder().layers[0].mlp
    mlp.up_proj.weight.data.neg_()
    mlp.down_proj.weight.data.neg_()
    return {"flipped": 1}


TRANSFORM = Transform(flip)
"""
USE_TRANSFORM = """
import torch
from reqat.methods.transforms import TRANSFORMS
from reqat.quant import Precision
from tests.methods.conftest import FAMILIES, SHAPE

model, ids = FAMILIES["llama"](SHAPE).eval(), torch.arange(9)[None]
expected, precision = model(ids).logits, Precision.parse("NVFP4-W4A4")
assert TRANSFORMS["toy"].apply(model, precision, ids) == (precision, {"flipped": 1})
torch.testing.assert_close(model(ids).logits, expected)
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
ADAPTER = """
from reqat.models.adapters._adapter import Block, UnsupportedModelError


class Stages:
    kind = "stack of stages"

    def blocks(self, model):
        if not hasattr(model, "stages"):
            raise UnsupportedModelError("it has no stages")
        return [Block(i, f"stages.{i}", m, same_input=(("left", "right"),)) for i, m in enumerate(model.stages)]

    def body(self, model):
        return model

    def outside(self, model):
        return []

    def gated(self, model):
        return None


ADAPTER = Stages()
"""
USE_ADAPTER = """
import tempfile
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from reqat.models import freeze, prepare, quant_linears
from reqat.models.pretrained import plain_state
from reqat.models.sidecar import Sidecar


class Stage(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.act = nn.Linear(32, 64), nn.Linear(32, 64), nn.ReLU()
        self.out = nn.Linear(64, 32)

    def forward(self, x):
        return x + self.out(self.act(self.left(x)) * self.right(x))


class Net(PreTrainedModel):
    config_class = PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.stem, self.stages = nn.Conv2d(3, 32, 3), nn.ModuleList([Stage(), Stage()])
        self.post_init()

    def forward(self, x):
        x = self.stem(x).flatten(2).mT
        for stage in self.stages:
            x = stage(x)
        return x


torch.manual_seed(0)
model, x = Net(PreTrainedConfig()), torch.randn(2, 3, 6, 6)
names = list(plain_state(model))
report = prepare(model, "NVFP4-W4A4")
assert len(report.quantized) == 6 and report.share == 1, report
layers = quant_linears(model)
assert layers["stages.0.left"].input_quantizer is layers["stages.0.right"].input_quantizer
out = model(x)
out.sum().backward()
assert all(p.grad is not None for p in model.parameters())
assert torch.equal(freeze(model)(x), out) and list(plain_state(model)) == names
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    again = Net.from_pretrained(folder)
    from pathlib import Path
    Sidecar.read(Path(folder)).attach(again, Path(folder))
prepare(again, "NVFP4-W4A4")
assert torch.equal(again(x), out)
for wrong, says in (("NVFP4-W4A4KV4", "take NVFP4-W4A4"), ("NVFP4-KV4", "take BF16")):
    try:
        prepare(Net(PreTrainedConfig()), wrong)
    except ValueError as error:
        assert says in str(error), error
    else:
        raise AssertionError("a cache was quantized that is not there")
"""
EXPORT = """
from reqat.export._exporter import Exporter


def write(frozen, folder):
    (folder / "codes.txt").write_text("\\n".join(frozen.layers))


EXPORTER = Exporter(write, families=("NVFP4",))
"""
USE_EXPORT = """
import tempfile
from pathlib import Path
from reqat.config.catalogue import EXPORT_FORMATS
from reqat.export import export_model
from tests.methods.conftest import FAMILIES, SHAPE

assert "toy-format" in EXPORT_FORMATS
with tempfile.TemporaryDirectory() as folder:
    out = Path(folder) / "out"
    done = export_model(FAMILIES["llama"](SHAPE), None, out, "toy-format", precision="NVFP4-W4A16")
    assert len((out / "codes.txt").read_text().splitlines()) == done.layers == 14
"""
CASES = {
    "export/toy_format.py": (EXPORT, USE_EXPORT),
    "models/adapters/stages.py": (ADAPTER, USE_ADAPTER),
    "methods/ptq/toy.py": (PTQ, USE_PTQ),
    "methods/terms/toy.py": (TERM, USE_TERM),
    "methods/transforms/toy.py": (TRANSFORM, USE_TRANSFORM),
    "quant/gradients/toy.py": (RULE, USE_RULE),
    "tasks/families/basic_arithmetic.py": (TASK, USE_TASK),
}


QUICK = ("models/adapters/stages.py", "methods/terms/toy.py")


@pytest.mark.parametrize(
    "file", [pytest.param(file, marks=[] if file in QUICK else pytest.mark.long) for file in sorted(CASES)]
)
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
