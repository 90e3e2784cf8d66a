"""The benchmark as tables and Figure 6 read it, and the tiers that have one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from analysis.registry import throughput_names
from analysis.report import benchmark
from reqat.config.errors import ReqatError
from reqat.config.throughput import load_throughput
from reqat.config.tier import tier_names
from tests.analysis.benchmarks import SETTINGS, rows

ROOT = Path(__file__).parents[3]


def test_a_benchmark_that_is_not_whole_is_refused(bench: Callable[..., Path]) -> None:
    source = bench([{key: value for key, value in row.items() if key != "median_us"} for row in rows()])
    with pytest.raises(ReqatError, match="lacks median_us; `reqat bench --force`"):
        benchmark.read(source)
    (source / benchmark.CSV).write_text("changed")
    with pytest.raises(ReqatError, match="is not the file that its record describes"):
        benchmark.read(source)
    with pytest.raises(ReqatError, match="nothing finished here"):
        benchmark.read(source / "elsewhere")


def test_tiers_that_have_a_benchmark_exist() -> None:
    import yaml

    given = yaml.safe_load((ROOT / "config" / "throughput.yaml").read_text())["tiers"]
    assert {"smoke", "laptop"} <= set(given) <= set(tier_names(ROOT / "config"))
    assert load_throughput("smoke", ROOT / "config") != load_throughput("laptop", ROOT / "config")
    assert load_throughput("paper", ROOT / "config") is None and throughput_names(None) == ([], [])


def test_unknown_keys_are_named(tmp_path: Path) -> None:
    (tmp_path / "throughput.yaml").write_text(json.dumps({"tiers": {"smoke": {**SETTINGS, "thread": 2}}}))
    with pytest.raises(ReqatError, match="unknown key 'thread'. Did you mean 'threads'"):
        load_throughput("smoke", tmp_path)
    assert load_throughput("smoke", tmp_path / "none") is None
