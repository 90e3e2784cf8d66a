"""Convolutions by many schedules against a convolution written out in numpy; tables that survive a kill; resources."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reqat_kernels.native.library import instruction_sets
from reqat_kernels.schedules import conv, measure
from reqat_kernels.schedules.conv import KNOBS, TARGETS, Candidate, Convolution, Impossible, compile_tile, nibbles
from reqat_kernels.schedules.tables import Unfinished, is_finished

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
SCHEDULE = {"rows": 2, "cols": 1, "unroll": 4, "band": 1, "passes": 1, "pack": 2, "layout": 0, "finish": 0}


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiles")


def written_out(c: Convolution) -> np.ndarray:
    """The result as bytes: sums in int64, one tap after the other, then rounded."""
    x, w = (a.astype(np.int64) for a in c.operands)
    border = c.kernel // 2
    padded = np.pad(x, ((border, border), (border, border), (0, 0)))
    sums = np.zeros((c.out_size, c.out_size, c.filters), np.int64)
    for p, q in itertools.product(range(c.out_size), repeat=2):
        patch = padded[p * c.stride : p * c.stride + c.kernel, q * c.stride : q * c.stride + c.kernel]
        sums[p, q] = np.tensordot(w, patch, 3)
    y = np.rint(sums.astype(np.float32) * c.scale).clip(0, 2**c.bits - 1).astype(np.uint8)
    if c.bits == 8:
        return y
    out = np.zeros((*y.shape[:2], c.filters // 2), np.uint8)
    for k in range(c.filters):  # of eight numbers the first four are the low halves of four bytes
        out[..., k // 8 * 4 + k % 4] |= y[..., k] << (0 if k % 8 < 4 else 4)
    return out


@needs_compiler
@pytest.mark.parametrize("isa", TARGETS)
def test_every_schedule_computes_the_convolution(isa: str, build: Path) -> None:
    if isa != "portable" and isa not in instruction_sets():
        pytest.skip(f"this CPU has no {isa}")
    tile = {"rows": 4, "cols": 1, "unroll": 4}
    compiled = compile_tile(tile, isa, build, optimize="-O0")
    for name in ("int8-3x3-5-32-32", "int4-3x3-5-32-16", "int8-1x1-6-32-16-stride2", "int4-3x3-6-32-16-stride2"):
        c = Convolution.named(name)
        assert c.name == name
        c.operands[0].flat[: c.channels] = 2**c.bits - 1  # extremes, which sums of 16 bits would not hold
        wanted, tried = written_out(c), 0
        np.testing.assert_array_equal(c.expected, wanted)
        for rest in itertools.product(*(KNOBS[knob] for knob in ("band", "passes", "pack", "layout", "finish"))):
            values = {**tile, **dict(zip(("band", "passes", "pack", "layout", "finish"), rest, strict=True))}
            try:
                candidate = Candidate(c, values, compiled)
            except Impossible:
                assert values["pack"] == 0 and values["layout"] == 1
                continue
            np.testing.assert_array_equal(candidate(), wanted, err_msg=f"{name} {values}")
            tried += 1
        assert tried == 60


def test_extreme_operands_are_in_range() -> None:
    for bits in (4, 8):
        x, w = Convolution(4, 32, 16, 3, bits).operands
        assert (x.max(), w.min(), w.max()) == (2**bits - 1, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@needs_compiler
def test_tiles_that_do_not_fit_the_registers_do_not_compile(build: Path) -> None:
    with pytest.raises(Impossible, match="registers"):
        compile_tile({"rows": 14, "cols": 4, "unroll": 1}, "avx512", build, optimize="-fsyntax-only")
    assert not list(build.glob("*rows14*"))


def test_nibbles_keep_the_order_of_conv_cpp() -> None:
    values = np.array([1, 2, 3, 4, -1, -2, -3, -8], np.int8)
    assert nibbles(values).tolist() == [0xF1, 0xE2, 0xD3, 0x84]


@pytest.mark.parametrize("name", ["int8-3x3-56-64", "int8-3x5-56-64-64", "int2-3x3-8-8-16", "int8-2x2-8-8-16", "x"])
def test_names_of_no_convolution_are_refused(name: str) -> None:
    with pytest.raises(ValueError):
        Convolution.named(name)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"rows": 3}, ValueError),
        ({"pack": 0, "layout": 1}, Impossible),
        ({"cols": 4}, Impossible),  # 16 filters
        ({"passes": 4}, Impossible),  # 8 channels
    ],
)
def test_schedules_that_do_not_apply(change: dict[str, int], error: type[Exception]) -> None:
    conv.check(Convolution(4, 8, 16, 3), SCHEDULE)
    with pytest.raises(error) as raised:
        conv.check(Convolution(4, 8, 16, 3), SCHEDULE | change)
    assert isinstance(raised.value, Impossible) == (error is Impossible)


# -- measuring --------------------------------------------------------------------------------------------------------


class Replaced(Candidate):
    """A candidate that is not computed: its result is right, or is not."""

    right = True

    def __init__(self, convolution: Convolution, values: Any, compiled: Path) -> None:
        self.c = convolution

    def __call__(self) -> np.ndarray:
        return self.c.expected if self.right else self.c.expected + 1


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "Candidate", Replaced)
    monkeypatch.setattr(conv, "compile_tile", lambda values, isa, build: build)
    monkeypatch.setattr(measure, "KNOBS", {**{k: v[:1] for k, v in KNOBS.items()}, "rows": (1, 2, 4), "pack": (0, 1)})
    monkeypatch.setattr(measure, "BETWEEN_BYTES", 80)
    monkeypatch.setattr(conv, "compiler", lambda: "true")
    monkeypatch.setattr(measure, "identity", lambda convolution, isa: {"program": convolution.name})


def test_what_is_wrong_or_impossible_has_speed_0(without_compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    c = Convolution(4, 8, 16, 1)
    found = measure.measured(c, SCHEDULE, "portable", Path(), lambda: None)
    assert found["status"] == "ok"
    assert float(found["speed"]) == pytest.approx(c.macs / float(found["min_us"]) / 1e3, rel=0.05)
    assert measure.measured(c, SCHEDULE | {"pack": 0, "layout": 1}, "portable", Path(), lambda: None)["speed"] == 0
    monkeypatch.setattr(Replaced, "right", False)
    found = measure.measured(c, SCHEDULE, "portable", Path(), lambda: None)
    assert (found["status"], found["speed"]) == ("wrong", 0)


def test_a_call_that_waited_is_repeated_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    waits = itertools.count(step=10**12)
    monkeypatch.setattr(measure, "waited_ns", lambda: next(waits))
    times = measure.time_us(lambda: calls.append("call"), lambda: calls.append("between"), 5)
    assert len(times) == 5 and calls == ["between", "call"] * (5 + measure.RETRIES)


def test_a_killed_measurement_goes_on(without_compiler: None, tmp_path: Path) -> None:
    command = ["--out", str(tmp_path), "--build", str(tmp_path), "int8-1x1-4-8-16"]
    assert measure.main([*command, "--most", "4"]) == 3
    partial = tmp_path / "int8-1x1-4-8-16.partial"
    first = partial.read_text()
    partial.write_text(first + "1,1,4")  # a line that was cut
    assert measure.main(command) == 0 and not partial.exists()
    text = (tmp_path / "int8-1x1-4-8-16.csv").read_text()
    rows, meta = list(csv.DictReader(text.splitlines())), json.loads((tmp_path / "int8-1x1-4-8-16.json").read_text())
    assert [(row["rows"], row["pack"]) for row in rows] == [(a, b) for a in "124" for b in "01"]
    assert set(first.splitlines()[1:]) < set(text.splitlines())  # what was measured stays
    assert meta["sha256"] == hashlib.sha256(text.encode()).hexdigest() and meta["last_sitting"]["points"] == 2
    before = text
    assert measure.main(command) == 0  # nothing is measured again
    assert (tmp_path / "int8-1x1-4-8-16.csv").read_text() == before


def test_tables_of_two_programs_do_not_mix(tmp_path: Path) -> None:
    knobs = {"a": (1, 2)}
    table = Unfinished(tmp_path, "t", knobs, ("speed",), {"sources": "one"})
    table.add({"a": 2}, speed=3)
    with pytest.raises(ValueError, match="t.partial"):
        Unfinished(tmp_path, "t", knobs, ("speed",), {"sources": "two"})
    with pytest.raises(ValueError):
        table.finish("GMAC/s")
    assert not is_finished(tmp_path, "t")
    again = Unfinished(tmp_path, "t", knobs, ("speed",), {"sources": "one"})
    assert again.left == [{"a": 1}]


# -- what a compiled product is worth ---------------------------------------------------------------------------------


def test_the_model_of_resources() -> None:
    pytest.importorskip("triton")
    from reqat_kernels.schedules import resources
    from reqat_kernels.triton.compile import Row

    row = Row("case", "kernel", 100, "compiled", warps=4, registers=128, shared=50_000, tensor_memory=128)
    values = {"block_m": 128, "block_n": 128, "block_k": 128, "warps": 4, "stages": 3}

    def speed(change: dict[str, int] | None = None, **of_row: Any) -> float:
        return resources.modelled(replace(row, **of_row), values | (change or {}), 0.5625)

    whole = speed()
    peak = resources.GPUS[100].count * resources.GPUS[100].flops_per_s / 1e12
    assert 0 < whole <= peak
    assert speed(spilled=64) < whole and speed(spilled=256) < speed(spilled=64)
    assert speed(shared=200_000) <= whole and speed(registers=255) <= whole
    assert speed(status="failed") == speed(shared=300_000) == speed(tensor_memory=1024) == 0
    assert speed({"block_m": 32, "block_n": 32}) < whole  # less reuse


def test_a_configuration_changes_tile_and_options_alone() -> None:
    pytest.importorskip("triton")
    from reqat_kernels.schedules import resources
    from reqat_kernels.triton.compile_cases import cases

    case = next(case for case in cases() if case.name == resources._CASES["nvfp4"])
    values = {name: choices[0] for name, choices in resources.KNOBS.items()}
    made = resources.configured(case, values)
    assert made.constants == case.constants | {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 64}
    assert made.options == case.options | {"num_warps": 4, "num_stages": 1}
    for name in ("nvfp4-sm80", "int4-sm100", "nvfp4"):
        with pytest.raises(ValueError):
            resources.parsed(name)


def test_a_compiler_that_dies_costs_one_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from concurrent.futures.process import BrokenProcessPool

    from reqat_kernels.schedules import resources

    pools: list[int] = []

    class Pool:
        """Dies over the first configuration that it is given."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            pools.append(len(pools))

        def submit(self, *arguments: Any) -> Any:
            raise BrokenProcessPool

        def shutdown(self) -> None:
            pass

    monkeypatch.setattr(resources, "ProcessPoolExecutor", Pool)
    compiler = resources._Compiler()
    rows = [compiler.row("nvfp4", 100, {}) for _ in range(2)]
    assert [row.status for row in rows] == ["failed"] * 2 and pools == [0, 1]
