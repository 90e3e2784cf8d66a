"""The roofline model by hand-made cases."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from analysis.report import paper, roofline
from analysis.report.roofline import B200, BF16, DGX_SPARK, H100, QWEN_14B, REQUESTS, W4A4KV4, Bits, Device
from reqat.config.paths import Paths, load

ROOT = Path(__file__).parents[3]

SLOW = 1e30  # an arithmetic that never is the limit


def test_the_model_of_figure_6_is_the_paper_tiers() -> None:
    assert load("paper", Paths(ROOT)).tier.models["R1-Qwen-14B"].shape == QWEN_14B
    # 14.77 billion parameters, biases and norms aside
    assert roofline.linear_parameters(QWEN_14B) + 2 * roofline.head_parameters(QWEN_14B) == 14_769_192_960
    assert roofline.cache_bytes_per_token(QWEN_14B, BF16) == 2 * 48 * 8 * 128 * 2


def test_a_step_bound_by_memory_is_bytes_over_bandwidth() -> None:
    device = Device("d", 1e15, 1e12, SLOW, SLOW, SLOW)
    weights = 2 * (roofline.linear_parameters(QWEN_14B) + roofline.head_parameters(QWEN_14B))
    cache = 7 * 1000 * roofline.cache_bytes_per_token(QWEN_14B, BF16)
    assert roofline.step_seconds(QWEN_14B, BF16, device, 7, 1000) == pytest.approx((weights + cache) / 1e12, rel=1e-12)


def test_a_step_bound_by_arithmetic_is_operations_over_the_peak() -> None:
    device = Device("d", 1e15, SLOW, 1e12, 2e12, 4e12)
    head = 2 * 7 * roofline.head_parameters(QWEN_14B) / 1e12
    attention = 4 * 7 * 1000 * 48 * 40 * 128 / 1e12
    for bits, peak in ((BF16, 1e12), (Bits(8, 8), 2e12), (W4A4KV4, 4e12)):
        linear = 2 * 7 * roofline.linear_parameters(QWEN_14B) / peak
        seconds = roofline.step_seconds(QWEN_14B, bits, device, 7, 1000)
        assert seconds == pytest.approx(linear + head + attention, rel=1e-12)
    assert H100.operations(4.5) == H100.bf16  # no FP4 there


def test_memory_limits_how_many_run_at_once() -> None:
    need = roofline.memory(QWEN_14B, BF16, 3, 1000).total
    assert roofline.capacity(QWEN_14B, BF16, dataclasses.replace(B200, memory_bytes=need + 1), 1000) == 3
    assert roofline.capacity(QWEN_14B, BF16, dataclasses.replace(B200, memory_bytes=need - 1), 1000) == 2
    tiny = dataclasses.replace(B200, memory_bytes=1e9)
    assert roofline.tokens_per_s(QWEN_14B, BF16, tiny, 8, 100) == 0.0
    assert math.isnan(roofline.ratio(QWEN_14B, W4A4KV4, tiny, 8, 100))
    # Beyond capacity more requests change nothing.
    full = roofline.capacity(QWEN_14B, BF16, H100, 512 + 8192)
    assert full < 64
    one, more = (roofline.tokens_per_s(QWEN_14B, BF16, H100, r, 8192) for r in (full, REQUESTS))
    assert one == more


def test_one_request_gains_what_bytes_allow_and_no_more() -> None:
    for device in roofline.DEVICES:
        bits = roofline.linear_parameters(QWEN_14B) * 4.5 + roofline.head_parameters(QWEN_14B) * 16
        all_16 = 16 * (roofline.linear_parameters(QWEN_14B) + roofline.head_parameters(QWEN_14B))
        assert roofline.ratio(QWEN_14B, W4A4KV4, device, 1, 1, 1) == pytest.approx(all_16 / bits, rel=0.01)


def test_every_reported_ratio_has_its_point() -> None:
    points = roofline.points()
    assert [p.reported for p in points] == [r.value for r in paper.select("figure6")] and len(points) == 16
    first = points[0]
    assert (first.device, first.bits.kv, first.output_tokens, first.error) == (
        DGX_SPARK, 8, 1024, first.modelled / 3.34 - 1,
    )  # fmt: skip
