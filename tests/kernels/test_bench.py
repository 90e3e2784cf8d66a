"""The benchmark's own arithmetic: who is timed, in which order, on which copies, and what a row says. No test reads a
clock: times come from a fake one. Providers run in processes of their own, so what they do is read from files."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from reqat.formats import quantize
from reqat_kernels.bench import (
    Absent,
    Case,
    Kernel,
    Work,
    Wrong,
    attention,
    kernels,
    linear,
    loss,
    machine,
    measure,
    table,
    turns,
)
from reqat_kernels.bench.machine import Bandwidth, cold_from
from reqat_kernels.bench.measure import Needs, against_roofline, chunks, percentile, ring_bytes, undisturbed
from reqat_kernels.bench.turns import Roofline, Served, plan, with_ring

SMALL = Case("linear", (("M", 3), ("N", 48), ("K", 64)), ring_bytes=1)
FLAT = Bandwidth((1024, 4096), (4e9, 1e9), 2048)
"""What is read comes from memory from 2 KiB on."""


@pytest.fixture
def probe() -> Iterator[Roofline]:
    probe = Roofline(memory=4096, bandwidth=FLAT)
    yield probe
    probe.stop()


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    """Where stub providers write down their calls."""
    return tmp_path / "calls"


def provider_of(kernel: Kernel, calls: Path, name: str, copies: int = 4, **options: object) -> None:
    def make(case: Case) -> Work:
        def run(i: int) -> None:
            with calls.open("a") as file:
                file.write(f"{name}{i} ")

        return Work(run, copies, bytes_moved=1000, check=lambda: None)

    kernel.provider(name, format="BF16", **options)(make)  # type: ignore[arg-type]


def two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bursts of two calls, and no warm-up."""
    monkeypatch.setattr(Served, "_warm_up", lambda *_: (None, 2))


def test_providers_take_turns_and_every_call_takes_the_next_copy(
    monkeypatch: pytest.MonkeyPatch, calls: Path, probe: Roofline
) -> None:
    two_calls(monkeypatch)
    kernel = Kernel("k")
    for name in "ab":
        provider_of(kernel, calls, name)
    result = measure(Case("k", (("M", 1),)), kernel, rounds=3, probe=probe)
    # One burst of two copies each; whoever came first comes last in the next round.
    assert calls.read_text().split() == ["a0", "a1", "b0", "b1", "b2", "b3", "a2", "a3", "a0", "a1", "b0", "b1"]
    assert [row.n + row.set_aside for row in result.rows] == [3, 3] and [row.m for row in result.rows] == [1, 1]


def test_a_ring_takes_its_bytes_and_one_copy_at_least() -> None:
    for each, copies in ((4, 2), (10, 1), (11, 1), (1, 10)):
        assert Case("k", (), ring_bytes=10).copies(each) == copies
    assert [list(c) for c, _ in zip(chunks(5, 2), range(4), strict=False)] == [[0, 1], [2, 3], [4], [0, 1]]
    assert list(next(chunks(3, 100))) == [0, 1, 2]


# -- caches, from how fast they are read -------------------------------------------------------------------------------


def test_data_is_cold_from_the_size_on_that_is_read_as_slowly_as_the_largest() -> None:
    sizes = (1, 2, 4, 8, 16)
    assert cold_from(sizes, (90, 80, 40, 30, 30)) == 8
    assert cold_from(sizes, (90, 25, 40, 30, 30)) == 8, "one slow reading of a small size is no memory"
    assert cold_from(sizes, (90, 80, 70, 60, 30)) is None, "nothing shows that the largest came from memory"
    assert cold_from(sizes, (30, 30, 30, 30, 30)) == 1, "no cache is faster than this memory"
    assert cold_from(sizes, (90, 80, 40, 30, 30), said=8) == 8
    assert cold_from(sizes, (90, 80, 40, 30, 30), said=9) is None, "all of it may lie in a cache of 9"


def test_bandwidth_between_sizes_and_what_counts_as_cold() -> None:
    assert FLAT.rate(2048) == pytest.approx(2.5e9)  # half the way on a logarithmic scale
    assert (FLAT.rate(1), FLAT.rate(1024), FLAT.rate(2**40)) == (4e9, 4e9, 1e9)
    assert not FLAT.is_cold(2047) and FLAT.is_cold(2048)
    unknown = Bandwidth((), (), None)
    assert math.isnan(unknown.rate(5)) and not unknown.is_cold(2**60)


