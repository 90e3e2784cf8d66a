"""The table of launches: complete, within the choices and budgets it was made from, and read by architecture."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from reqat_kernels.schedules import launches as maker  # noqa: E402
from reqat_kernels.schedules.resources import GPUS, resident  # noqa: E402
from reqat_kernels.triton.compile import SHARED_LIMIT, Row  # noqa: E402
from reqat_kernels.triton.compile_cases import CAPABILITIES, cases  # noqa: E402
from reqat_kernels.triton.launches import launch, nearest, table  # noqa: E402

ROW = Row("case", "kernel", 90, "compiled", warps=4, registers=64, shared=20_000)
STREAM = maker.Stream(under_way=8192.0, programs=10_000, memory=1e8, reads=1e8)


def test_the_table_is_complete_and_of_these_choices() -> None:
    assert table()["basis"] == maker.BASIS and "not timed" in maker.BASIS
    assert set(table()["launches"]) == set(maker.KINDS) == {case.kind for case in cases()} - {""}
    for name, kind in maker.KINDS.items():
        entries = table()["launches"][name]
        assert [int(capability) for capability in entries] == list(kind.capabilities)
        for capability, found in entries.items():
            assert found["launch"] in maker.candidates(kind), (name, capability)
            assert 1 <= found["within_budget"] <= found["candidates"] == len(maker.candidates(kind))
            assert found["shared"] <= SHARED_LIMIT[int(capability)] and found["blocks"] >= 1


def test_cases_of_a_kind_are_there() -> None:
    known = {case.name: case for case in cases()}
    for name, kind in maker.KINDS.items():
        assert {known[case].kind for case in kind.cases} == {name}


@pytest.mark.parametrize(
    ("capability", "expected"), [(0, 80), (75, 80), (80, 80), (86, 80), (89, 80), (90, 90), (103, 100), (121, 120)]
)
def test_a_gpu_takes_the_nearest_older_entry(capability: int, expected: int) -> None:
    assert nearest(capability) == expected
    assert launch("attention", capability) == table()["launches"]["attention"][str(expected)]["launch"]


def test_a_kind_without_an_entry_for_an_old_gpu_takes_the_oldest_there_is() -> None:
    assert launch("w4a4 scaled many", 80) == table()["launches"]["w4a4 scaled many"]["90"]["launch"]


def test_a_launch_is_the_caller_s_own() -> None:
    launch("gemv one", 90)["BLOCK_N"] = -1
    assert launch("gemv one", 90)["BLOCK_N"] > 0


def test_a_case_is_compiled_as_the_table_says() -> None:
    for case in cases():
        if not case.kind:
            continue
        for capability in CAPABILITIES:
            how, at = launch(case.kind, capability), case.at(capability)
            assert at.at(capability) == at  # it has its tile now
            assert at.options["num_warps"] == how["num_warps"]
            assert all(at.constants[name] == value for name, value in how.items() if name.isupper())


# -- the choice -------------------------------------------------------------------------------------------------------


def test_less_residency_never_makes_a_stream_faster() -> None:
    whole = maker.streamed(ROW, STREAM)
    gpu = GPUS[90]
    assert whole >= 1e6 * STREAM.memory / (gpu.memory_bytes_per_s * gpu.count)
    for worse in ({"registers": 255}, {"shared": 200_000}):
        assert resident(replace(ROW, **worse)) < resident(ROW)
        assert maker.streamed(replace(ROW, **worse), STREAM) >= whole
    assert maker.streamed(ROW, replace(STREAM, under_way=64.0)) > whole
    assert maker.streamed(ROW, replace(STREAM, programs=10)) > whole  # most multiprocessors idle
    assert maker.streamed(ROW, replace(STREAM, reads=1e10)) > whole
    for cannot in ({"shared": 300_000}, {"status": "failed"}):
        assert maker.streamed(replace(ROW, **cannot), STREAM) == float("inf")


def found(time_us: float | None = 1.0, **changes: Any) -> dict[str, Any]:
    some = {"warps": 4, "status": "compiled", "registers": 64, "spilled": 0, "shared": 1000, "tensor_memory": 0}
    return {**some, "blocks": 8, "time_us": time_us, "wrong": [], **changes}


def test_the_order_of_candidates() -> None:
    rows = [
        ({"BLOCK": 1}, found(0.5, wrong=["spills"])),
        ({"BLOCK": 2}, found(None)),
        ({"BLOCK": 3}, found(2.0)),
        ({"BLOCK": 4}, found(1.001, registers=80)),
        ({"BLOCK": 5}, found(1.0, registers=96)),  # no faster, as far as a model can tell, and more registers
    ]
    assert [launch["BLOCK"] for launch, _ in maker.ordered(rows)] == [4, 5, 3]


def test_what_fails_in_another_case_of_the_kind_is_passed_over() -> None:
    kind = maker.Kind(("first", "second"), {"BLOCK": (1, 2, 3)}, lambda row, launch: 1.0)

    def of(kind: maker.Kind, name: str, launch: dict[str, int], capability: int) -> dict[str, Any]:
        wrong = ["too many registers"] if (name, launch["BLOCK"]) in (("first", 3), ("second", 1)) else []
        return found(float(launch["BLOCK"]), wrong=wrong)

    made = maker.entry(kind, 90, of)
    assert (made["launch"], made["candidates"], made["within_budget"]) == ({"BLOCK": 2}, 3, 2)
    with pytest.raises(ValueError, match=r"first, sm_90: .*too many registers"):
        maker.entry(kind, 90, lambda *_: found(wrong=["too many registers"]))


def test_a_killed_program_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_one(name: str, launch: dict[str, int], capability: int) -> tuple[Row, list[str]]:
        compiled.append((name, launch, capability))
        return replace(ROW, capability=capability), []

    monkeypatch.setattr(maker, "compiled", compile_one)
    kinds = {"loss": replace(maker.KINDS["loss"], capabilities=(90,))}
    monkeypatch.setattr(maker, "KINDS", kinds)
    partial = tmp_path / "launches.json.partial"
    table = maker.make(partial)
    count = len(compiled)
    assert count == len(maker.candidates(kinds["loss"])) + 1
    lines = partial.read_text().splitlines()
    partial.write_text("\n".join(lines[:3]) + "\n")
    assert maker.make(partial) == table
    assert len(compiled) == count + (count - 3)
    assert json.loads(lines[0])[1]["wrong"] == []
