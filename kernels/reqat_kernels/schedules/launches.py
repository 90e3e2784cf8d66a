"""The table of launches (``reqat_kernels/triton/launches.json``), chosen by what compiled candidates take.

    python -m reqat_kernels.schedules.launches --out launches.json

For each kind of launch and each architecture some tiles, warps and stages are compiled ahead of time, in the cases that
stand for the kind. A candidate that spills, exceeds a budget or finds another matrix instruction in any of them is out.
The others are ordered by a model of their resources: large products by ``modelled`` of resources.py, all else, which is
bound by memory, by :func:`streamed`. **The order is modelled from compiled resources, not timed.** Where the model sees
no difference, the smaller use of registers and shared memory wins.

Some three hundred compilations of about a second; a program that was killed goes on from ``<out>.partial``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reqat_kernels.schedules.resources import GPUS, modelled, resident
from reqat_kernels.triton.compile import Row, compile_case, violations
from reqat_kernels.triton.compile_cases import Case, cases
from reqat_kernels.triton.launches import CAPABILITIES
from reqat_kernels.triton.runtime import AVAILABLE, INTERPRETED, triton

BASIS = "modelled from compiled resources, not timed"
# Inferred: what a load from the GPU's memory takes, with the caches on the way.
_MEMORY_LATENCY_S = 800e-9
# Bytes of a weight in NVFP4 with its share of a scale, and of a bfloat16 number.
_FP4, _BF16 = 1 / 2 + 1 / 16, 2.0
_SIZE = 4096  # N and K of products, rows and columns of what is quantized

Launch = dict[str, int]
Found = dict[str, Any]
_SHOWN = ("registers", "spilled", "shared", "tensor_memory")
_COLUMNS = ("warps", "status", *_SHOWN)


@dataclass(frozen=True)
class Stream:
    """A launch that reads much and computes little: bytes that a program has under way, programs, bytes of memory read
    and written once, and bytes read in all, of which the second-level cache serves those that were read before."""

    under_way: float
    programs: int
    memory: float
    reads: float


def streamed(row: Row, stream: Stream) -> float:
    """Microseconds of a launch that is bound by memory: its bytes by the bandwidth or, by Little's law, by what is
    under way, or all its reads by that of the second-level cache. Multiprocessors without a program are idle."""
    gpu, blocks = GPUS[row.capability], resident(row)
    if blocks < 1:
        return math.inf
    blocks = min(blocks, math.ceil(stream.programs / gpu.count))
    busy = min(1.0, stream.programs / gpu.count)
    reached = min(1.0, blocks * stream.under_way / (gpu.memory_bytes_per_s * _MEMORY_LATENCY_S))
    memory = stream.memory / (gpu.memory_bytes_per_s * gpu.count * reached * busy)
    return 1e6 * max(memory, stream.reads / (gpu.bytes_per_s * gpu.count * busy))


@dataclass(frozen=True)
class Kind:
    """A kind of launch: the cases that stand for it, the choices, and microseconds of a choice in the first case."""

    cases: tuple[str, ...]
    choices: Mapping[str, tuple[int, ...]]
    time_us: Callable[[Row, Launch], float]
    capabilities: tuple[int, ...] = CAPABILITIES


def _product(bytes_left: float, half: bool) -> Callable[[Row, Launch], float]:
    """A large product."""

    def time_us(row: Row, launch: Launch) -> float:
        values = {
            "block_m": 128,
            "block_n": launch["BLOCK_N"],
            "block_k": launch["BLOCK_K"],
            "stages": launch["num_stages"],
        }
        speed = modelled(row, values, _FP4, bytes_left=bytes_left, half=half)
        return 2 * _SIZE**3 / speed / 1e6 if speed else math.inf

    return time_us


def _few_rows(rows: int, bytes_left: float) -> Callable[[Row, Launch], float]:
    """A product of few rows: the weights are read once, the rows once a program."""

    def time_us(row: Row, launch: Launch) -> float:
        n, k = launch["BLOCK_N"], launch["BLOCK_K"]
        a_column = n * _FP4 + rows * bytes_left
        programs = math.ceil(_SIZE / n)
        under_way = k * a_column * max(1, launch.get("num_stages", 1) - 1)
        return streamed(row, Stream(under_way, programs, _SIZE * _SIZE * _FP4, programs * _SIZE * a_column))

    return time_us


def _attention(row: Row, launch: Launch) -> float:
    """Eight rows of eight KV heads over 4096 tokens, split to two programs a multiprocessor."""
    a_token = 2 * (64 + 8 + 4)  # codes, scales and a global scale of keys and values of 128 channels
    size = 8 * 8 * _SIZE * a_token
    programs = 2 * GPUS[row.capability].count
    under_way = launch["BLOCK_S"] * a_token * max(1, launch["num_stages"] - 1)
    return streamed(row, Stream(under_way, programs, size, size))


def _quantize(row: Row, launch: Launch) -> float:
    size = _SIZE * _SIZE
    tile = launch["elements"]
    return streamed(row, Stream(tile * _BF16, math.ceil(size / tile), size * (_BF16 + _FP4), size * _BF16))


def _append(row: Row, launch: Launch) -> float:
    """Sixty-four rows of eight KV heads, keys and values of 128 channels."""
    size = 2 * 64 * 8 * 128
    tile = launch["elements"]
    return streamed(row, Stream(tile * _BF16, math.ceil(size / tile), size * (_BF16 + _FP4), size * _BF16))


def _loss(row: Row, launch: Launch) -> float:
    """A chunk of 1024 tokens with 49152 logits."""
    size = 1024 * 49152 * 4
    return streamed(row, Stream(launch["BLOCK"] * 4, 1024, size, size))


Choices = dict[str, tuple[int, ...]]
_STAGES: Choices = {"num_warps": (4,), "num_stages": (2, 3)}
_FEW: Choices = {"BLOCK_N": (32, 64), "BLOCK_K": (64, 128), **_STAGES}
_MANY: Choices = {"BLOCK_N": (64, 128), "BLOCK_K": (64,), "num_warps": (4, 8), "num_stages": (3, 4)}
_SCALED: Choices = {"BLOCK_N": (64, 128), "BLOCK_K": (128,), "num_warps": (4, 8), "num_stages": (2, 3)}
_GEMV: Choices = {"BLOCK_N": (8,), "BLOCK_K": (512, 1024), "num_warps": (4,)}
KINDS: dict[str, Kind] = {
    "quantize": Kind(
        ("quantize: NVFP4, static", "quantize: NVFP4, row, Hadamard 16", "quantize: MXFP4, Hadamard 32"),
        {"elements": (1024, 2048, 4096), "num_warps": (4, 8)},
        _quantize,
    ),
    "append": Kind(
        ("append: NVFP4 row, rotated and shifted", "append: MXFP4, rotated and shifted"),
        {"elements": (512, 1024, 2048), "num_warps": (2, 4)},
        _append,
    ),
    "w4a16 few": Kind(("W4A16: NVFP4, 32 rows", "W4A16: MXFP4, 32 rows"), _FEW, _few_rows(32, _BF16)),
    "w4a16 many": Kind(("W4A16: NVFP4, 4096 rows", "W4A16: MXFP4, 4096 rows"), _MANY, _product(_BF16, True)),
    "w4a4 unpacked few": Kind(
        ("W4A4: NVFP4, unpacked, 32 rows", "W4A4: MXFP4, unpacked, 32 rows"), _FEW, _few_rows(32, _FP4)
    ),
    "w4a4 unpacked many": Kind(
        ("W4A4: NVFP4, unpacked, 4096 rows", "W4A4: MXFP4, unpacked, 4096 rows"),
        {**_MANY, "num_stages": (3,)},
        _product(_FP4, True),
    ),
    "w4a4 scaled few": Kind(
        ("W4A4: MXFP4, scaled, 32 rows", "W4A4: NVFP4, scaled, 32 rows"),
        {**_SCALED, "num_warps": (4,)},
        _few_rows(32, _FP4),
        (90, 100, 120),
    ),
    "w4a4 scaled many": Kind(
        ("W4A4: MXFP4, scaled, 4096 rows", "W4A4: NVFP4, scaled, 4096 rows"),
        {**_SCALED, "BLOCK_N": (128,)},
        # Hopper unpacks them to bfloat16.
        lambda row, launch: _product(_FP4, row.capability < 100)(row, launch),
        (90, 100, 120),
    ),
    "gemv one": Kind(("W4A4 small M: NVFP4, 1 rows", "W4A4 small M: MXFP4, 1 rows"), _GEMV, _few_rows(1, _FP4)),
    "gemv several": Kind(("W4A4 small M: NVFP4, 8 rows", "W4A4 small M: MXFP4, 8 rows"), _GEMV, _few_rows(8, _FP4)),
    "attention": Kind(
        (
            "decode attention: NVFP4",
            "decode attention: NVFP4, 32 rows, causal",
            "decode attention: NVFP4, float16 queries",
            "decode attention: MXFP4",
        ),
        {"BLOCK_S": (16, 32), "num_warps": (4,), "num_stages": (3,)},
        _attention,
    ),
    "attention float32": Kind(
        ("decode attention: NVFP4, float32 queries",),
        {"BLOCK_S": (16, 32), "num_warps": (4,), "num_stages": (3,)},
        _attention,
    ),
    "loss": Kind(("SEM loss: statistics", "SEM loss: gradient"), {"BLOCK": (2048, 4096), "num_warps": (8,)}, _loss),
}


def compiled(name: str, launch: Launch, capability: int) -> tuple[Row, list[str]]:
    """What came out of the case ``name`` under ``launch``, and what is wrong with it."""
    case: Case = next(case for case in cases() if case.name == name).launched(launch)
    row = compile_case(case, capability)
    return row, violations([row], [case])


def ordered(rows: Sequence[tuple[Launch, Found]]) -> list[tuple[Launch, Found]]:
    """The candidates that nothing is wrong with, the best one first."""
    good = [(launch, found) for launch, found in rows if not found["wrong"] and found["time_us"] is not None]
    fastest = min((found["time_us"] for _, found in good), default=0.0)

    def order(candidate: tuple[Launch, Found]) -> tuple[Any, ...]:
        launch, found = candidate
        level = round(math.log(found["time_us"] / fastest) / 0.01)  # in hundredths: finer, the model knows nothing
        return level, found["spilled"], found["registers"] * found["warps"], found["shared"], sorted(launch.items())

    return sorted(good, key=order)


def candidates(kind: Kind) -> list[Launch]:
    """Every combination of choices."""
    return [dict(zip(kind.choices, point, strict=True)) for point in itertools.product(*kind.choices.values())]


class _Kept:
    """What was found of each candidate, on disk as it comes, so that a program that was killed goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.is_file() else []
        self.found: dict[str, Found] = dict(json.loads(line) for line in lines)

    def of(self, kind: Kind, name: str, launch: Launch, capability: int) -> Found:
        key = f"{name}, sm_{capability}, {sorted(launch.items())}"
        if key not in self.found:
            row, wrong = compiled(name, launch, capability)
            time_us = kind.time_us(row, launch)
            found = {column: getattr(row, column) for column in _COLUMNS}
            found |= {"blocks": resident(row), "wrong": wrong}
            found["time_us"] = None if math.isinf(time_us) else float(f"{time_us:.4g}")
            with self.path.open("a") as file:
                file.write(json.dumps([key, found]) + "\n")
            self.found[key] = found
        return self.found[key]


