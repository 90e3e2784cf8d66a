"""The kernels for Intel's matrix unit (AMX) around a twin of its instructions, and the instructions in the library."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

import reqat
from reqat_kernels import isas
from reqat_kernels.native import gemm
from reqat_kernels.native import library as native
from reqat_kernels.native.fingerprint import sources
from tests.kernels.builds import ROOT, needs_compiler, run_tests, twin_environment

HERE = Path(__file__)
needs_amx = pytest.mark.skipif(native.instruction_set() != "amx", reason="test_products_with_the_twin runs it")
TILES = ("ldtilecfg", "tilezero", "tileloadd", "tdpbssd", "tdpbf16ps", "tilestored", "tilerelease")


def said(isa: str, environment: dict[str, str] | None = None) -> str:
    script = "from reqat_kernels.native import status; print(status())"
    environment = {**os.environ, **(environment or {}), "REQAT_ISA": isa}
    return subprocess.check_output([sys.executable, "-c", script], env=environment, text=True).strip()


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    if "avx512" not in native.instruction_sets():
        pytest.skip("the kernels for AMX use AVX-512 as well")
    return {**twin_environment(tmp_path_factory.mktemp("twin")), "REQAT_ISA": "amx"}


@needs_compiler
@pytest.mark.slow
def test_products_with_the_twin(twin: dict[str, str]) -> None:
    """Tests of products, and those of this file that need it: every instruction set against the portable path."""
    assert [said(isa, twin).split()[3] for isa in ("amx", "", "avx512")] == ["amx", "amx", "avx512"]
    tests = [str(HERE), str(HERE.parent / "test_native_gemm.py")]
    out = run_tests(twin, *tests, "-k", "number_of_rows or manual or every_instruction or bfloat16 or batch or memory")
    assert "test_tiles" not in out  # among what was skipped


@needs_compiler
@pytest.mark.slow
@pytest.mark.long
def test_random_calls_with_the_twin(twin: dict[str, str]) -> None:
    command = [sys.executable, "-m", "tests.campaign.operators", "--calls", "400", "--seed", "9", "--isa", "amx"]
    done = subprocess.run(command, cwd=ROOT, env=twin, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "0 failed" in done.stdout.splitlines()[-1]


def inputs(M: int, K: int) -> Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(M + K)) * torch.logspace(-4, 4, M)[:, None]


@needs_amx
@pytest.mark.parametrize("kind", [None, "A8", "A4"])
@pytest.mark.parametrize("fmt", ["NVFP4", "MXFP4"])
def test_every_number_of_rows(fmt: str, kind: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers against the portable path; bfloat16, whose bits the instruction decides, against rows by themselves."""
    lib = native.library()
    assert lib is not None
    rounding = reqat.get_format(fmt) if kind == "A4" else kind
    monkeypatch.setattr(gemm, "_WORK_PER_THREAD", 1)
    N, K = 37, 288
    packed = gemm.pack_weight(reqat.quantize(torch.randn(N, K, generator=torch.Generator().manual_seed(0)), fmt))
    bias = torch.linspace(-2, 2, N)
    for M in range(1, 71):
        x = inputs(M, K).to(torch.bfloat16 if kind is None else torch.float32)
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(gemm.linear(x, packed, bias, inputs=rounding))
        torch.set_num_threads(1)
        if kind is None:
            expected = torch.cat([gemm.linear(row[None], packed, bias) for row in x])
        else:
            lib.reqat_limit_isa(0)
            expected = gemm.linear(x, packed, bias, inputs=rounding)
            lib.reqat_limit_isa(len(isas.ISAS) - 1)
        assert all(torch.equal(y, expected) for y in results), M


