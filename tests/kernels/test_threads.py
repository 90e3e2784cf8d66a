"""Threads: how many are used, and that no result depends on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from reqat_kernels.native import library as native
from reqat_kernels.native.library import instruction_set, limit_threads, threads

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine of four cores that torch uses."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(native, "_most_threads", sys.maxsize)
    yield


@pytest.mark.usefixtures("four")
@pytest.mark.parametrize(("work", "expected"), [(0, 1), (99, 1), (100, 1), (250, 2), (10_000, 4)])
def test_a_thread_is_started_for_enough_work(work: int, expected: int) -> None:
    assert threads(work, 100) == expected


@pytest.mark.usefixtures("four")
def test_no_more_threads_than_cpus_to_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 3})
    assert threads(10_000, 100) == 2


@pytest.mark.usefixtures("four")
def test_no_more_threads_than_allowed() -> None:
    limit_threads(3)
    assert threads(10_000, 100) == 3
    with pytest.raises(ValueError, match="0"):
        limit_threads(0)


# Run with one, two and three threads, and after the process was moved to a single CPU in between.
_PROGRAM = """
import hashlib, json, os, torch
from reqat.formats import get_format, quantize, quantize_dequantize
from reqat_kernels.native.attention import PackedStates, kv_attention
from reqat_kernels.native.dense import dense_bf16
from reqat_kernels.native.gemm import linear, pack_weight
from reqat_kernels.native import library

random = torch.Generator().manual_seed(0)
w = pack_weight(quantize(torch.randn(512, 2048, generator=random), get_format("NVFP4")))
x = torch.randn(9, 2048, generator=random)
head = torch.randn(512, 2048, generator=random).bfloat16()
states = [torch.randn(2, 2, 700, 64, generator=random) for _ in range(2)]
wide = torch.randn(512, 2048, generator=random)
queries = [torch.randn(2, 4, T, 64, generator=random) for T in (3, 45)]

def everything():
    out = [linear(x, w, inputs=how) for how in (None, "A8", get_format("NVFP4"))]
    out += [linear(x.bfloat16(), w).float(), dense_bf16(x.bfloat16(), head).float()]
    out.append(quantize_dequantize(wide, get_format("NVFP4")))
    packed = []
    for kind, x_BGTD in zip(("key", "value"), states):
        p = PackedStates.allocate(kind, get_format("NVFP4"), 2, 2, 704, 64)
        p.append(x_BGTD, 0)
        packed.append(p)
    out += [kv_attention(query, *packed, 700) for query in queries]
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in out)).hexdigest()

digests, used = [], []
for n in (1, 2, 3):
    torch.set_num_threads(n)
    used.append(library.threads(1 << 30, 1))
    digests.append(everything())
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
used.append(library.threads(1 << 30, 1))
digests.append(everything())
print(json.dumps([digests, used]))
"""


# Two layers of a decoder, with every way of rounding inputs and cache; more threads than some parts have pieces.
_DECODING = """
import hashlib, itertools, json, os, torch
from reqat.formats import get_format, quantize
from reqat_kernels.native import decode
from reqat_kernels.native.decode_check import LayerWeights
from reqat_kernels.native.states import PackedStates
from reqat_kernels.native.weights import pack_weight

os.sched_getaffinity = lambda _: {0, 1, 2}
decode._WORK_PER_THREAD, asked, threads_of = 1, [], decode.threads
decode.threads = lambda *work: asked.append(threads_of(*work)) or asked[-1]
HIDDEN, MLP, H, G, D, BEFORE = 96, 160, 6, 3, 32, 37
SHAPES = [(H * D, HIDDEN), (G * D, HIDDEN), (G * D, HIDDEN), (HIDDEN, H * D), *[(MLP, HIDDEN)] * 2, (HIDDEN, MLP)]

def step(threads, name, inputs, B, T, spoiled):
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=random)
    scale = torch.tensor(0.02) if inputs == "static" else None
    layer = LayerWeights(
        linears=[(pack_weight(quantize(draw(*shape), name)), draw(shape[0])) for shape in SHAPES],
        norms=[draw(HIDDEN), draw(HIDDEN), draw(D), draw(D)],
        eps=1e-6,
        heads=(H, G, D),
        inputs=inputs and get_format(name, **({} if inputs == "own" else {"global_scale": inputs})),
        global_scales=[scale] * 4,
        rotation=32 if inputs in ("row", "own") else 0,
        shift=draw(G, D),
        scaling=D ** -0.5,
    )
    fmt, states = get_format("NVFP4", global_scale=inputs if inputs in ("static", "row") else "dynamic"), []
    for _ in range(2):
        pair = [PackedStates.allocate(kind, fmt, B, G, 48, D, global_scale=scale) for kind in ("key", "value")]
        for packed in pair:
            packed.append(draw(B, G, BEFORE, D), 0)
        states.append(pair)
    x, cos, sin = draw(B, T, HIDDEN), draw(B, T, D), draw(B, T, D)
    if spoiled:
        x[-1, -1, 5] = float("nan")
    mask = torch.rand(B, BEFORE + T, generator=random) > 0.2
    mask[:, -T:] = True
    torch.set_num_threads(threads)
    failed = decode.NativeStack([layer] * 2).step(x, cos, sin, states, BEFORE, mask if B > 1 else None, half=B == 1)
    if failed:
        return failed
    numbers = [x, *(packed.dequantize(BEFORE + T, torch.float32) for pair in states for packed in pair)]
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in numbers)).hexdigest()

ways = [("NVFP4", "static"), ("NVFP4", "row"), ("NVFP4", "dynamic"), ("NVFP4", None), ("MXFP4", "own"), ("MXFP4", None)]
found = [
    [step(n, *way, *size, spoiled) for n in (1, 2, 3)]
    for way, size in itertools.product(ways, [(1, 1), (2, 3), (9, 1), (1, 11), (2, 9)])
    for spoiled in ((False, True) if way[1] else (False,))
]
print(json.dumps([found, asked]))
"""


def run(program: str) -> Any:
    """What a program prints as JSON, in a process that may use three threads."""
    environment = {**os.environ, "OMP_NUM_THREADS": "3"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(instruction_set() == "torch", reason="no native library")
def test_a_decoding_step_does_not_depend_on_threads() -> None:
    found, asked = run(_DECODING)
    assert set(asked) == {1, 2, 3}
    assert len(found) == 50 and all(one == two == three for one, two, three in found)
    failed = [one for one, _, _ in found if isinstance(one, list)]
    assert failed == [[0, "input"]] * 20, "with a NaN in it, a step says where"
    assert len({one for one, _, _ in found if isinstance(one, str)}) == 30, "each way has numbers of its own"


@pytest.mark.skipif(instruction_set() == "torch", reason="no native library")
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_results_do_not_depend_on_threads_or_on_a_changed_affinity() -> None:
    digests, used = run(_PROGRAM)
    assert len(set(digests)) == 1
    cpus = len(os.sched_getaffinity(0))
    assert used == [1, min(2, cpus), min(3, cpus), 1]
