"""Placeholders for Figure 6 and the tables of a benchmark that failed: they say why."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from analysis.registry import throughput_names
from analysis.report import style
from analysis.report.benchmark import error_table
from analysis.report.document import Column, Table, Text
from reqat.config.throughput import Throughput


def missing_table(name: str, reason: str) -> Table:
    """In place of a table whose benchmark failed: the reason."""
    return Table(
        name=name,
        title="Not measured",
        caption=f"The benchmark failed: {reason}",
        footer=("The next `make figures` tries again; every other table and figure is there.",),
        columns=(Column("provider", align="l"),),
        sections=(((Text(),),),),
        data=pd.DataFrame({"not_measured": [reason]}),
    )


def missing_figure(reason: str) -> Figure:
    """In place of Figure 6: why it is missing, and what to do."""
    fig = style.figure(1.6)
    lines = [
        "Figure 6 is missing: the benchmark failed.",
        "",
        *textwrap.wrap(reason, 100)[:6],
        "",
        "The next `make figures` tries again; BENCH=no leaves it out.",
    ]
    fig.text(0.5, 0.5, "\n".join(lines), ha="center", va="center", parse_math=False)
    return fig


def build_missing(settings: Throughput, reason: str, table_folder: Path, plot_folder: Path) -> list[Path]:
    """Write placeholders for every table and figure of a benchmark that failed; returns the files.

    What needs no benchmark, the roofline model's errors, is written as ever.
    """
    error = error_table()
    names, figures = throughput_names(settings)
    made = [error if name == error.name else missing_table(name, reason) for name in names]
    written = [path for table in made for path in table.write(Path(table_folder))]
    with style.context():
        for name in figures:
            written += style.save(missing_figure(reason), Path(plot_folder), name)
    return written
