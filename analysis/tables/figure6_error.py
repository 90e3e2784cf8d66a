"""The roofline model against every ratio that the paper's Figure 6 reports. Needs no measurement."""

from __future__ import annotations

import pandas as pd

from analysis.report import paper, roofline
from analysis.report.benchmark import Measured
from analysis.report.document import Column, Table, Text, number

NAME = "figure6-error"
BENCHMARK = ()


def build(measured: Measured | None = None) -> Table:
    """The roofline model against every ratio that the paper's Figure 6 reports."""
    points = roofline.points()
    data = pd.DataFrame(
        {
            "device": p.device.name,
            "kv_cache": p.cache,
            "method": p.method,
            "output_tokens": p.output_tokens,
            "reported": p.reported,
            "modelled": p.modelled,
            "error": p.error,
            "bf16_sequences": p.limited,
        }
        for p in points
    )
    sections = []
    for device in dict.fromkeys(data.device):
        part = data[data.device == device]
        lines = [
            (
                Text(f"{row.device} ({row.kv_cache} KV)"),
                Text(row.method),
                Text(str(row.output_tokens)),
                Text(number(row.reported, 2)),
                Text(number(row.modelled, 2)),
                Text(number(100 * row.error, 0, sign=True)),
                Text(str(row.bf16_sequences)),
            )
            for row in part.itertuples()
        ]
        sections.append(tuple(lines))
    mean = 100 * data.error.abs().mean()
    return Table(
        name=NAME,
        title="The roofline model against the paper's Figure 6",
        caption=(
            f"Throughput relative to BF16: reported by the paper for {paper.reported()[0].model} and modelled from "
            f"datasheets, {roofline.REQUESTS} requests of {roofline.PROMPT_TOKENS} prompt tokens. The model is fitted "
            "to nothing. Last column: BF16 sequences that memory holds at once."
        ),
        footer=(
            f"Mean absolute error {mean:.0f}%. The paper gives no batch for these numbers; the largest is assumed.",
            "The model knows bandwidth, dense operations and memory of the datasheets, and no overheads.",
        ),
        columns=(
            Column("device", align="l"),
            Column("method", align="l"),
            Column("output tokens"),
            Column("reported"),
            Column("modelled"),
            Column("error, %"),
            Column("BF16 sequences"),
        ),
        sections=tuple(sections),
        data=data,
    )
