"""Every tile of our FP4 matrix product on a GPU, scored by what the compiler made of it. No GPU is needed, or timed.

    python -m reqat_kernels.schedules.resources --out results/schedules nvfp4-sm100 nvfp4-sm120

The Triton kernel W4A4 (``reqat_kernels.triton.gemm``) is compiled ahead of time for each combination of tile, warps and
stages, and registers, spills, shared memory and columns of tensor memory are read off the binary. From these
:func:`modelled` estimates operations a second for a product of 4096 x 4096 x 4096: how many blocks live on a
multiprocessor at once, how many bytes they keep under way, and what is left of the last wave. **The score is a model,
no measurement**: it orders configurations by what their resources allow. Its constants are rounded data of one GPU of
each generation and, where marked, inferred.

A configuration that does not compile, or asks for more than a block may have, has speed 0. One takes seconds; the
program goes on where it was when it is started again.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from reqat_kernels.schedules.tables import IMPOSSIBLE, OK, Unfinished, digest_of, is_finished
from reqat_kernels.triton.compile import SHARED_LIMIT, TENSOR_MEMORY_LIMIT, Row, compile_case
from reqat_kernels.triton.compile_cases import Case, cases
from reqat_kernels.triton.runtime import AVAILABLE, INTERPRETED, triton

KNOBS: dict[str, tuple[int, ...]] = {
    "block_m": (32, 64, 128, 256),
    "block_n": (32, 64, 128, 256),
    "block_k": (64, 128, 256),
    "warps": (4, 8),
    "stages": (1, 2, 3, 4),
}
COLUMNS = ("status", "speed", "registers", "spilled", "shared", "tensor_memory")
UNIT = "modelled TFLOP/s"
SIZE = 4096  # M = N = K of the product
_BYTES = {"nvfp4": 1 / 2 + 1 / 16, "mxfp4": 1 / 2 + 1 / 32}  # an element's, with its share of a block's scale
_CASES = {name: f"W4A4: {name.upper()}, scaled, 4096 rows" for name in _BYTES}
_SAY_EVERY_S = 15.0


@dataclass(frozen=True)
class Multiprocessor:
    """One multiprocessor of a GPU: what it holds, and how fast it is."""

    count: int
    flops_per_s: float  # FP4, dense, of one; 0 where there is no such instruction
    half_flops_per_s: float  # bfloat16, dense, summed in float32, of one
    memory_bytes_per_s: float  # of the GPU's memory, a multiprocessor's share
    registers: int = 65_536
    shared: int = 233_472  # bytes of all blocks; each loses another KB to the system
    warps: int = 64
    blocks: int = 32
    # Inferred: bytes a second from the second-level cache (64 a clock at 1.8 GHz), the latency of such a load (700
    # clocks), and bytes a second of spills (the first-level cache's 128 a clock).
    bytes_per_s: float = 64 * 1.8e9
    latency_s: float = 700 / 1.8e9
    spill_bytes_per_s: float = 128 * 1.8e9


#: sm_80: A100 SXM (108 multiprocessors, 2.0 TB/s); sm_90: H100 SXM (132, 3.35 TB/s); sm_100: B200 (148, 9 PFLOPS of
#: FP4, 8 TB/s); sm_120: RTX 5090 (170, 1.68 PFLOPS of FP4, 1.79 TB/s).
GPUS = {
    80: Multiprocessor(108, 0.0, 312e12 / 108, 2.0e12 / 108, shared=167_936),
    90: Multiprocessor(132, 0.0, 989e12 / 132, 3.35e12 / 132),
    100: Multiprocessor(148, 9e15 / 148, 2.25e15 / 148, 8e12 / 148),
    120: Multiprocessor(170, 1.676e15 / 170, 2.1e14 / 170, 1.79e12 / 170, shared=102_400, warps=48, blocks=24),
}


def resident(row: Row) -> int:
    """How many blocks of a compiled configuration live on a multiprocessor at once; 0: it cannot be launched."""
    gpu = GPUS[row.capability]
    over = row.shared > SHARED_LIMIT[row.capability] or row.tensor_memory > TENSOR_MEMORY_LIMIT
    if row.status not in ("compiled", "unused") or over:
        return 0
    fits = [
        gpu.blocks,
        gpu.warps // row.warps,
        gpu.registers // (32 * row.warps * 8 * math.ceil(max(row.registers, 1) / 8)),  # allocated by eights
        gpu.shared // (row.shared + 1024),
    ]
    if row.tensor_memory:
        fits.append(TENSOR_MEMORY_LIMIT // row.tensor_memory)
    return min(fits)


def modelled(
    row: Row, values: Mapping[str, int], bytes_each: float, *, bytes_left: float | None = None, half: bool = False
) -> float:
    """TFLOP/s that the resources of a compiled configuration allow; 0 where it cannot be launched.

    ``bytes_each``: an element of either operand, scales included (``bytes_left``: of the left one, if it differs).
    ``half``: operands are unpacked and multiplied in 16 bits. Blocks on one multiprocessor share its tensor core
    and its loads. A step of a block costs the longer of computing and loading where loads run ahead (two stages or
    more, or another block), else their sum; loading is bound by the bandwidth or, by Little's law, by the bytes under
    way; spilled registers are written and read again each step.
    """
    gpu, blocks = GPUS[row.capability], resident(row)
    if blocks < 1:
        return 0.0
    m, n, k, stages = (values[name] for name in ("block_m", "block_n", "block_k", "stages"))
    threads = 32 * row.warps
    tiles = math.ceil(SIZE / m) * math.ceil(SIZE / n)
    blocks = min(blocks, math.ceil(tiles / gpu.count))
    step_bytes = (m * (bytes_each if bytes_left is None else bytes_left) + n * bytes_each) * k
    under_way = blocks * max(1, stages - 1) * step_bytes
    compute = blocks * 2 * m * n * k / (gpu.half_flops_per_s if half else gpu.flops_per_s)
    load = blocks * step_bytes / min(gpu.bytes_per_s, under_way / gpu.latency_s)
    spill = blocks * 2 * row.spilled * threads / gpu.spill_bytes_per_s
    step = (max(compute, load) if stages > 1 or blocks > 1 else compute + load) + spill
    waves = math.ceil(tiles / (gpu.count * blocks))
    return 2 * SIZE**3 / (waves * math.ceil(SIZE / k) * step) / 1e12


def configured(case: Case, values: Mapping[str, int]) -> Case:
    """The case with a configuration's tile and options."""
    tile = {f"BLOCK_{axis}": values[f"block_{axis.lower()}"] for axis in "MNK"}
    options = {**case.options, "num_warps": values["warps"], "num_stages": values["stages"]}
    return replace(case, constants={**case.constants, **tile}, options=options, kind="")