def test_sizes_are_read_up_to_a_quarter_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_READINGS", 1)
    monkeypatch.setattr(machine, "_MOST_READINGS", 1)
    found = machine.read_bandwidth(33 * 2**20)
    assert found.bytes == (2**20, 2**21, 2**22, 2**23) and all(rate > 0 for rate in found.rates)


@pytest.mark.parametrize("cold", [2**20, 64 * 2**20, 480 * 2**20, 2**40, None])
@pytest.mark.parametrize("memory", [2 * 10**9, 4 * 10**9, 13 * 10**9])
def test_rings_and_probe_are_bounded_by_memory_whatever_the_cache(cold: int | None, memory: int, calls: Path) -> None:
    bandwidth = Bandwidth((1,), (1.0,), cold)
    assert ring_bytes(bandwidth, memory) == (memory if cold is None else min(memory, 2 * cold))
    size = machine.DEVICES["cpu"].probe_bytes(bandwidth, memory)
    assert size <= memory // 4 and (cold is None or size >= min(2 * cold, memory // 4, 2**31))
    kernel = Kernel("k", lambda case: Needs(held=10**7, passing=10**8, copy=10**6, pages=1.5))
    for i in range(16):
        provider_of(kernel, calls, str(i))

    class Known:  # what `with_ring` and `plan` ask of a probe
        bytes = size
        device = "cpu"

    Known.bandwidth = bandwidth  # type: ignore[attr-defined]
    case = with_ring(kernel, Case("k", (), memory_bytes=memory), Known)  # type: ignore[arg-type]
    room = plan(kernel, dataclasses.replace(case, ring_bytes=1), Known) <= memory  # type: ignore[arg-type]
    if room:
        assert plan(kernel, case, Known) <= memory  # type: ignore[arg-type]
    assert 16 * case.ring_bytes <= memory / 2
    assert with_ring(kernel, Case("k", (), ring_bytes=7), Known).ring_bytes == 7  # type: ignore[arg-type]


def test_a_row_says_whether_its_ring_was_cold(monkeypatch: pytest.MonkeyPatch, calls: Path, probe: Roofline) -> None:
    two_calls(monkeypatch)
    kernel = Kernel("k")
    provider_of(kernel, calls, "warm", copies=2)
    provider_of(kernel, calls, "cold", copies=4)
    warm, cold = measure(Case("k", (("M", 1),)), kernel, rounds=1, probe=probe).rows
    assert (warm.ring_bytes, warm.cold) == (2000, False) and (cold.ring_bytes, cold.cold) == (4000, True)
    assert cold.ring_gb_per_s == pytest.approx(FLAT.rate(4000) / 1e9)


def test_what_is_wrong_is_not_timed_and_ours_ends_the_run(probe: Roofline) -> None:
    def broken(case: Case) -> Work:
        def check() -> None:
            raise Wrong("it is off")

        return Work(lambda i: pytest.fail("timed before it was right"), 1, 1, check)

    kernel = Kernel("k")
    kernel.provider("mine", format="BF16", ours=True)(broken)
    with pytest.raises(Wrong, match="M=1, mine BF16.*off"):
        measure(Case("k", (("M", 1),)), kernel, rounds=1, probe=probe)


def test_names_are_taken_once(calls: Path) -> None:
    kernel = Kernel("k")
    provider_of(kernel, calls, "a")
    with pytest.raises(ValueError, match="provider 'a' of BF16"):
        provider_of(kernel, calls, "a")
    with pytest.raises(ValueError, match="'magic'.*native"):
        provider_of(kernel, calls, "b", arithmetic="magic")


@pytest.mark.parametrize(
    ("samples", "q", "value"), [([3.0, 1.0, 2.0], 0.5, 2.0), ([1.0, 2.0], 0.5, 1.5), ([5.0], 0.9, 5.0)]
)
def test_percentiles(samples: Sequence[float], q: float, value: float) -> None:
    assert percentile(samples, q) == value
    many = torch.randn(101).tolist()
    assert percentile(many, 0.1) == pytest.approx(float(torch.tensor(many).quantile(0.1)), rel=1e-6)
    assert math.isnan(percentile([], 0.5))


def test_samples_that_waited_for_a_core_are_set_aside_whatever_their_time() -> None:
    assert undisturbed([1.0, 9.0, 2.0], [0.0, 0.0, 0.5]) == [1.0, 9.0]
    assert undisturbed([1.0, 2.0, 3.0, 4.0], [0.0, 0.5, 0.5, 0.5]) == [1.0, 2.0, 3.0, 4.0]  # too few would remain


