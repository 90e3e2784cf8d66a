"""Companion NN-LUT: how far each table is off its function, and how many of its segments count."""

from __future__ import annotations

import pandas as pd

from analysis.report.companions import Found
from analysis.report.document import EMPTY, Column, Table, Text
from analysis.tables.companion_nnlut import NAMES

NAME = "companion-nnlut-fits"
COMPANION = "nnlut"

FORMULAS = {"gelu": "GELU", "silu": "SiLU", "exp": "exp", "reciprocal": "1/x", "rsqrt": "1/sqrt(x)"}
_MEASURES = {"mean_abs": "mean", "max_abs": "largest", "mean_rel": "mean relative"}


def build(found: Found) -> Table:
    """A section a function: a row a table; errors in float32, and the mean error in the other arithmetics."""
    rows = found.rows[found.rows["what"] == "fit"]
    sections, data = [], []
    for function, part in rows.groupby("function", sort=False):
        lines = []
        for (method, size), of_table in part.groupby(["method", "entries"], sort=False, dropna=False):
            by_version = dict(list(of_table.groupby("version", sort=False)))
            plain = by_version["fp32"]
            lines.append(
                (
                    Text(FORMULAS[str(function)]),
                    Text(NAMES[str(method)]),
                    Text(f"{plain['size'].max():.0f}"),
                    _spread(plain["effective"]),
                    *(_spread(plain[measure]) for measure in _MEASURES),
                    *(
                        _spread(by_version[v]["mean_abs"]) if v in by_version else Text(EMPTY)
                        for v in ("fp16", "int32")
                    ),
                )
            )
            about = {"function": function, "method": method, "entries": size}
            for version, of_version in by_version.items():
                means = of_version[[*_MEASURES, "effective", "size"]].mean().to_dict()
                data.append(about | {"version": version, "seeds": len(of_version)} | means)
        sections.append(tuple(lines))
    return Table(
        NAME,
        "Tables of nonlinear functions",
        "Errors over the range of each function (GELU -5 to 5, SiLU -10 to 10, exp -256 to 0, 1/x 1 to 1024, 1/sqrt "
        "0.1 to 1024): mean and largest absolute error over equally spaced points, mean relative error over all FP16 "
        "numbers (values below 2^-14 count as that). NN-LUT: mean over training seeds, in brackets lowest and highest. "
        "Entries: segments, and the tails beyond the range. Those that count: without which the table would move by "
        "1e-4 of its spread.",
        found.notes,
        (
            Column("Function", align="l"), Column("Table", align="l"), Column("Entries"), Column("that count"),
            *(Column(name, "FP32 error") for name in _MEASURES.values()),
            Column("FP16", "mean error"), Column("INT32", "mean error"),
        ),
        tuple(sections),
        pd.DataFrame(data),
    )  # fmt: skip


def _spread(values: pd.Series) -> Text:
    detail = f"[{_short(values.min())}, {_short(values.max())}]" if len(values) > 1 else ""
    return Text(_short(values.mean()), detail=detail)


def _short(value: float) -> str:
    return f"{value:.2g}"
