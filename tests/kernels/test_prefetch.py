"""How far ahead products read: chosen by measurement, without a trace in the results."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from reqat.formats import get_format, quantize
from reqat_kernels.native import instruction_set, prefetch
from reqat_kernels.native.gemm import PackedWeight, linear, pack_weight
from reqat_kernels.native.prefetch import CANDIDATES, PATHS, ROWS, Ahead

pytestmark = pytest.mark.skipif(instruction_set() == "torch", reason="no native library")


@pytest.fixture(autouse=True)
def _untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a new process, and the schedules of this one back at the end."""
    before = {(path, rows): prefetch.schedule(path, rows) for path in PATHS for rows in ROWS}
    monkeypatch.setattr(prefetch, "_TUNED", set())
    monkeypatch.delenv("REQAT_PREFETCH", raising=False)
    yield
    for (path, rows), ahead in before.items():
        assert ahead is not None
        prefetch.set_schedule(path, rows, ahead)


def weight(rows: int, columns: int, name: str = "NVFP4", seed: int = 0) -> PackedWeight:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return pack_weight(quantize(x, get_format(name), pad=True))


def clocked(monkeypatch: pytest.MonkeyPatch, seconds: dict[Ahead, float]) -> None:
    """A clock by which a pass takes what ``seconds`` says of the schedule in use (others take 1)."""
    now = [0.0]

    def pass_of(path: str, weights: object, rows: int) -> object:
        def run() -> None:
            ahead = prefetch.schedule(path, rows)
            assert ahead is not None
            now[0] += seconds.get(ahead, 1.0)

        return run

    monkeypatch.setattr(prefetch, "_pass", pass_of)
    monkeypatch.setattr(prefetch.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(prefetch, "LEAST_BYTES", 0)


@pytest.mark.parametrize("name", ["NVFP4", "MXFP4"])
@pytest.mark.parametrize("inputs", [None, "A8"])
@pytest.mark.parametrize("rows", ROWS)
def test_results_do_not_depend_on_the_schedule(name: str, inputs: str | None, rows: int) -> None:
    w = weight(80, 96, name)
    x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    results = []
    for ahead in (*CANDIDATES, Ahead(0, 0), Ahead((1 << 20) - 1, (1 << 20) - 1)):
        for path in PATHS:
            prefetch.set_schedule(path, rows, ahead)
        results.append(linear(x, w, inputs=inputs))  # type: ignore[arg-type]
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_schedule_is_kept_for_its_path_and_rows_alone() -> None:
    before = {(path, rows): prefetch.schedule(path, rows) for path in PATHS for rows in ROWS}
    prefetch.set_schedule("integers", 4, Ahead(12345, 54321))
    after = {(path, rows): prefetch.schedule(path, rows) for path in PATHS for rows in ROWS}
    assert after == {**before, ("integers", 4): Ahead(12345, 54321)}


def test_the_fastest_schedule_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    clocked(monkeypatch, {CANDIDATES[2]: 0.5, CANDIDATES[3]: 0.7})
    assert prefetch.tune([weight(16, 32)], "integers") == dict.fromkeys(ROWS, CANDIDATES[2])
    assert {prefetch.schedule("integers", rows) for rows in ROWS} == {CANDIDATES[2]}


def test_a_gain_within_noise_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clocked(monkeypatch, dict.fromkeys(CANDIDATES, 0.99))
    before = {rows: prefetch.schedule("bfloat16", rows) for rows in ROWS}
    assert prefetch.tune([weight(16, 32)], "bfloat16") == before


def test_measured_once_a_process_and_path(monkeypatch: pytest.MonkeyPatch) -> None:
    clocked(monkeypatch, {})
    w = [weight(16, 32)]
    assert prefetch.tune(w, "integers")
    assert prefetch.tune(w, "integers") == {}
    assert prefetch.tune(w, "bfloat16")


def test_nothing_is_measured_for_weights_that_a_cache_holds() -> None:
    assert prefetch.tune([weight(16, 32)], "integers") == {}


def test_nothing_is_measured_where_the_user_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQAT_PREFETCH", "default")
    monkeypatch.setattr(prefetch, "LEAST_BYTES", 0)
    assert prefetch.tune([weight(16, 32)], "integers") == {}


def test_another_wish_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQAT_PREFETCH", "fastest")
    with pytest.raises(ValueError, match="fastest.*default"):
        prefetch.tune([weight(16, 32)], "integers")


def test_real_passes_over_weights_of_several_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "LEAST_BYTES", 0)
    weights = [weight(48, 64), weight(16, 96), weight(32, 72)]  # the last in blocks that are not whole
    for path in PATHS:
        chosen = prefetch.tune(weights, path)
        assert set(chosen) == set(ROWS)
        assert chosen == {rows: prefetch.schedule(path, rows) for rows in ROWS}


@pytest.mark.parametrize("ahead", [Ahead(-1, 0), Ahead(0, 1 << 20)])
def test_distances_outside_their_range_are_refused(ahead: Ahead) -> None:
    with pytest.raises(ValueError, match=str(max(ahead, key=abs))):
        prefetch.set_schedule("integers", 1, ahead)


@pytest.mark.parametrize(("path", "rows"), [("floats", 1), ("integers", 3)])
def test_unknown_paths_and_rows_are_refused(path: str, rows: int) -> None:
    with pytest.raises(ValueError, match=f"{path}.*{rows}"):
        prefetch.schedule(path, rows)