def test_rows_are_held_against_the_best_probe_of_the_run(
    monkeypatch: pytest.MonkeyPatch, calls: Path, probe: Roofline
) -> None:
    now = iter(range(0, 10**9, 2000))  # each look at the clock, 2 microseconds later
    monkeypatch.setattr(machine.time, "perf_counter_ns", lambda: next(now))
    monkeypatch.setattr(Served, "_warm_up", lambda *_: (None, 4))
    monkeypatch.setattr(turns, "waited_ns", lambda: 0)
    kernel = Kernel("k")
    provider_of(kernel, calls, "a")
    (row,) = measure(Case("k", (("M", 1),)), kernel, rounds=3, probe=probe).rows
    assert row.median_us == row.min_us == row.p90_us == 0.5  # 2 microseconds, 4 calls
    assert row.gb_per_s == 2.0  # 1000 bytes in half a microsecond
    assert math.isnan(row.roofline_fraction)
    two = dataclasses.replace(row, threads=2)
    row, two = against_roofline([row, two], {1: 4e9, 2: 8e9})
    assert (row.roofline_gb_per_s, row.roofline_fraction) == (4.0, 0.5)
    assert (two.roofline_gb_per_s, two.roofline_fraction) == (8.0, 0.25), "threads are held to what as many read"


def test_cache_size_from_sysfs(tmp_path: Path) -> None:
    for i, (size, kind) in enumerate((("32K", "Data"), ("9999M", "Instruction"), ("24M", "Unified"))):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}" / "size").write_text(size + "\n")
        (tmp_path / f"index{i}" / "type").write_text(kind + "\n")
    assert machine.last_level_cache_bytes(tmp_path) == 24 * 2**20
    assert machine.last_level_cache_bytes(tmp_path / "none") == 0


def test_a_process_knows_the_time_of_those_that_it_started() -> None:
    from reqat_kernels.bench.worker import Worker

    class Busy:
        def work(self) -> float:
            total = 0.0
            while time.process_time() < 0.3:
                total += 1
            return total

    before = machine.own_seconds()
    with Worker(Busy) as worker:
        worker("work")
        running = machine.own_seconds() - before
    assert running > 0.2 and machine.own_seconds() - before > 0.2, "while it runs, and when it has ended"


def test_neighbours_are_what_is_busy_without_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    tick, stat = os.sysconf("SC_CLK_TCK"), tmp_path / "stat"
    seconds, own = iter([100.0, 110.0]), iter([2.0, 8.0])
    monkeypatch.setattr(machine.time, "monotonic", lambda: next(seconds))
    mine = {"system": 0.5, "children_user": 0.25, "children_system": 0.25}
    monkeypatch.setattr(machine.os, "times", lambda: type("T", (), {"user": next(own)} | mine)())
    stat.write_text("cpu 0 0 0 0 0 0 0 0 0 0\n")
    watch = machine.Neighbours(stat)
    # In 10 seconds: 15 of user, 4 of system, 2 of interrupts, 5 stolen; 6 were ours.
    stat.write_text(f"cpu {15 * tick} 0 {4 * tick} 99 99 {tick} {tick} {5 * tick} 0 0\n")
    assert watch.load() == machine.Load(neighbour_cores=1.5, steal=0.5)
    unknown = machine.Neighbours(tmp_path / "absent").load()
    assert math.isnan(unknown.neighbour_cores) and math.isnan(unknown.steal)


# -- the matrix product ------------------------------------------------------------------------------------------------


def test_every_provider_computes_the_product() -> None:
    """Each provider that runs here passes its check at an odd M; ragged shapes are refused with a sentence."""
    found = set()
    for provider in kernels()["linear"].providers:
        if "cpu" not in provider.devices:
            continue
        case = Case("linear", (("M", 3), ("N", 64), ("K", 128)), ring_bytes=1)
        try:
            work = provider.make(case)
        except Absent as reason:
            assert str(reason).endswith(".")
            continue
        work.check()
        work.burst(range(work.copies))()
        found.add(provider.name)
    assert {"torch", "aten int4pack", "reqat"} <= found


def test_attention_and_loss_agree_with_their_references() -> None:
    for case in [*attention.cases([2], [33], device="cpu", ring_bytes=1), *loss.cases("tiny")]:
        found = set()
        for provider in kernels()[case.kernel].providers:
            if "cpu" not in provider.devices:
                continue
            work = provider.make(case)
            work.check()
            work.burst(range(work.copies))()
            found.add(provider.name)
        assert {"attention": {"torch, sdpa", "torch, eager", "reqat"}, "sem_loss": {"naive", "reqat"}}[
            case.kernel
        ] <= found
    with pytest.raises(ValueError, match="'huge'.*a, b"):
        loss.cases("huge")