def entry(kind: Kind, capability: int, of: Callable[[Kind, str, Launch, int], Found]) -> dict[str, Any]:
    """An entry of the table: the best candidate in the first case that keeps to its budgets in the others, too.

    Raises ValueError if there is none.
    """
    rows = [(launch, of(kind, kind.cases[0], launch, capability)) for launch in candidates(kind)]
    good = ordered(rows)
    wrong = [line for _, found in rows for line in found["wrong"]]
    for launch, found in good:
        others = [line for name in kind.cases[1:] for line in of(kind, name, launch, capability)["wrong"]]
        if not others:
            columns = {column: found[column] for column in (*_SHOWN, "blocks", "time_us")}
            return {"launch": launch, **columns, "candidates": len(rows), "within_budget": len(good)}
        wrong += others
    raise ValueError(f"{kind.cases[0]}, sm_{capability}: no candidate keeps to its budget ({'; '.join(wrong[:4])})")


def make(partial: Path) -> dict[str, Any]:
    """Compile what is left, and choose."""
    kept, table = _Kept(partial), dict[str, dict[str, Any]]()
    for name, kind in KINDS.items():
        table[name] = {}
        for capability in kind.capabilities:
            made = table[name][str(capability)] = entry(kind, capability, kept.of)
            print(f"{name}, sm_{capability}: {made['launch']}", flush=True)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile candidates, choose, write the table."""
    parser = argparse.ArgumentParser(prog="python -m reqat_kernels.schedules.launches", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    options = parser.parse_args(arguments)
    if options.out.exists() and not options.force:
        parser.error(f"{options.out} is there; --force replaces it")
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "0"
    if not AVAILABLE or INTERPRETED:
        parser.error("triton is missing, or interprets: pip install 'reqat[kernels]', and unset TRITON_INTERPRET")
    partial = options.out.with_name(options.out.name + ".partial")
    made = {
        "schema": "reqat-launches/1",
        "made_by": "python -m reqat_kernels.schedules.launches",
        "basis": BASIS,
        "triton": triton.__version__,
        "launches": make(partial),
    }
    options.out.write_text(json.dumps(made, indent=1) + "\n")
    partial.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
