"""Ahead-of-time compilation: budgets of registers, spills and memory hold, and the matrix instruction is the one told.

The compiler runs in a process of its own, since this one's triton interprets.
"""

from __future__ import annotations

import csv
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

import reqat_kernels.triton as package  # noqa: E402
from reqat_kernels.triton.compile import (  # noqa: E402
    Row,
    compile_case,
    core_pairs,
    to_markdown,
    violations,
    write_csv,
)
from reqat_kernels.triton.compile_cases import CAPABILITIES, cases  # noqa: E402
from reqat_kernels.triton.runtime import INTERPRETED  # noqa: E402


def compile_in_a_process(tmp_path: Path, *arguments: str, seconds: int) -> list[dict[str, str]]:
    """Rows of the table; fails with the compiler's list of violations."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    table = tmp_path / "table.csv"
    done = subprocess.run(
        [sys.executable, "-m", "reqat_kernels.triton.compile", "--out", str(table), "--force", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    with open(table, newline="") as file:
        return list(csv.DictReader(file))


def test_core_kernels_compile_within_their_budgets(tmp_path: Path) -> None:
    rows = compile_in_a_process(tmp_path, "--core", seconds=600)
    assert [(row["case"], int(row["capability"])) for row in rows] == [(case.name, sm) for case, sm in core_pairs()]
    assert {row["status"] for row in rows} == {"compiled"}


@pytest.mark.slow
@pytest.mark.long
def test_every_kernel_compiles_for_every_generation_within_its_budget(tmp_path: Path) -> None:
    rows = compile_in_a_process(tmp_path, seconds=3600)
    assert len(rows) == len(cases()) * len(CAPABILITIES)
    assert {row["status"] for row in rows} <= {"compiled", "unused", "impossible"}


def test_core_meets_every_generation() -> None:
    assert {sm for _, sm in core_pairs()} == set(CAPABILITIES)


def test_every_kernel_of_the_package_has_a_case() -> None:
    known = {case.kernel.__name__ for case in cases()}
    for module in pkgutil.iter_modules(package.__path__):
        names = vars(importlib.import_module(f"{package.__name__}.{module.name}"))
        kernels = {name for name in names if name.endswith("_kernel")}
        assert kernels <= known, f"{module.name} has kernels that compile.py does not know: {kernels - known}"


def test_names_and_arguments_of_cases() -> None:
    """A case gives each constant its kernel takes, names only arguments that exist, and has a name of its own."""
    assert len({case.name for case in cases()}) == len(cases())
    for case in cases():
        for launched in map(case.at, CAPABILITIES):
            types, _ = launched.signature()
            parameters, constants = case.kernel.arg_names, set(launched.constants)
            assert constants <= set(parameters), case.name
            shouting = {name for name in parameters if name.isupper()}
            assert shouting <= constants | {"M", "N", "K"}, f"{case.name}: {shouting - constants}"
            pointers = {name for name, kind in types.items() if kind.startswith("*")}
            assert pointers, case.name


GOOD = Row(
    case="decode attention: NVFP4",
    kernel="decode_attention_kernel",
    capability=90,
    status="compiled",
    registers=100,
    register_budget=192,
    shared=1000,
    shared_limit=232448,
    matrix="mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
)


def test_a_row_within_budget_is_no_violation() -> None:
    assert violations([GOOD]) == []


@pytest.mark.parametrize(
    "change, message",
    [
        ({"status": "failed", "note": "CompilationError: no"}, r"does not compile \(CompilationError: no\)"),
        ({"registers": 193}, "193 registers, budget 192"),
        ({"spilled": 8}, "8 bytes spilled"),
        ({"shared": 300_000}, "300000 bytes of shared memory, limit 232448"),
        ({"tensor_memory": 513}, "513 columns of tensor memory"),
        ({"flushes": 1}, "1 instructions flush subnormals"),
        ({"matrix": ""}, "matrix instruction none, wanted mma.sync"),
        ({"matrix": GOOD.matrix + " wgmma.mma_async"}, "wanted mma.sync"),
        ({"case": "quantize: NVFP4, static", "registers": 1}, "wanted none"),
    ],
)
def test_each_violation_is_told(change: dict[str, object], message: str) -> None:
    found = violations([replace(GOOD, **change)])  # type: ignore[arg-type]
    assert len(found) == 1
    assert re.search(message, found[0]), found[0]


def test_what_is_said_to_be_impossible_must_be() -> None:
    case = replace(next(case for case in cases() if case.name == GOOD.case), impossible={90: "no such instruction"})
    assert violations([GOOD], [case]) == [
        f"{case.name}, sm_90: compiles, though said to be impossible: no such instruction"
    ]
    row = replace(GOOD, status="impossible", note="no such instruction")
    assert violations([row], [case]) == []


def test_tables(tmp_path: Path) -> None:
    rows = [GOOD, replace(GOOD, capability=80, status="impossible", note="no fp8e4nv", matrix="")]
    write_csv(rows, tmp_path / "table.csv")
    with open(tmp_path / "table.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert [(row["capability"], row["status"], row["note"]) for row in read] == [
        ("90", "compiled", ""),
        ("80", "impossible", "no fp8e4nv"),
    ]
    lines = to_markdown(rows).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "100 (192)" in lines[2] and "impossible: no fp8e4nv" in lines[3]


@pytest.mark.skipif(not INTERPRETED, reason="triton compiles in this process")
def test_an_interpreting_process_refuses() -> None:
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        compile_case(cases()[0], 80)