def test_tables_and_functions_compute_what_they_say() -> None:
    (case,), found = table.cases([32]), set()
    for provider in kernels()["table"].providers:
        try:
            work = provider.make(case)
        except Absent as reason:
            assert str(reason).endswith(".")
            continue
        work.check()
        work.burst(range(2))()
        found.add(provider.label)
    assert {"reqat table of 16", "torch exp", "torch GELU"} <= found


def test_the_check_of_attention_sees_a_wrong_output(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = attention.cases([1], [40], device="cpu", ring_bytes=1)
    right = attention._ours(case, "E2M1")
    right.check()
    from reqat_kernels.native import attention as native

    honest = native.kv_attention
    monkeypatch.setattr(native, "kv_attention", lambda q, k, v, length: honest(q, k, v, length - 1))
    with pytest.raises(Wrong, match="output is off"):
        attention._ours(case, "E2M1").check()


def test_the_check_sees_a_wrong_product() -> None:
    x, w = linear.operands(SMALL)
    y = torch.nn.functional.linear(x, w)
    linear.check(y, x, w)
    wrong = y.clone()
    wrong[1, 7] *= 1.02  # more than two roundings to bfloat16 can do
    with pytest.raises(Wrong, match="arithmetic allows"):
        linear.check(wrong, x, w)
    with pytest.raises(Wrong, match="off by up to nan"):
        linear.check(y * math.nan, x, w)
    with pytest.raises(Wrong, match="has shape"):
        linear.check(y[:1], x, w)
    swapped = quantize(w, "NVFP4").dequantize().roll(1, 0)
    with pytest.raises(Wrong):
        linear.check(y, x, swapped, linear.row_steps(x))


def test_steps_of_int8_inputs_bound_their_rounding() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    scale = x.float().abs().amax(1, keepdim=True) / 127
    rounded = (x.float() / scale).round() * scale
    assert ((rounded - x.float()).abs() <= linear.row_steps(x)).all()
    blocks = x.float().view(5, 2, 32)
    d = (blocks.abs().amax(2, keepdim=True) / 127).half().float()  # ggml's Q8_0 stores the scale in float16
    rounded = ((blocks * (127 / blocks.abs().amax(2, keepdim=True))).round() * d).view(5, 64)
    assert ((rounded - x.float()).abs() <= linear.row_steps(x, 32)).all()


def test_cases_name_their_sizes() -> None:
    first, *_ = cases = linear.cases([1, 8], [64, 128], device="cpu")
    assert len(cases) == 4 and first.label == "M=1 N=64 K=64" and (first.M, first.N, first.K) == (1, 64, 64)
    with pytest.raises(AttributeError, match="K=64.*'B'"):
        _ = first.B


# -- a GPU -------------------------------------------------------------------------------------------------------------

GPU_CASES = [
    Case("linear", (("M", 3), ("N", 64), ("K", 128)), ring_bytes=1),
    Case("linear", (("M", 9), ("N", 64), ("K", 128)), ring_bytes=1),
    Case("attention", (("B", 2), ("T", 33), ("H", 9), ("G", 3), ("D", 64)), ring_bytes=1),
    Case("fake_quantize", (("M", 32), ("K", 32)), ring_bytes=1),
]


@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: f"{case.kernel} {case.label}")
def test_what_runs_on_a_gpu_agrees_with_its_reference(case: Case, device: torch.device) -> None:
    """Each provider for CUDA devices passes its check, on one or in triton's interpreter, before it may be timed."""
    found = set()
    for provider in kernels()[case.kernel].providers:
        if "cuda" not in provider.devices:
            continue
        try:
            work = provider.make(dataclasses.replace(case, device=device.type))
        except Absent as reason:
            assert str(reason) == "it takes up to 8 rows." and case.M > 8
            continue
        work.check()
        work.burst(range(work.copies))()
        found.add(f"{provider.name} {provider.format}")
    ours = {
        "linear": {f"reqat, Triton GEMM {name} W4{inputs}" for name in ("NVFP4", "MXFP4") for inputs in ("A4", "A16")}
        | ({"torch BF16"} if case.kernel == "linear" else set()),
        "attention": {"torch, sdpa BF16", "reqat, Triton NVFP4 E2M1", "reqat, Triton NVFP4 E1M2"},
        "fake_quantize": {"copy FP32", "reqat, Triton NVFP4", "reqat, Triton MXFP4"},
    }[case.kernel]
    if case.kernel == "linear" and case.M <= 8:
        ours |= {"reqat, Triton GEMV NVFP4 W4A4", "reqat, Triton GEMV MXFP4 W4A4"}
    assert ours <= found


