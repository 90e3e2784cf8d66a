"""The benchmark's tables, of made-up rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.image import imread

from analysis.build import build_throughput, throughput_tables
from analysis.figures.figure6 import decode_ratios
from analysis.registry import throughput_names
from analysis.report import benchmark, style
from analysis.report.document import EMPTY
from analysis.report.names import FIGURE_SUFFIXES, TABLE_SUFFIXES
from reqat.config.throughput import Throughput
from tests.analysis.benchmarks import SETTINGS, cells, rows, tables_of


def test_the_linear_table_says_how_many_times_ours_is_as_fast(bench: Callable[..., Path]) -> None:
    table = tables_of(bench(rows(), skipped=["linear, x: absent."]))["throughput-linear"]
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
    table = tables_of(bench(made, settings))["throughput-entropy"]
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
    table = tables_of(bench(made, {"sem_loss": {"shapes": ["tiny"]}}))["throughput-sem-loss"]
    assert table.name == "throughput-sem-loss" and len(table.sections) == 3  # no line of the probe
    found = [(row[2].text, row[2].detail) for section in table.sections[:2] for row in section]
    assert found == [("2100", "(<1 MiB)"), ("2800", "(200 MiB)"), ("3000", ""), ("2625", "(302 MiB)")]
    assert [row[2].text for row in table.sections[2]] == ["0.80", "1.07"]


def test_each_table_speaks_of_its_own_rows(bench: Callable[..., Path]) -> None:
    made = [
        row | ({"probe_gb_per_s": 20.0 + row["m"], "set_aside": 0} if row["kernel"] == "linear" else {"cold": False})
        for row in rows()
    ]
    made_tables = tables_of(bench(made))
    linear, decode = made_tables["throughput-linear"], made_tables["throughput-decode"]
    assert [(c.text, c.detail) for c in linear.sections[3][0][2:]] == [("21.0", "(70%)"), ("28.0", "(93%)")]
    assert any("0 samples" in note for note in linear.footer) and not any("in the cache" in n for n in linear.footer)
    assert any("32 samples" in note for note in decode.footer) and any("in the cache" in n for n in decode.footer)


def test_decoding_in_ratios_and_memory(bench: Callable[..., Path]) -> None:
    source = bench(rows())
    measured = benchmark.read(source)
    ratios = decode_ratios(measured)
    assert ratios.values.tolist() == [[1, 8, 2], [1, 16, 2], [2, 8, 3], [2, 16, 3]]  # over the better of the two BF16
    memory = benchmark.memory_rows(measured).set_index(["model", "precision"])
    assert memory.loc[("SmolLM2-135M", "BF16"), "cache_bytes"] == 4e5
    assert memory.loc[("SmolLM2-135M", "NVFP4-W4A4KV4"), "weight_bytes"] == 1e6
    computed = memory.loc["R1-Qwen-14B"].cache_bytes
    assert computed["BF16"] / computed["NVFP4-W4A4KV4"] == pytest.approx(16 / 4.5)
    assert cells(tables_of(source)["throughput-decode"], 0)[2][2:6] == ["40.0", "40.0", "60.0", "60.0"]


def test_all_files_are_written_by_the_names_that_the_dag_expects(bench: Callable[..., Path], tmp_path: Path) -> None:
    written = build_throughput(bench(rows()), tmp_path / "t", tmp_path / "p")
    tables, figures = throughput_names(Throughput.model_validate(SETTINGS))
    expected = {f"{t}.{s}" for t in tables for s in TABLE_SUFFIXES}
    expected |= {f"{f}.{s}" for f in figures for s in FIGURE_SUFFIXES}
    assert {path.name for path in written} == expected
    pixels = imread(tmp_path / "p" / "figure6.png")
    assert pixels.shape[1] == round(style.WIDTH_IN * style.DPI) and pixels[..., :3].std() > 0.05


def test_devices_have_columns_of_their_own(bench: Callable[..., Path]) -> None:
    """A GPU's rows neither take the place of the CPU's nor count in its ratios."""
    peers = [row for row in rows() if row["kernel"] == "linear" and row["m"] == 1 and not row["ours"]]
    gpu = [row | {"device": "cuda", "median_us": row["median_us"] / 100} for row in peers]
    own = gpu[0] | {"provider": "reqat, Triton", "format": "NVFP4 W4A4", "ours": True, "median_us": 0.6}
    table = tables_of(bench([*rows(), *gpu, own]))["throughput-linear"]
    assert [(c.group, c.name) for c in table.columns[2:]] == [
        ("N=K=64", "M=1"), ("N=K=64", "M=8"), ("N=K=64, cuda", "M=1"),
    ]  # fmt: skip
    assert cells(table, 2)[0] == ["ours: times as fast as the best BF16", "", "3.00", "1.50", "4.00"]
    assert cells(table, 0)[0] == ["torch", "BF16", "300", "300", "3.0"]
    assert ["reqat, Triton", "NVFP4 W4A4", EMPTY, EMPTY, "0.6"] in cells(table, 1)


def test_heads_and_prompt_lookup_have_tables_of_their_own(bench: Callable[..., Path]) -> None:
    head = {
        "model": "pinned", "head": "NVFP4", "embeddings": None, "weight_bytes": 2**20, "reference_weight_bytes": 2**21,
        "rows": 4, "tokens": 400, "same_argmax": 300, "kl_nats": 0.0125, "kl_nats_se": 0.001, "perplexity": 12.0,
        "reference_perplexity": 11.5, "problems": 10, "correct": 6, "reference_correct": 7,
    }  # fmt: skip
    bare = head | {"head": "INT8", "tokens": 0, "problems": 0}
    guessed = {
        "model": "pinned", "guesses": 3, "prompts": 2, "same_responses": 2, "tokens": 50, "accepted_per_step": 0.25,
        "tokens_per_s": 98.76,
    }  # fmt: skip
    settings = {
        "heads": [{"model": "pinned", "choices": [{"head": "NVFP4"}], "families": ["chain_sum"]}],
        "speculation": [{"model": "pinned", "families": ["chain_sum"], "max_new_tokens": 9, "guesses": [3]}],
    }
    absent = {"model": "package:none", "skipped": "not installed"}
    made = tables_of(bench(rows(), settings, heads=[head, bare, absent], speculation=[guessed, absent]))
    first, second, third = cells(made["throughput-heads"], 0)
    assert first[1:] == ["NVFP4", EMPTY, "1.00", "2.00", "75.0", "0.0125", "12.000", "11.500", "6, 7, 10"]
    assert second[5:] == [EMPTY] * 5 and "not installed" in third[1]
    lookup, missing = cells(made["throughput-speculation"], 0)
    assert lookup[1:] == ["3", "2", "2", "50", "0.25", "98.8"] and "not installed" in missing[1]


def test_heads_in_fewer_bits_are_rows_with_their_bits_and_not_in_figure_6(bench: Callable[..., Path]) -> None:
    made = [row | {"bits": "4.5 / 16 / 16" if row["ours"] else "16 / 16 / 16"} for row in rows()]
    ours = [row for row in made if row["provider"] == "reqat.pack"]
    faster = [
        row | {"format": f"{row['format']}, head NVFP4", "bits": "4.5 / 4.5 / 4.5", "tokens_per_s": 1e6} for row in ours
    ]
    with_heads, without = (benchmark.read(bench([*made, *more])) for more in (faster, []))
    assert decode_ratios(with_heads).equals(decode_ratios(without))
    table = next(t for t in throughput_tables(with_heads) if t.name == "throughput-decode")
    shown = {line[1]: line[2] for line in cells(table, 0)}
    assert shown["NVFP4-W4A4KV4"] == "4.5 / 16 / 16" and shown["NVFP4-W4A4KV4, head NVFP4"] == "4.5 / 4.5 / 4.5"


def test_what_could_not_be_timed_says_why_in_its_cell(bench: Callable[..., Path]) -> None:
    why = {"ggml": "it was ended by SIGSEGV, a protection fault", "oneDNN": "it raised RuntimeError: no such kernel"}
    lost = {"median_us": math.nan, "tokens_per_s": math.nan, "n": 0, "roofline_fraction": math.nan}
    made = [
        row | ({"failure": why[row["provider"]]} | lost if row["provider"] in why and row["m"] == 1 else {})
        for row in rows()
    ]
    made = [row | ({"failure": "off by 3", **lost} if row["provider"] == "llama.cpp" else {}) for row in made]
    made_tables = tables_of(bench(made, refused=["linear M=1, ggml Q4_0 W4A8, not timed: it was ended by SIGSEGV."]))
    linear, decode = made_tables["throughput-linear"], made_tables["throughput-decode"]
    found = {row[0].text: [(c.text, c.detail) for c in row[2:]] for row in linear.sections[0]}
    assert found["ggml"] == [("failed", "(SIGSEGV)"), ("120", "(50%)")]
    assert found["oneDNN"] == [("failed", "(RuntimeError)"), ("240", "(50%)")]
    # Without them the best others are torch's BF16 and no 4-bit one; at M=8 nothing changes.
    assert cells(linear, 2) == [
        ["ours: times as fast as the best BF16", "", "3.75", "1.50"],
        ["ours: times as fast as the best other 4-bit", "", EMPTY, "0.75"],
        ["ours: times as fast as INT8", "", "0.75", "0.38"],
    ]
    assert "Refused: linear M=1, ggml Q4_0 W4A8, not timed: it was ended by SIGSEGV." in linear.footer
    assert linear.data.failure.notna().sum() == 2 and "failed" in linear.latex()
    llama = next(row for row in decode.sections[0] if row[0].text == "llama.cpp")
    assert [c.detail for c in llama[2:6]] == ["(wrong)"] * 4 and llama[-1].text == EMPTY


def test_threads_have_columns_of_their_own_and_are_held_against_the_fewest(bench: Callable[..., Path]) -> None:
    faster = {"torch": 1.5, "reqat": 2.0, "reqat.pack": 1.25}
    made = rows() + [
        row
        | {
            "threads": 2,
            "median_us": row["median_us"] / faster.get(row["provider"], 1),
            "tokens_per_s": row["tokens_per_s"] and row["tokens_per_s"] * faster.get(row["provider"], 1),
        }
        for row in rows()
        if row["m"] == 1
    ]
    source = bench(made)
    linear, decode = (tables_of(source)[f"throughput-{name}"] for name in ("linear", "decode"))
    assert [(c.group, c.name) for c in linear.columns[2:]] == [
        ("N=K=64", "M=1"), ("N=K=64", "M=8"), ("N=K=64, 2 threads", "M=1"),
    ]  # fmt: skip
    assert cells(linear, 2)[0][2:] == ["3.00", "1.50", "5.00"]  # 200 / 40: torch, now the best
    scaling = {(row[0], row[1].partition(":")[0]): row[2:] for row in cells(linear, 4)}
    assert scaling["torch", "BF16"] == [EMPTY, EMPTY, "1.50"]
    assert scaling["reqat", "NVFP4 W4A4"] == [EMPTY, EMPTY, "2.00"]
    assert scaling["oneDNN", "BF16"] == [EMPTY, EMPTY, "1.00"]
    assert [c.group for c in decode.columns[2:-2]].count("prompt 0, batch 1, 2 threads") == 2
    packed = next(row for row in cells(decode, 1) if row[0] == "reqat.pack")
    assert packed[2:] == [EMPTY] * 4 + ["1.25", "1.25", EMPTY, EMPTY]
    measured = benchmark.read(source)
    assert decode_ratios(measured).values.tolist() == [[1, 8, 2], [1, 16, 2], [2, 8, 3], [2, 16, 3]]
    assert any("1 and 2 of" in note for note in linear.footer)


def test_prompts_read_alone_stand_beside_decoding(bench: Callable[..., Path]) -> None:
    one = next(row for row in rows() if row["kernel"] == "decode")
    prompt = one | {"kernel": "prefill", "shape": "B=1 P=512", "output_tokens": None, "tokens_per_s": 700.0}
    table = tables_of(bench([*rows(), prompt]))["throughput-decode"]
    at = [(c.group, c.name) for c in table.columns].index(("prompt 512, batch 1", "prompt alone"))
    assert [row[at].text for row in table.sections[0]] == ["700.0", EMPTY, EMPTY, EMPTY]
    assert table.sections[0][0][at].bold
    assert "prompt alone" in table.caption.lower()


def test_a_ring_that_a_cache_may_have_held_is_named(bench: Callable[..., Path]) -> None:
    made = [
        row | {"ring_bytes": 2**20 * row["m"], "ring_gb_per_s": 90.0 / row["m"], "cold": row["m"] > 1} for row in rows()
    ]
    read = {"bytes": [2**20], "bytes_per_s": [9e10], "cold_bytes": 2**21}
    table = tables_of(bench(made, read_bandwidth=read))["throughput-linear"]
    assert any("6 of 12 rows" in note and "90 GB/s" in note and "2 MiB" in note for note in table.footer)
