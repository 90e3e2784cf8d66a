"""Figure 6(c) in numbers: memory of weights and KV cache."""

from __future__ import annotations

import math

from analysis.report.benchmark import Measured, memory_rows, size
from analysis.report.document import Column, Table, Text, number

NAME = "figure6-memory"
BENCHMARK = ()


def build(measured: Measured) -> Table:
    """Figure 6(c) in numbers."""
    data = memory_rows(measured)
    sections = []
    for model in dict.fromkeys(data.model):
        part = data[data.model == model]
        base = part[part.precision == "BF16"]
        lines = []
        for r in part.itertuples():
            gain = base.cache_bytes.iloc[0] / r.cache_bytes if len(base) and r.cache_bytes else math.nan
            lines.append(
                (
                    Text(r.model),
                    Text(r.precision),
                    Text(r.kind),
                    Text(r.batch),
                    Text(size(r.weight_bytes)),
                    Text(size(r.cache_bytes)),
                    Text(number(gain, 2)),
                )
            )
        sections.append(tuple(lines))
    return Table(
        name=NAME,
        title="Memory of weights and KV cache",
        caption=(
            "The paper's model computed from its architecture (embedding, lm_head and norms 16 bits, NVFP4 with its "
            "scales 4.5); ours as allocated while the benchmark decoded. Last column: BF16's cache in these caches."
        ),
        footer=measured.notes("decode"),
        columns=(
            Column("model", align="l"),
            Column("precision", align="l"),
            Column("kind", align="l"),
            Column("batch", align="l"),
            Column("weights"),
            Column("KV cache"),
            Column("cache, times smaller"),
        ),
        sections=tuple(sections),
        data=data,
    )
