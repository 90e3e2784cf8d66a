"""Types of machines, from records old and new."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reqat.config.paths import Paths
from reqat.records import pinned, provenance
from reqat.records.machines import UNKNOWN, machine_type, of_flags

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("cpu", "best", "native", "expected"),
    [
        ("AMD EPYC", "avx512", "avx512", "AMD EPYC, avx512"),
        ("AMD EPYC 9B14 96-Core Processor", None, "avx512", "AMD EPYC, avx512"),
        ("AMD EPYC 9B14 96-Core Processor", "avx512", "avx2", "AMD EPYC, avx2"),
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "amx", "avx512", "Intel Xeon, amx"),
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "amx", "portable", "Intel Xeon, portable"),
        ("13th Gen Intel(R) Core(TM) i7-1360P", "avx2", None, "Intel Core, avx2"),
        ("AMD EPYC", None, None, f"AMD EPYC, {UNKNOWN}"),
        ("something else", "neon", "torch", "something else, torch"),
    ],
)
def test_vendor_family_and_the_instructions_in_use(
    cpu: str, best: str | None, native: str | None, expected: str
) -> None:
    entry: dict[str, Any] = {"hardware": {"cpu": cpu, "instructions": best}}
    assert machine_type(entry | {"native": native and {"instruction_set": native}}) == expected


@pytest.mark.parametrize(
    ("flags", "best"),
    [
        ("sse avx2 avx512f amx_tile amx_bf16 amx_int8", "amx"),
        ("avx2 avx512f amx_tile", "avx512"),
        ("sse avx avx2", "avx2"),
        ("fp asimd", "neon"),
        ("sse avx", None),
    ],
)
def test_instruction_sets_of_flags(flags: str, best: str | None) -> None:
    assert of_flags(flags) == best


def test_this_machine_has_a_type() -> None:
    assert provenance.hardware()["instructions"] == provenance.instructions()


def test_pinned_benchmarks_have_types_though_their_manifests_name_none() -> None:
    found = pinned.benchmarks("laptop", Paths(ROOT))
    assert found["AMD EPYC, avx512"].name >= "2026-11-30-laptop"
    old = pinned.benchmarks("overnight", Paths(ROOT))
    assert any(kind.startswith("AMD EPYC") for kind in old)
    assert pinned.benchmarks("smoke", Paths(ROOT)) == {}