def parsed(name: str) -> tuple[str, int]:
    """Format and capability of a name like ``nvfp4-sm100``. Raises ValueError for another one."""
    fmt, _, capability = name.partition("-sm")
    capable = [str(number) for number, gpu in GPUS.items() if gpu.flops_per_s]
    if fmt not in _CASES or capability not in capable:
        known = ", ".join(f"{fmt}-sm{capability}" for fmt in _CASES for capability in capable)
        raise ValueError(f"{name!r} is no table; choose among {known}")
    return fmt, int(capability)


class _Compiler:
    """A process that compiles: the compiler ends its own process over some configurations, and not this one then."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def row(self, fmt: str, capability: int, values: Mapping[str, int]) -> Row:
        """What came out of a configuration; ``failed`` where its process died."""
        self._pool = self._pool or ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        try:
            return self._pool.submit(_compiled, fmt, capability, dict(values)).result()
        except BrokenProcessPool:
            self.close()
            return Row(_CASES[fmt], "", capability, "failed", note="the compiler's process ended")

    def close(self) -> None:
        """End the process."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def _compiled(fmt: str, capability: int, values: dict[str, int]) -> Row:
    case = next(case for case in cases() if case.name == _CASES[fmt])
    return compile_case(configured(case, values), capability)


def run(name: str, out: Path, *, most: int | None = None) -> bool:
    """Compile what is left of a table, ``most`` configurations at most; True if it is complete then."""
    fmt, capability = parsed(name)
    folder = Path(__file__).resolve().parent
    sources = [*(folder.parent / "triton").glob("*.py"), folder / "resources.py"]
    identity: dict[str, Any] = {
        "kernel": _CASES[fmt],
        "capability": capability,
        "triton": triton.__version__,
        "sources": digest_of(sources),
        "model": asdict(GPUS[capability]),
    }
    table = Unfinished(out, f"triton-{name}", KNOBS, COLUMNS, identity)
    said, left = time.monotonic(), table.left
    compiler = _Compiler()
    for number, values in enumerate(left[:most], 1):
        row = compiler.row(fmt, capability, values)
        speed = modelled(row, values, _BYTES[fmt])
        found = {name: getattr(row, name) for name in COLUMNS[2:]}
        table.add(values, status=OK if speed else IMPOSSIBLE, speed=f"{speed:.6g}", **found)
        if time.monotonic() - said > _SAY_EVERY_S:
            said = time.monotonic()
            print(f"triton-{name}: {number} of {len(left)}", flush=True)
    compiler.close()
    if table.left:
        return False
    table.finish(UNIT, note="modelled from compiled resources; no GPU was timed")
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile the tables that are named, one after the other."""
    parser = argparse.ArgumentParser(prog="python -m reqat_kernels.schedules.resources", description=main.__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", help="format and capability: nvfp4-sm100")
    parser.add_argument("--out", type=Path, required=True, help="folder of the tables")
    parser.add_argument("--most", type=int, help="stop after this many configurations, to go on later")
    options = parser.parse_args(arguments)
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "0"
    if not AVAILABLE or INTERPRETED:
        parser.error("triton is missing, or interprets: pip install 'reqat[kernels]', and unset TRITON_INTERPRET")
    complete = True
    for name in options.names:
        try:
            parsed(name)
            done = is_finished(options.out, f"triton-{name}") or run(name, options.out, most=options.most)
        except ValueError as error:
            parser.error(str(error))
        complete = complete and done
        print(f"triton-{name}: {'complete' if done else 'to be continued'}", flush=True)
    return 0 if complete else 3


if __name__ == "__main__":
    sys.exit(main())