@needs_amx
@pytest.mark.parametrize("fmt", ["NVFP4", "MXFP4"])
def test_bfloat16_is_summed_as_the_manual_says(fmt: str) -> None:
    """Two chains of fused multiply-adds a block, of the first and of the second element of words, then their sum."""
    lib = native.library()
    if lib is None or not lib.reqat_tile_twin():
        pytest.skip("of a CPU no more is asked than the bound, which test_w4a16_of_bfloat16 holds")
    M, N, K = 5, 21, 96
    q = reqat.quantize(torch.randn(N, K, generator=torch.Generator().manual_seed(0)), fmt)
    packed = gemm.pack_weight(q)
    x = inputs(M, K).bfloat16()
    y = torch.ops.reqat.fp4_linear(x, packed.data, None, *packed.layout)

    block = packed.format.block or 1
    # Of each eight columns the words of 32 bits hold 0 and 2, 4 and 6, 1 and 3, 5 and 7.
    chains = [[8 * i + j for i in range(block // 8) for j in columns] for columns in ((0, 4, 1, 5), (2, 6, 3, 7))]
    values = packed.format.element_type.decode(q.codes).double().numpy() * 2
    exponents = q.scales.view(torch.uint8).float() - 127
    scales = (exponents.exp2() if packed.format.scale == "E8M0" else q.scales.float()).numpy()
    rows, acc = x.double().numpy(), np.zeros((M, N), np.float32)
    for b in range(K // block):
        sums = []
        for chain in chains:
            total = np.zeros((M, N), np.float32)
            for column in chain:  # a product is exact in float64, and so is a sum of these magnitudes
                k = b * block + column
                total = (total + rows[:, None, k] * values[None, :, k]).astype(np.float32)
            sums.append(total)
        acc = ((sums[0] + sums[1]).astype(np.float64) * scales[None, :, b] + acc).astype(np.float32)
    alpha = np.float32(0.5 / packed.global_scale)  # values are doubled
    assert torch.equal(y, torch.from_numpy(acc * alpha))


@pytest.mark.skipif(native.library() is None, reason="no native library")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_the_library_holds_the_instructions() -> None:
    path = native._path()
    assert path is not None
    done = subprocess.run(["objdump", "-d", "--no-show-raw-insn", str(path)], capture_output=True, text=True)
    lib = native.library()
    if "file format elf64-x86-64" not in done.stdout or lib is None or lib.reqat_tile_twin():
        pytest.skip("built for another processor, or with the twin")
    found = set(re.findall(r"^\s*[0-9a-f]+:\s+(\w+)", done.stdout, re.MULTILINE))
    missing = [name for name in (*TILES, "vpdpbusd") if name not in found]
    assert not missing


def test_kernels_ask_for_at_least_an_instruction_set() -> None:
    """Whoever asks for exactly one takes the portable path on every better CPU: same bits, and slowly."""
    for path in sources():
        assert not re.search(r"isa\(\) (==|<)", path.read_text()), path.name


def test_names_are_those_of_common_h() -> None:
    (text,) = (path.read_text() for path in sources() if path.name == "common.h")
    (isa,), (lack,) = (re.findall(rf"enum {name} : int {{(.+?)}}", text, re.DOTALL) for name in ("Isa", "Lack"))
    assert [part.split("=")[0].strip().lower() for part in isa.split(",")] == list(isas.ISAS)
    assert [int(part.split("=")[1]) for part in isa.split(",")] == list(range(len(isas.ISAS)))
    assert [int(part.split("=")[1]) for part in lack.split(",")] == [0, *isas.LACKS]


@pytest.mark.skipif(native.library() is None, reason="no native library")
@pytest.mark.parametrize("isa", isas.ISAS)
def test_what_is_asked_for_and_not_there_is_said(isa: str) -> None:
    line = said(isa)
    assert f"REQAT_ISA={isa}" in line
    used = line.split()[3]
    assert (used == isa) == (isa in native.instruction_sets())
    if used != isa:
        # One reason may hold for several instruction sets, which are then named together.
        reasons = (reason.partition("{}") for reason in isas.LACKS.values())
        assert any(re.search(rf"{before}[a-z0-9 ]*\b{isa}\b[a-z0-9 ]*{after}", line) for before, _, after in reasons)


@pytest.mark.parametrize(
    ("asked", "used", "lacks", "says"),
    [
        ("amx", 3, {4: 3}, ("avx512", "REQAT_ISA=amx", "kernel refused permission to use amx")),
        ("", 3, {4: 2}, ("avx512", "operating system", "amx")),
        ("", 1, {2: 1, 3: 1, 4: 4}, ("avx2", "CPU has no avxvnni or avx512", "compiler", "know amx")),
        ("avx512", 3, {4: 1}, ("avx512", "REQAT_ISA=avx512")),  # what was not asked for is not missed
        ("", 4, {2: 1}, ("amx",)),
    ],
)
def test_each_reason_is_said_once(
    asked: str, used: int, lacks: dict[int, int], says: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = SimpleNamespace(reqat_isa=lambda: used, reqat_lack=lambda isa: lacks.get(isa, 0), reqat_tile_twin=lambda: 0)
    monkeypatch.setattr(native, "library", lambda: found)
    monkeypatch.setenv("REQAT_ISA", asked)
    line = native.status()
    assert line.split()[3] == says[0] and all(part in line for part in says[1:])
    assert len(says) > 2 or "no amx" not in line
    assert [isa for at, isa in enumerate(isas.ISAS) if at not in lacks] == native.instruction_sets()
