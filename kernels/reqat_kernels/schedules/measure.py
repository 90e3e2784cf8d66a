"""Measure every schedule of convolutions on this CPU.

    python -m reqat_kernels.schedules.measure --out results/schedules int8-3x3-56-64-64 int4-1x1-14-1024-256

A name is bits, kernel, size of the image, channels and filters. About 2,000 schedules each, one thread, some minutes a
table on a quiet machine; the tiles (27 of them) are compiled first and shared. Start it again with the same words
after a kill: it goes on where it was.

A candidate's first call is held against torch, byte by byte, and not timed. Then its speed is that of the fastest of
five calls. Between two calls 25 MB are read, about what ResNet-50's other INT8 weights are: in a network, too, they
pass through the caches before a layer's turn comes again. A call during which the thread had to wait for a core is
repeated a few times. Candidates come in random order, so that what else the machine does hits no knob in particular;
what it did is stated beside the table.

A candidate that does not compile, does not apply, or computes something else has speed 0.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reqat_kernels.bench.machine import Neighbours, waited_ns
from reqat_kernels.schedules import conv
from reqat_kernels.schedules.conv import COMPILED, KNOBS, Candidate, Convolution, Impossible
from reqat_kernels.schedules.tables import IMPOSSIBLE, OK, WRONG, Unfinished, digest_of, is_finished, machine

COLUMNS = ("status", "speed", "min_us", "median_us")
UNIT = "GMAC/s"
REPEATS, RETRIES = 5, 10
BETWEEN_BYTES = 25_000_000
_WAIT_SHARE = 0.01  # of a call, spent waiting for a core, from which on it is repeated
_SAY_EVERY_S = 15.0


def time_us(call: Callable[[], Any], between: Callable[[], Any], repeats: int = REPEATS) -> list[float]:
    """Microseconds of ``repeats`` calls, each after a call of ``between``, which is not timed.

    Calls that had to wait for a core are repeated, at most ``RETRIES`` of them in all."""
    times: list[float] = []
    retries = RETRIES
    while len(times) < repeats:
        between()
        waited, start = waited_ns(), time.perf_counter_ns()
        call()
        took = time.perf_counter_ns() - start
        if waited_ns() - waited > _WAIT_SHARE * took and retries:
            retries -= 1
            continue
        times.append(took / 1e3)
    return times


def measured(
    convolution: Convolution, values: Mapping[str, int], isa: str, build: Path, between: Callable[[], Any]
) -> dict[str, Any]:
    """What the table says of a candidate."""
    nothing = {"speed": 0.0, "min_us": "", "median_us": ""}
    try:
        conv.check(convolution, values)
        candidate = Candidate(convolution, values, conv.compile_tile(values, isa, build))
        result = candidate()
    except Impossible:
        return {"status": IMPOSSIBLE, **nothing}
    if not np.array_equal(result, convolution.expected):
        print(f"{convolution.name} {dict(values)}: the result is wrong", file=sys.stderr)
        return {"status": WRONG, **nothing}
    times = time_us(candidate, between)
    least = min(times)
    speed = f"{convolution.macs / least / 1e3:.4g}"
    return {"status": OK, "speed": speed, "min_us": f"{least:.2f}", "median_us": f"{np.median(times):.2f}"}


def identity(convolution: Convolution, isa: str) -> dict[str, Any]:
    """Everything that a table's numbers depend on."""
    folder = Path(__file__).resolve().parent
    version = subprocess.run([conv.compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    sources = [*conv.SOURCES, folder / "conv.py", folder / "measure.py"]
    return {
        "program": conv.settings_of(convolution),
        "instruction_set": isa,
        "compiler": version.splitlines()[0],
        "sources": digest_of(sources),
        "repeats": REPEATS,
        "between_bytes": BETWEEN_BYTES,
        **machine(),
    }


def run(
    convolution: Convolution, out: Path, build: Path, isa: str, *, most: int | None, say: Callable[[str], None]
) -> bool:
    """Measure what is left of a table, ``most`` points at most; True if it is complete then."""
    table = Unfinished(out, convolution.name, KNOBS, COLUMNS, identity(convolution, isa))
    left = table.left
    # All tiles first: a compiler beside the clock would be a neighbour.
    for tile in {tuple(values[knob] for knob in COMPILED): values for values in left}.values():
        try:
            conv.compile_tile(tile, isa, build)
        except Impossible:
            continue
    random = np.random.default_rng(len(left))
    chosen = [left[i] for i in random.permutation(len(left))[:most]]
    buffer = np.ones(BETWEEN_BYTES // 8)
    watch, started, said = Neighbours(), datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    for number, values in enumerate(chosen, 1):
        table.add(values, **measured(convolution, values, isa, build, buffer.sum))
        if time.monotonic() - said > _SAY_EVERY_S:
            said = time.monotonic()
            say(f"{convolution.name}: {number} of {len(chosen)}")
    if table.left:
        return False
    load = watch.load()
    sitting = {
        "started": started,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "points": len(chosen),
        "neighbour_cores": None if math.isnan(load.neighbour_cores) else round(load.neighbour_cores, 3),
        "steal": None if math.isnan(load.steal) else round(load.steal, 3),
    }
    table.finish(UNIT, last_sitting=sitting)
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the tables that are named, one after the other."""
    parser = argparse.ArgumentParser(prog="python -m reqat_kernels.schedules.measure", description=main.__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", help="bits, kernel, size, channels, filters")
    parser.add_argument("--out", type=Path, required=True, help="folder of the tables")
    parser.add_argument("--build", type=Path, default=Path("build/schedules"), help="folder of the compiled tiles")
    parser.add_argument("--isa", choices=conv.TARGETS, help="instruction set (default: the best one here)")
    parser.add_argument("--most", type=int, help="stop after this many points, to go on later")
    options = parser.parse_args(arguments)
    try:
        convolutions = [Convolution.named(name) for name in options.names]
        conv.compiler()
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    isa = options.isa or conv.instruction_set()
    complete = True
    for convolution in convolutions:
        if is_finished(options.out, convolution.name):
            print(f"{convolution.name}: there already", flush=True)
            continue
        try:
            done = run(
                convolution,
                options.out,
                options.build,
                isa,
                most=options.most,
                say=lambda text: print(text, flush=True),
            )
        except ValueError as error:
            parser.error(str(error))
        complete = complete and done
        print(f"{convolution.name}: {'complete' if done else 'to be continued'}", flush=True)
    return 0 if complete else 3


if __name__ == "__main__":
    sys.exit(main())
