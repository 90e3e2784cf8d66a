"""Decoding while entropies are collected, or led by them."""

from __future__ import annotations

from analysis.report.benchmark import Measured
from analysis.report.document import Table
from analysis.tables._kernels import Kernel, kernel_table

NAME = "throughput-entropy"
BENCHMARK = ("entropy",)

KERNEL = Kernel(
    name="entropy",
    title="A decoding step without entropies, collecting them and led by them, ms",
    caption=(
        "Median time of a generation of B rows, P prompt and T new tokens, over its steps: alone; with every step's "
        "entropy, most likely tokens and the probability of the one taken; with these written to parquet files; and "
        "with ReSET's temperatures, which follow the entropy. In brackets, how much longer than alone."
    ),
    milliseconds=True,
    adds_to="generate",
)


def build(measured: Measured) -> Table:
    """The table of the kernel, see `kernel_table`."""
    return kernel_table(measured, KERNEL)
