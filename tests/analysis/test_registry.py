"""A table or figure is one module: it is found by what it declares, and asking for names imports nothing heavy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from analysis.build import maker
from analysis.registry import Made, declared_in, discovered, figure_names, study_names, table_names, throughput_names
from analysis.report.cells import Results
from reqat.config.companions import kinds
from reqat.config.paths import Paths, load
from reqat.config.tier import load_catalogue

ROOT = Path(__file__).parents[2]
ARTIFACTS = set(load_catalogue(ROOT / "config").artifacts)
MODULES = [(package, made) for package in ("tables", "figures") for made in discovered(package).values()]


@pytest.mark.parametrize(("package", "made"), MODULES, ids=[made.module for _, made in MODULES])
def test_a_module_is_named_after_what_it_makes_and_makes_it(package: str, made: Made) -> None:
    assert made.module == f"analysis.{package}.{made.name.replace('-', '_')}"
    assert maker(package, made.name).__module__ == made.module
    others = (made.studies, made.benchmark, made.companion)
    if package == "figures":  # a table with a name alone is that of an artifact
        assert made.of_cells or any(other is not None for other in others)
    elif not made.of_cells and all(other is None for other in others):
        assert made.name in ARTIFACTS
    assert made.companion is None or made.companion in kinds()
    assert made.artifact is None or made.artifact in ARTIFACTS


def test_a_table_that_no_module_claims_is_the_generic_one() -> None:
    assert maker("tables", "sweep").__module__ == "analysis.tables._generic"


def test_what_a_plan_asks_for_follows_from_its_cells(results: Results) -> None:
    assert table_names(results.plan)[-4:] == ["claims", "table11", "table6", "table8"]
    assert list(figure_names(results.plan)) == [
        "figure10b",
        "figure11b",
        "figure1a",
        "figure1b",
        "figure1d",
        "figure5a",
        "losses",
        "qfit",
        "regime",
        "table1-bars",
        "table1-dots",
    ]
    assert figure_names(load("smollm", Paths(ROOT))) == {}
    assert "claims" not in table_names(load("smollm", Paths(ROOT)))


def test_without_studies_and_benchmark_there_is_nothing_to_make() -> None:
    assert study_names({}) == throughput_names(None) == ([], [])
    assert throughput_names({"linear": {"m": [1]}, "decode": None}) == (
        ["figure6-error", "figure6-memory", "throughput-linear"],
        ["figure6"],
    )


def test_a_new_file_is_all_that_a_new_figure_takes(tmp_path: Path) -> None:
    (tmp_path / "_shared.py").write_text("raise ImportError('no module of a figure')\n")
    (tmp_path / "figure99.py").write_text(
        "raise ImportError('read, not imported')\nNAME = 'figure99'\nARTIFACT = 'table1'\nNEEDS = 'trained'\n"
    )
    assert declared_in(tmp_path, "new") == {"figure99": Made("new.figure99", "figure99", "table1", "trained")}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "one.py: it needs a NAME"),
        ("NAME = 'a'\nNEEDS = 'luck'", "NEEDS is 'luck', not one of cells, quantized"),
        ("NAME = 'a'\nNEEDS = 'cells'\nSTUDIES = ()", "not of several"),
        ("NAME = 'a'\nSTUDIES = ('pair')", "STUDIES and BENCHMARK are tuples"),
        ("NAME = 'two'", "new.one makes 'two', too"),
    ],
)
def test_constants_that_say_nothing_sensible_are_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "one.py").write_text(text + "\n")
    (tmp_path / "two.py").write_text("NAME = 'two'\n")
    with pytest.raises(ValueError, match=says):
        declared_in(tmp_path, "new")


def test_importing_analysis_is_light() -> None:
    code = (
        "import sys; import analysis.report.paper; from analysis.registry import discovered\n"
        "assert discovered('tables') and discovered('figures')\n"
        "assert not {'pandas', 'matplotlib', 'torch'} & set(sys.modules)\n"
        "import analysis.build, analysis.report.cells, analysis.tables.table1, analysis.figures.figure1b\n"
        "assert 'torch' not in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