def test_the_checks_of_triton_providers_see_a_wrong_result(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reqat_kernels.triton import attention as triton_attention
    from reqat_kernels.triton import gemv, quantize

    honest = triton_attention.decode_attention
    monkeypatch.setattr(triton_attention, "decode_attention", lambda q, k, v: honest(q, k, v, length=32))
    with pytest.raises(Wrong, match="output is off"):
        attention._triton(dataclasses.replace(GPU_CASES[2], device=device.type), "E2M1").check()
    product = gemv.gemv_w4a4
    monkeypatch.setattr(gemv, "gemv_w4a4", lambda x, w: product(x, w).roll(1, 1))
    with pytest.raises(Wrong, match="product is off"):
        linear._triton(dataclasses.replace(GPU_CASES[0], device=device.type), "NVFP4", "gemv").check()
    fused = quantize.fake_quantize
    monkeypatch.setattr(quantize, "fake_quantize", lambda x, fmt, **given: fused(x, fmt, rotation=16, **given))
    provider = next(p for p in kernels()["fake_quantize"].providers if p.name == "reqat, Triton")
    with pytest.raises(Wrong, match="differ from reqat.formats"):
        provider.make(dataclasses.replace(GPU_CASES[3], device=device.type)).check()


def test_a_device_has_its_own_clock_cache_and_probe(
    monkeypatch: pytest.MonkeyPatch, calls: Path, tmp_path: Path, probe: Roofline
) -> None:
    """A device made up for the test: bursts go through its ``ready``, times come from it, and so does the roofline."""
    made = tmp_path / "made"

    class Abacus(machine.Device):
        name = "abacus"

        def bandwidth(self, memory: int = 0) -> Bandwidth:
            return Bandwidth((), (), 3000)

        def probe_bytes(self, bandwidth: Bandwidth, memory: int = 0) -> int:
            return 2 * (bandwidth.cold_bytes or 0)

        def ready(self, burst):  # type: ignore[no-untyped-def]
            with made.open("a") as file:
                file.write(".")
            return burst

        def time_ns(self, burst) -> int:  # type: ignore[no-untyped-def]
            burst()
            return 6000

    class Beads(machine.Probe):
        def __init__(self, bytes: int, device: str = "cpu") -> None:
            super().__init__(bytes)  # the abacus has no memory that torch knows
            self.device = device

    monkeypatch.setitem(machine.DEVICES, "abacus", Abacus())
    monkeypatch.setattr(turns, "Probe", Beads)
    two_calls(monkeypatch)
    monkeypatch.setattr(turns, "present", lambda: ("cpu", "abacus"))
    monkeypatch.setattr(sys.modules["reqat_kernels.bench.measure"], "present", lambda: ("cpu", "abacus"))
    kernel = Kernel("k")
    provider_of(kernel, calls, "here", devices=("abacus",))
    provider_of(kernel, calls, "elsewhere", devices=("cuda",))
    provider_of(kernel, calls, "on the CPU")
    result = measure(Case("k", (("M", 1),), device="abacus"), kernel, rounds=4, probe=probe)
    (row,) = result.rows
    assert (row.provider, row.device, row.median_us) == ("here", "abacus", 3.0)  # two calls in 6 microseconds
    assert made.read_text() == ".." and row.cold  # two bursts in a ring of 4 copies, 1000 bytes each
    assert row.roofline_gb_per_s == 1.0 and row.gb_per_s == pytest.approx(1 / 3)
    assert against_roofline([row], {1: 9e9}) == [row]  # the other device's roofline is none of its business
    assert result.skipped == ["k, elsewhere: it needs a device of type cuda; none is here."]
    assert [c.device for c in Case("k", ()).on(None)] == ["cpu", "abacus"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_rows_of_a_gpu() -> None:
    result = measure(linear.cases([1], [256], device="cuda")[0], kernels()["linear"], rounds=3)
    assert {row.device for row in result.rows} == {"cuda"} and not result.refused
    assert all(row.median_us > 0 and row.roofline_gb_per_s > 0 for row in result.rows)
