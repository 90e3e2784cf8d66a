"""Responses of packed models against those of their fake-quantized twins."""

from __future__ import annotations

import pandas as pd

from analysis.report.benchmark import Measured
from analysis.report.document import Column, Table, Text, number

NAME = "throughput-agreement"
BENCHMARK = ("agreement",)


def build(measured: Measured) -> Table:
    """Greedy responses of packed models that are their fake-quantized twins', beside a control."""
    found = measured.record["metrics"]["agreement"]
    lines, data = [], []
    for part in found:
        model = Text(part["model"])
        if "skipped" in part:
            lines.append((model, Text(part["precision"]), Text(f"skipped: {part['skipped']}"), *[Text()] * 4))
            continue
        data.append(part)
        counts = [part["prompts"], part["same"], part["control_same"]]
        shares = [100 * part[key] / part["tokens"] for key in ("same_tokens", "control_same_tokens")]
        cells = [Text(str(count)) for count in counts] + [Text(number(share, 1)) for share in shares]
        lines.append((model, Text(part["precision"]), *cells))
    return Table(
        name=NAME,
        title="Packed models against their fake-quantized twins",
        caption=(
            "Greedy responses to test prompts, float32: how many are the twin's to the last token, and the share of "
            "tokens before the first difference. Control: the twin with float64 sums and equal codes: what float32 "
            "summation alone does. Global scales a row."
        ),
        footer=measured.notes()[:1],
        columns=(
            Column("model", align="l"),
            Column("precision", align="l"),
            Column("prompts"),
            Column("packed", "same response"),
            Column("control", "same response"),
            Column("packed, %", "tokens before a difference"),
            Column("control, %", "tokens before a difference"),
        ),
        sections=(tuple(lines),),
        data=pd.DataFrame(data),
    )
