"""A synthetic tier: the real recipes, a small plan, and made-up records and outcomes with known accuracies."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from analysis.report.cells import Results
from reqat.config.base import digest
from reqat.config.plan import Plan, plan
from reqat.config.tier import Tier, load_catalogue
from reqat.evaluation.outcomes import Outcomes
from reqat.records import record
from tests.analysis import benchmarks

CONFIG = Path(__file__).parents[2] / "config"
TIER: dict[str, Any] = {
    "name": "synthetic",
    "title": "made-up numbers",
    "models": {
        "testbed": {
            "source": "pinned",
            "artifacts": [
                "table1",
                "table2",
                "table4",
                "table5",
                "figure1",
                "ptq",
                "global-scale",
                "figure5",
                "figure10",
                "figure11",
            ],
        }
    },
    "data": {"families": {"chain_sum": {}, "simple_equations": {}}, "tokens": 1_000_000},
    "budget": {"qat_tokens": 100_000, "totals": [2, 3, 4], "claim_total": 3},
    "claim_seeds": {
        "seeds": [0, 1, 2],
        "recipes": ["ft", "ft-ptq", "qat", "reqat-t", "reqat-tq", "reqat-tqs"],
        "precisions": ["BF16", "NVFP4-W4A4KV4"],
    },
    "evaluation": {"n": 60, "seeds": [0, 1, 2, 3]},
}

# Accuracy of a method at NVFP4-W4A4KV4 and multiple 2; others are a little better or worse.
ACCURACY = {
    "Baseline": 0.45,
    "FT": 0.80,
    "PTQ": 0.15,
    "FT+PTQ": 0.42,
    "GPTQ": 0.25,
    "FT+GPTQ": 0.50,
    **{name: 0.2 for name in ("AWQ", "SmoothQuant", "GPTAQ", "MR-GPTQ", "QuaRot", "FlatQuant", "4/6")},
    **{f"FT+{name}": 0.45 for name in ("AWQ", "SmoothQuant", "GPTAQ", "MR-GPTQ", "QuaRot", "FlatQuant", "4/6")},
    "QAT": 0.60,
    "ReQAT-T": 0.68,
    "ReQAT-TS": 0.7,
    "ReQAT-TQ": 0.72,
    "ReQAT-TQS": 0.76,
    "FT+QAT": 0.66,
    "ReQAT": 0.7,
    "TAQ": 0.68,
    "FT at hand-over": 0.74,
    "FT at hand-over+PTQ": 0.40,
    "FT+QAT, different traces": 0.65,
    "QAD": 0.44,
    "FT+QAD": 0.67,
}


def accuracy_of(method: str, precision: str, multiple: int | None, condition: str) -> float:
    value = ACCURACY[method.partition(",")[0]] + 0.02 * ((multiple or 2) - 2)
    value += {"BF16": 0.0, "MXFP4-W4A16": 0.04, "MXFP4-W4A4": -0.04}.get(precision, 0.0)
    return value - (0.08 if condition == "aligned=no" else 0.0)


def synthesize(the_plan: Plan, root: Path) -> None:
    """Write a record for every stage, and a record and outcomes for every evaluation, of a plan."""
    accuracy = {c.evaluation: accuracy_of(c.method, c.precision, c.multiple, c.condition) for c in the_plan.cells}
    common = {
        "schema_version": 1,
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "dirty": False,
        "hardware": {"device": "cpu"},
        "config": {},
        "config_sha256": "",
        "versions": {},
        "outputs": {},
    }
    for id, stage in the_plan.stages.items():
        rng = np.random.default_rng(int(id.split("-")[-1], 16))
        metrics: dict[str, Any] = {}
        if stage.kind in ("finetune", "qat"):
            steps = np.arange(1, 101)
            floor = 0.25 if stage.kind == "finetune" else 0.3
            loss = floor + 0.6 * np.exp(-steps / 15) + rng.normal(0, 0.01, 100)
            tokens = stage.budget_tokens * steps // 100
            metrics = {
                "final_loss": float(loss[-5:].mean()),
                "tokens": int(tokens[-1]),
                "curve": [{"tokens": int(t), "loss": float(v)} for t, v in zip(tokens, loss, strict=True)],
            }
        if stage.kind == "qfit":
            grid = np.arange(20) / 20
            a, b = np.meshgrid(grid, grid, indexing="ij")
            errors = np.stack([1e-3 * (1 + (a - 0.3 - 0.1 * layer) ** 2 + (b - 0.8) ** 2) for layer in range(4)])
            best = [np.unravel_index(e.argmin(), e.shape) for e in errors]
            metrics = {
                "error_map": errors.tolist(),
                "alphas": grid.tolist(),
                "betas": grid.tolist(),
                "alpha": [float(grid[i]) for i, _ in best],
                "beta": [float(grid[j]) for _, j in best],
            }
        folder = root / "stages" / id
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(json.dumps(common | {"id": id, "kind": stage.kind, "metrics": metrics}))
    for id, evaluation in the_plan.evaluations.items():
        rng = np.random.default_rng(int(id.split("-")[-1], 16))
        n, seeds = evaluation.problems.n, evaluation.seeds
        # Problems differ in difficulty (the same for every method), so that clustering matters and pairing pays.
        difficulty = np.random.default_rng(7).normal(0, 0.15, n)
        p = np.clip(accuracy[id] + difficulty, 0, 1)
        families = sorted(evaluation.problems.families)
        draws = rng.random((len(seeds), n)) < p
        order = rng.permutation(n * len(seeds))  # order in the file must not matter
        problem, seed = order % n, order // n
        outcomes = Outcomes(
            problem_id=tuple(f"{digest(evaluation.problems, 6)}-{i:04d}" for i in problem),
            family=tuple(families[i % len(families)] for i in problem),
            seed=np.array(seeds)[seed],
            correct=draws[seed, problem],
            n_tokens=rng.integers(20, 90, len(order)),
            finished=rng.random(len(order)) < 0.99,
            response=("x",) * len(order),
        )
        folder = root / "evaluations" / id
        with mock.patch("os.fsync"):  # ninety flushes to disk would be most of the tests' time
            outcomes.to_parquet(folder / "outcomes.parquet")
        metrics = {"malformed": int((~outcomes.correct).sum()) // 2}
        about = common | {"id": id, "kind": "evaluation", "metrics": metrics, "outputs": record.outputs(folder)}
        (folder / "record.json").write_text(json.dumps(about))


def make(root: Path, **changes: Any) -> Results:
    catalogue = load_catalogue(CONFIG)
    tier = Tier.model_validate(TIER | changes).check(catalogue)
    the_plan = plan(tier, catalogue)
    synthesize(the_plan, root)
    return Results(the_plan, root, titles={k: v.title for k, v in catalogue.artifacts.items()})


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Shared and read-only."""
    return make(tmp_path_factory.mktemp("synthetic"))


@pytest.fixture
def own_results(results: Results, tmp_path: Path) -> Results:
    """A copy to spoil."""
    shutil.copytree(results.root, tmp_path / "own")
    return Results(results.plan, tmp_path / "own", titles=results.titles)


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a benchmark's folder from rows."""
    return functools.partial(benchmarks.write, tmp_path)


@pytest.fixture
def make_results(tmp_path: Path) -> Callable[..., Results]:
    """Results of a tier with some settings changed."""
    return lambda **changes: make(tmp_path / "build", **changes)
