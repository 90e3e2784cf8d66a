"""The benchmark's own arithmetic: who is timed, in which order, on which copies, and what a row says. No test reads a
clock: times come from a fake one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
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
)
from reqat_kernels.bench import measure as measure_function
from reqat_kernels.bench.measure import against_roofline, chunks, percentile, undisturbed

clock = __import__("reqat_kernels.bench.measure", fromlist=["time"])
SMALL = Case("linear", (("M", 3), ("N", 48), ("K", 64)), ring_bytes=1)


def provider_of(kernel: Kernel, calls: list[str], name: str, copies: int = 4, **options: object) -> None:
    def make(case: Case) -> Work:
        return Work(lambda i: calls.append(f"{name}{i}"), copies, bytes_moved=1000, check=lambda: None)

    kernel.provider(name, format="BF16", **options)(make)  # type: ignore[arg-type]


def test_providers_take_turns_and_every_call_takes_the_next_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "_warm_up", lambda *_: (None, 2))
    kernel, calls = Kernel("k"), list[str]()
    for name in "ab":
        provider_of(kernel, calls, name)
    result = measure_function(Case("k", (("M", 1),)), kernel.providers, rounds=3, probe=machine.Probe(64))
    # One burst of two copies each; whoever came first comes last in the next round.
    assert calls == ["a0", "a1", "b0", "b1", "b2", "b3", "a2", "a3", "a0", "a1", "b0", "b1"]
    assert [row.n for row in result.rows] == [3, 3] and [row.m for row in result.rows] == [1, 1]


def test_a_ring_is_larger_than_the_cache() -> None:
    cache = machine.last_level_cache_bytes()
    for each in (1000, cache // 3, 5 * cache):
        assert Case("k", ()).copies(each) * each >= min(2 * cache, machine.MEMORY_BYTES // 40)
    assert Case("k", (), ring_bytes=10).copies(4) == 3
    assert [list(c) for c, _ in zip(chunks(5, 2), range(4), strict=False)] == [[0, 1], [2, 3], [4], [0, 1]]
    assert list(next(chunks(3, 100))) == [0, 1, 2]


def test_what_is_wrong_is_not_timed_and_ours_ends_the_run() -> None:
    def broken(case: Case) -> Work:
        def check() -> None:
            raise Wrong("it is off")

        return Work(lambda i: pytest.fail("timed before it was right"), 1, 1, check)

    def absent(case: Case) -> Work:
        raise Absent("nobody installed it.")

    kernel = Kernel("k")
    kernel.provider("theirs", format="BF16")(broken)
    kernel.provider("missing", format="BF16")(absent)
    result = measure(Case("k", (("M", 1),)), kernel.providers, rounds=1, probe=machine.Probe(64))
    assert not result.rows
    assert result.refused == ["k M=1, theirs BF16, not timed: it is off"]
    assert result.skipped == ["k, missing: nobody installed it."]
    kernel.provider("mine", format="BF16", ours=True)(broken)
    with pytest.raises(Wrong, match="M=1, mine BF16.*off"):
        measure(Case("k", (("M", 1),)), kernel.providers, rounds=1, probe=machine.Probe(64))


def test_names_are_taken_once() -> None:
    kernel = Kernel("k")
    provider_of(kernel, [], "a")
    with pytest.raises(ValueError, match="provider 'a' of BF16"):
        provider_of(kernel, [], "a")
    with pytest.raises(ValueError, match="'magic'.*native"):
        provider_of(kernel, [], "b", arithmetic="magic")


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


def test_rows_are_held_against_the_best_probe_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 10**9, 2000))  # each look at the clock, 2 microseconds later
    monkeypatch.setattr(machine.time, "perf_counter_ns", lambda: next(now))
    monkeypatch.setattr(clock, "_warm_up", lambda *_: (None, 4))
    monkeypatch.setattr(clock, "waited_ns", lambda: 0)
    kernel = Kernel("k")
    provider_of(kernel, [], "a")
    probe = machine.Probe(64)
    (row,) = measure(Case("k", (("M", 1),)), kernel.providers, rounds=3, probe=probe).rows
    assert row.median_us == row.min_us == row.p90_us == 0.5  # 2 microseconds, 4 calls
    assert row.gb_per_s == 2.0  # 1000 bytes in half a microsecond
    assert math.isnan(row.roofline_fraction) and not row.cold
    (row,) = against_roofline([row], best_bytes_per_s=4e9)
    assert (row.roofline_gb_per_s, row.roofline_fraction) == (4.0, 0.5)


def test_cache_size_from_sysfs(tmp_path: Path) -> None:
    for i, (size, kind) in enumerate((("32K", "Data"), ("9999M", "Instruction"), ("24M", "Unified"))):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}" / "size").write_text(size + "\n")
        (tmp_path / f"index{i}" / "type").write_text(kind + "\n")
    assert machine.last_level_cache_bytes(tmp_path) == 24 * 2**20
    assert machine.last_level_cache_bytes(tmp_path / "none") == 64 * 2**20


def test_neighbours_are_what_is_busy_without_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    tick, stat = os.sysconf("SC_CLK_TCK"), tmp_path / "stat"
    seconds, own = iter([100.0, 110.0]), iter([2.0, 8.0])
    monkeypatch.setattr(machine.time, "monotonic", lambda: next(seconds))
    monkeypatch.setattr(machine.os, "times", lambda: type("T", (), {"user": next(own), "system": 1.0})())
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
    monkeypatch.setattr(quantize, "fake_quantize", lambda x, fmt, check: fused(x, fmt, check=check, rotation=16))
    provider = next(p for p in kernels()["fake_quantize"].providers if p.name == "reqat, Triton")
    with pytest.raises(Wrong, match="differ from reqat.formats"):
        provider.make(dataclasses.replace(GPU_CASES[3], device=device.type)).check()


def test_a_device_has_its_own_clock_cache_and_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device made up for the test: bursts go through its ``ready``, times come from it, and so does the roofline."""

    class Abacus(machine.Device):
        name = "abacus"
        made = 0

        def cache_bytes(self) -> int:
            return 3000

        def ready(self, burst):  # type: ignore[no-untyped-def]
            Abacus.made += 1
            return burst

        def time_ns(self, burst) -> int:  # type: ignore[no-untyped-def]
            burst()
            return 6000

    monkeypatch.setitem(machine.DEVICES, "abacus", Abacus())
    monkeypatch.setattr(clock, "own_probe", lambda device: probe)
    monkeypatch.setattr(clock, "_warm_up", lambda *_: (None, 2))
    monkeypatch.setattr(clock, "present", lambda: ("cpu", "abacus"))
    probe = machine.Probe(6000, device="cpu")
    probe.device = "abacus"
    kernel, calls = Kernel("k"), list[str]()
    provider_of(kernel, calls, "here", devices=("abacus",))
    provider_of(kernel, calls, "elsewhere", devices=("cuda",))
    provider_of(kernel, calls, "on the CPU")
    case = Case("k", (("M", 1),), device="abacus")
    assert case.copies(1000) == 6  # twice 3000 bytes
    result = measure(case, kernel.providers, rounds=4, probe=machine.Probe(64))
    (row,) = result.rows
    assert (row.provider, row.device, row.median_us) == ("here", "abacus", 3.0)  # two calls in 6 microseconds
    assert Abacus.made == 2 and row.cold  # two bursts in a ring of 4 copies, 1000 bytes each
    assert row.roofline_gb_per_s == 1.0 and row.gb_per_s == pytest.approx(1 / 3)
    assert against_roofline([row], best_bytes_per_s=9e9) == [row]  # the other device's roofline is none of its business
    assert result.skipped == ["k, elsewhere: it needs a device of type cuda; none is here."]
    assert [c.device for c in Case("k", ()).on(None)] == ["cpu", "abacus"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_rows_of_a_gpu() -> None:
    result = measure(linear.cases([1], [256], device="cuda")[0], kernels()["linear"].providers, rounds=3)
    assert {row.device for row in result.rows} == {"cuda"} and not result.refused
    assert all(row.median_us > 0 and row.roofline_gb_per_s > 0 for row in result.rows)
